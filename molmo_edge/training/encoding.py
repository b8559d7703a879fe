"""From examples to training sequences with crops, and from sequences to batches.

The crops of all sequences of a batch are concatenated, so nothing is computed for crops that would only be padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molmo_edge.config import ImageConfig, MolmoConfig, PointHeadConfig
from molmo_edge.data import annotation_prompts as prompts
from molmo_edge.data.examples import Annotation, Example
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.answer_points import encode_parts, grounded, in_coords, without_absent
from molmo_edge.frontend.chatml import training_question_ids
from molmo_edge.frontend.crops import (
    ImageProcessor,
    Overview,
    PreparedImage,
    cell_patches,
    image_in_grid,
    patch_grid,
    pointable_cells,
    pointing_grid,
)
from molmo_edge.frontend.grounding_tokens import GroundingIds, patch_places, point_target
from molmo_edge.frontend.image_files import load_image
from molmo_edge.frontend.points import parse_points
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.training.attention_loss import AttendedCells, cells_of_points, join_attended
from molmo_edge.training.distillation import TeacherTargets
from molmo_edge.training.features import FeatureCache
from molmo_edge.training.grounding import PointBatch, PointTokens, join_points, mark
from molmo_edge.training.packing import IMAGE_SEGMENT, Packed, pack
from molmo_edge.training.regions import Targets, cell_grid, join, make_targets

PADDING_SEGMENT = -1  # the smallest: padding attends to everything before it, so no row of a mask is empty
DROPPED = -1
_OF_TOKENS = ("input_ids", "targets", "loss_weights", "segments", "positions")
UNIT = 128  # lengths are padded to multiples of it: FlexAttention's block size, and few different shapes


class EncodingError(MolmoEdgeError):
    """An example that does not fit into a sequence."""


@dataclass(frozen=True)
class Encoding:
    """How examples become sequences."""

    style: str = "conversation"  # or "caption", of stage 1: a target length instead of roles and questions
    sequence: int = 2304  # maximum number of tokens; longer sequences are truncated, as in the reference
    weighting: str = "root_subsegments"  # or "none", stage 1
    shuffle: bool = True  # the annotations, so that truncation cuts off random ones
    separator: bool = False  # put <im_end> between annotations; the reference does not
    # Random crops beside the global view of a picture without annotations; None: all, as always in a model that pools
    # across crops or points by grounding tokens.
    crops: int | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """One sequence of n tokens, truncated to the encoding's length, with m crops."""

    packed: Packed
    crops: np.ndarray  # float32 [m, patches^2, patch_size^2 * 3]
    masks: np.ndarray  # float32 [m, patches^2]
    # int32 [m, cells^2], or [n_cells] of a model that pools across crops: position in the sequence, negative where
    # dropped
    token_index: np.ndarray
    seed: int  # of this sequence's dropout
    overview: Overview | None = None
    targets: Targets | None = None  # of its regions
    features: Tensor | None = None  # cached, [m, patches^2, feature_dim]; `crops` is then [m, 0, 0]
    attended: AttendedCells | None = None  # of its annotations' boxes
    # int64 [n_cells, pool^2]: the patches of each image token, as indices into those of all crops, -1 for none; of a
    # model that pools across crops or points by grounding tokens
    pooling: np.ndarray | None = None
    block: np.ndarray | None = None  # bool [n]: image tokens that attend to each other in both directions
    points: PointTokens | None = None  # of a model that points by grounding tokens
    teacher: TeacherSample | None = None  # in distillation, where the teacher needs more than this sequence

    def __len__(self) -> int:
        return len(self.packed.input_ids)

    @property
    def answered(self) -> int:
        """How many tokens of answers it predicts."""
        return int(np.count_nonzero(self.packed.loss_weights))


@dataclass(frozen=True, eq=False)
class TeacherSample:
    """What belongs to the teacher of the student that a sequence is for."""

    own: Sample | None = None  # the same example as the teacher reads it
    pairs: np.ndarray | None = None  # int64 [p, 2] of `alignment.aligned`
    targets: TeacherTargets | None = None  # from a cache
    path: Path | None = None  # of the file in a cache that is being written


@dataclass(frozen=True)
class Encoder:
    """Turns examples into sequences, with the tokenizer and the geometry of crops of a checkpoint."""

    tokenizer: Tokenizer
    image: ImageConfig
    encoding: Encoding
    cache: FeatureCache | None = None  # read instead of crops
    config: MolmoConfig | None = None  # of the model; None: a Molmo v1 without grounding tokens

    def __call__(self, example: Example, rng: np.random.Generator) -> Sample:
        """Encode an example. Raises EncodingError if no answer fits into the sequence, and ImageError."""
        annotations = list(example.annotations)
        if self.encoding.shuffle:
            annotations = [annotations[int(i)] for i in rng.permutation(len(annotations))]
        texts = [self._texts(annotation, rng) for annotation in annotations]
        special, n = self.tokenizer.special, self.encoding.sequence
        rgb = None if example.image is None else load_image(example.image)
        image = self._image(rgb)
        pooling = self._pooling(image)
        packed = pack(
            self.tokenizer,
            image.tokens,
            [self._messages(each, image, rgb, pooling) for each in texts],
            weighting=self.encoding.weighting,
            weights=[annotation.weight for annotation in annotations],
            separator=special.im_end if self.encoding.separator else None,
        )
        packed = replace(packed, **{name: getattr(packed, name)[:n] for name in _OF_TOKENS})
        if not packed.loss_weights.any() and (annotations or example.regions is None):
            raise EncodingError(
                f"a sequence of {n} tokens has no room for an answer: the image takes {1 + len(image.tokens)}. Use "
                "fewer crops or longer sequences"
            )
        points = None
        if self._points_by_tokens and pooling is not None:
            pointable = np.zeros(0, bool) if rgb is None else pointable_cells(self.image, image.tiling)
            grids = [] if rgb is None else [pointing_grid(self.image, image.tiling)]
            places = patch_places(pooling, grids)
            packed, points = mark(packed, self._grounding_ids(pooling), self._point_head, pointable, places)
        index = np.where(image.token_index >= 0, image.token_index + 1, DROPPED).astype(np.int32)
        chosen = self._crops(example, len(image.crops), rng)
        crops, overview, features, targets, attended = image.crops[chosen], image.overview, None, None, None
        if self.cache is not None:
            crops, overview = np.empty((len(chosen), 0, 0), np.float32), None
            features = self.cache.read(rgb)[chosen]
        elif overview is not None:
            overview = replace(overview, positions=overview.positions[chosen])
        if example.regions is not None and rgb is not None:
            height, width = rgb.shape[:2]
            targets = make_targets(example.regions, self.image, image.tiling, height, width, chosen)
        if rgb is not None and self._writes_digits and any(annotation.boxes for annotation in annotations):
            centres = cell_grid(self.image, patch_grid(self.image, image.tiling, *rgb.shape[:2])[0] * 100)
            boxes = [annotation.boxes for annotation in annotations]
            attended = cells_of_points(self.tokenizer, packed, texts, boxes, centres, index)
        seed = int(rng.integers(1 << 62))
        masks, index = image.masks[chosen], index if self.image.pools_across_crops else index[chosen]
        block = None
        if self.config is not None and self.config.decoder.bidirectional_images:
            block = np.isin(packed.input_ids, special.image_block) & (packed.segments == IMAGE_SEGMENT)
        return Sample(packed, crops, masks, index, seed, overview, targets, features, attended, pooling, block, points)

    # --- texts --------------------------------------------------------------------------------------------------------

    def _texts(self, annotation: Annotation, rng: np.random.Generator) -> list[str]:
        """Question, answer, ... as the data set has them, with roles, tags and lengths."""
        if self.encoding.style == "caption":
            texts = prompts.captioning(annotation, rng)
            return [text.strip().replace(" :", ":") for text in texts] if self._chat else texts
        return prompts.chat(annotation) if self._chat else prompts.conversation(annotation, rng)

    def _messages(
        self, texts: Sequence[str], image: PreparedImage, rgb: np.ndarray | None, pooling: np.ndarray | None
    ) -> list[str | list[int]]:
        """The messages of `pack`: markup is added, and points are written as the model writes them."""
        grounds = self._points_by_tokens and rgb is not None and pooling is not None
        shown = [without_absent(text) for text in texts[:-1]]
        points_before = shown != list(texts[:-1]) or any(parse_points(answer) for answer in texts[1:-1:2])
        if grounds and not self._chat and points_before:
            # In a later prompt the points of an answer have coordinates (`sdk.streaming.said_before`), which this model
            # does not write: the turns before the last question are its prompt.
            return [self._said(shown), self._grounded(texts[-1], image, rgb, pooling)]
        messages: list[str | list[int]] = []
        for turn, text in enumerate(texts):
            if turn % 2 == 0:
                messages.append(training_question_ids(self.tokenizer, text, first=not turn) if self._chat else text)
            elif grounds:
                messages.append(self._grounded(text, image, rgb, pooling))
            else:
                messages.append(in_coords(text) if self._chat else text)
        return messages

    def _said(self, texts: Sequence[str]) -> list[int]:
        """The ids of questions and answers with roles, as they are before a question."""
        ids: list[int] = []
        for turn, text in enumerate(texts):
            ids += [*self.tokenizer.encode(text), *([self.tokenizer.special.eos] if turn % 2 else [])]
        return ids

    def _grounded(
        self, text: str, image: PreparedImage, rgb: np.ndarray | None, pooling: np.ndarray | None
    ) -> list[int]:
        assert rgb is not None
        assert pooling is not None
        grid = pointing_grid(self.image, image.tiling)
        frame = image_in_grid(self.image, image.tiling, *rgb.shape[:2])

        def target(x: float, y: float) -> tuple[int, int, int]:
            if self.image.layout == "molmo_point" and not image.tiling[0]:
                raise EncodingError("MolmoPoint points at crops, and this image has none: raise max_crops")
            return point_target(x, y, pooling, grid, frame)

        return encode_parts(self.tokenizer, grounded(text, target, self._grounding_ids(pooling)))

    def _grounding_ids(self, pooling: np.ndarray) -> GroundingIds:
        assert self.config is not None
        head, (patches, slots) = self._point_head, pooling.shape
        return GroundingIds(
            self.config.decoder.n_logits, patches, slots, head.n_locations, head.no_more_class, head.numbered
        )

    @property
    def _chat(self) -> bool:
        return self.tokenizer.special.chat_markup

    @property
    def _points_by_tokens(self) -> bool:
        return self.config is not None and self.config.point_head is not None

    @property
    def _point_head(self) -> PointHeadConfig:
        assert self.config is not None
        assert self.config.point_head is not None
        return self.config.point_head

    @property
    def _writes_digits(self) -> bool:
        """Whether points are written in the grammar of Molmo v1, whose digits can be supervised."""
        return not self._chat and not self._points_by_tokens

    # --- images -------------------------------------------------------------------------------------------------------

    def _pooling(self, image: PreparedImage) -> np.ndarray | None:
        """The patches of each image token, where they are needed."""
        if image.pooling is not None or not (self._points_by_tokens or self.image.pools_across_crops):
            return image.pooling
        if not len(image.crops):
            return np.zeros((0, self.image.pool**2), np.int64)
        return cell_patches(self.image, image.tiling)

    def _crops(self, example: Example, n: int, rng: np.random.Generator) -> list[int]:
        """Which of n crops are computed: all of them if the example has annotations, or if tokens refer to patches."""
        if self.encoding.crops is None or example.annotations or n < 2:
            return list(range(n))
        if self.image.pools_across_crops or self._points_by_tokens:  # `Sample.pooling` has the patches of all crops
            return list(range(n))
        return [0, *sorted(1 + int(i) for i in rng.permutation(n - 1)[: self.encoding.crops])]

    def _image(self, rgb: np.ndarray | None) -> PreparedImage:
        """The crops of a picture; empty arrays for text alone."""
        c = self.image
        if rgb is None:
            index = (0,) if c.pools_across_crops else (0, c.cells**2)
            shapes = (0, c.patches**2, c.patch_size**2 * 3), (0, c.patches**2), index
            crops, masks, places = (np.zeros(shape, np.float32) for shape in shapes)
            return PreparedImage(crops, masks, np.zeros(0, np.int32), places.astype(np.int32), (0, 0))
        return ImageProcessor(c, self.tokenizer.special)(rgb)


@dataclass
class Batch:
    """b padded sequences of n tokens; c crops, those of all sequences concatenated."""

    ids: Tensor  # int64 [b, n]
    targets: Tensor  # int64 [b, n]
    weights: Tensor  # float32 [b, n], 0 outside answers
    segments: Tensor  # int64 [b, n]: IMAGE_SEGMENT, the annotation's number, or PADDING_SEGMENT
    positions: Tensor  # int64 [b, n]
    crops: Tensor  # float32 [c, patches^2, patch_size^2 * 3]
    masks: Tensor  # float32 [c, patches^2]
    cells: Tensor  # int64 [k]: the kept ones of all c * cells^2 cells, in the order of their tokens
    cells_at: Tensor  # int64 [k]: their positions in the b * n tokens, flattened
    answered: Tensor  # int64 [m]: which of the b * n tokens predict a token of an answer
    lengths: list[int]  # of each sequence, without padding
    seeds: list[int]  # of each sequence
    crop_counts: list[int]  # of each sequence
    overviews: Tensor | None = None  # float32 [b, 3, h, w], padded to squares; None without a convolutional tower
    places: Tensor | None = None  # float32 [c, patches^2, 4, 2]: positions of `images.Overview`
    heat: Tensor | None = None  # int8 [c, cells^2, n_names], see `regions.Targets`; all examples have regions, or none
    centres: Tensor | None = None  # int64 [m, 4]
    features: Tensor | None = None  # cached, [c, patches^2, feature_dim]; `crops` is then [c, 0, 0]
    queries: Tensor | None = None  # int64 [q, 2]: row and position, see `attention_loss.AttendedCells`
    attended: Tensor | None = None  # bool [q, n]
    pooling: Tensor | None = None  # int64 [k, pool^2]: the patches of each image token among those of all crops
    block: Tensor | None = None  # bool [b, n]: image tokens that attend to each other in both directions
    points: PointBatch | None = None  # grounding tokens

    def to(self, device: torch.device) -> Batch:
        """Return a copy on `device`; from pinned memory it is asynchronous."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by a data loader with pin_memory."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(v) for name, v in values.items() if isinstance(v, Tensor)}
        points = None if self.points is None else PointBatch(*map(change, self.points))
        return replace(self, **changed, points=points)


def collate(sequences: Sequence[Sample], length: int | None = None) -> Batch:
    """A batch as long as its longest sequence, rounded up to UNIT, or of `length` tokens."""
    n = length or -(-max(len(s) for s in sequences) // UNIT) * UNIT

    def rows(name: str, fill: float, dtype: type) -> Tensor:
        out: np.ndarray = np.full((len(sequences), n), fill, dtype)
        for row, sequence in zip(out, sequences, strict=True):
            row[: len(sequence)] = getattr(sequence.packed, name)
        return torch.from_numpy(out)

    # What depends on values is computed here: on a GPU it would wait for them.
    index = [np.where(s.token_index >= 0, s.token_index + b * n, DROPPED) for b, s in enumerate(sequences)]
    places = torch.from_numpy(np.concatenate([each.reshape(-1) for each in index]).astype(np.int64))
    cells = (places >= 0).nonzero()[:, 0]
    cells = cells[places[cells].argsort()]
    weights = rows("loss_weights", 0, np.float32)
    return Batch(
        ids=rows("input_ids", 0, np.int64),
        targets=rows("targets", 0, np.int64),
        weights=weights,
        segments=rows("segments", PADDING_SEGMENT, np.int64),
        positions=rows("positions", 0, np.int64),
        crops=torch.from_numpy(np.concatenate([s.crops for s in sequences])),
        masks=torch.from_numpy(np.concatenate([s.masks for s in sequences])),
        cells=cells,
        cells_at=places[cells],
        answered=weights.flatten().nonzero()[:, 0],
        lengths=[len(s) for s in sequences],
        seeds=[s.seed for s in sequences],
        crop_counts=[len(s.crops) for s in sequences],
        **_overviews(sequences),
        **_targets(sequences),
        **_features(sequences),
        **join_attended([s.attended for s in sequences], n),
        **_poolings(sequences),
        block=_blocks(sequences, n),
        points=join_points([s.points for s in sequences], n),
    )


def _poolings(sequences: Sequence[Sample]) -> dict[str, Tensor]:
    found, first = [], 0
    for s in sequences:
        if s.pooling is not None:
            found.append(np.where(s.pooling >= 0, s.pooling + first, -1))
        first += s.masks.size
    return {"pooling": torch.from_numpy(np.concatenate(found))} if found else {}


def _blocks(sequences: Sequence[Sample], n: int) -> Tensor | None:
    blocks = [s.block for s in sequences if s.block is not None]
    if not blocks:
        return None
    return torch.from_numpy(np.stack([np.pad(block, (0, n - len(block))) for block in blocks]))


def _features(sequences: Sequence[Sample]) -> dict[str, Tensor]:
    features = [s.features for s in sequences if s.features is not None]
    return {"features": torch.cat(features)} if features else {}


def _overviews(sequences: Sequence[Sample]) -> dict[str, Tensor]:
    views = [s.overview for s in sequences]
    if not any(views):
        return {}
    known = [view for view in views if view is not None]
    side = max(max(view.pixels.shape) for view in known)
    pixels = np.zeros((len(views), 3, side, side), np.float32)
    for row, view in zip(pixels, views, strict=True):
        if view is not None:
            _, h, w = view.pixels.shape
            row[:, :h, :w] = view.pixels
    return {
        "overviews": torch.from_numpy(pixels),
        "places": torch.from_numpy(np.concatenate([view.positions for view in known])),
    }


def _targets(sequences: Sequence[Sample]) -> dict[str, Tensor]:
    targets = [s.targets for s in sequences if s.targets is not None]
    if not targets:
        return {}
    if len(targets) < len(sequences):
        raise EncodingError("a batch mixes examples with and without regions: train on them in separate stages")
    heat, centres = join(targets)
    return {"heat": heat, "centres": centres}


def image_tokens(batch: Batch) -> int:
    """Number of image tokens in a batch, BOS included."""
    return int((batch.segments == IMAGE_SEGMENT).sum())
