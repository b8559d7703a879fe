"""From examples to training sequences with crops, and from sequences to batches.

The crops of all sequences of a batch are concatenated, so nothing is computed for crops that would only be padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molmo_edge.config import ImageConfig
from molmo_edge.data import annotation_prompts as prompts
from molmo_edge.data.examples import Example
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.crops import ImageProcessor, Overview, PreparedImage, patch_grid
from molmo_edge.frontend.image_files import load_image
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.training.attention_loss import AttendedCells, cells_of_points, join_attended
from molmo_edge.training.features import FeatureCache
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
    crops: int | None = None  # random crops beside the global view of a picture without annotations; None: all


@dataclass(frozen=True, eq=False)
class Sample:
    """One sequence of n tokens, truncated to the encoding's length, with m crops."""

    packed: Packed
    crops: np.ndarray  # float32 [m, patches^2, patch_size^2 * 3]
    masks: np.ndarray  # float32 [m, patches^2]
    token_index: np.ndarray  # int32 [m, cells^2]: position in the sequence, negative where dropped
    seed: int  # of this sequence's dropout
    overview: Overview | None = None
    targets: Targets | None = None  # of its regions
    features: Tensor | None = None  # cached, [m, patches^2, feature_dim]; `crops` is then [m, 0, 0]
    attended: AttendedCells | None = None  # of its annotations' boxes

    def __len__(self) -> int:
        return len(self.packed.input_ids)


@dataclass(frozen=True)
class Encoder:
    """Turns examples into sequences, with the tokenizer and the geometry of crops of a checkpoint."""

    tokenizer: Tokenizer
    image: ImageConfig
    encoding: Encoding
    cache: FeatureCache | None = None  # read instead of crops

    def __call__(self, example: Example, rng: np.random.Generator) -> Sample:
        """Encode an example. Raises EncodingError if no answer fits into the sequence, and ImageError."""
        write = prompts.captioning if self.encoding.style == "caption" else prompts.conversation
        annotations = list(example.annotations)
        if self.encoding.shuffle:
            annotations = [annotations[int(i)] for i in rng.permutation(len(annotations))]
        messages = [write(annotation, rng) for annotation in annotations]
        special, n = self.tokenizer.special, self.encoding.sequence
        rgb = None if example.image is None else load_image(example.image)
        image = self._image(rgb)
        packed = pack(
            self.tokenizer,
            image.tokens,
            messages,
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
        if rgb is not None and any(annotation.boxes for annotation in annotations):
            centres = cell_grid(self.image, patch_grid(self.image, image.tiling, *rgb.shape[:2])[0] * 100)
            boxes = [annotation.boxes for annotation in annotations]
            attended = cells_of_points(self.tokenizer, packed, messages, boxes, centres, index)
        seed = int(rng.integers(1 << 62))
        masks, index = image.masks[chosen], index[chosen]
        return Sample(packed, crops, masks, index, seed, overview, targets, features, attended)

    def _crops(self, example: Example, n: int, rng: np.random.Generator) -> list[int]:
        """Which of n crops are computed: all of them if the example has annotations."""
        if self.encoding.crops is None or example.annotations or n < 2:
            return list(range(n))
        return [0, *sorted(1 + int(i) for i in rng.permutation(n - 1)[: self.encoding.crops])]

    def _image(self, rgb: np.ndarray | None) -> PreparedImage:
        """The crops of a picture; empty arrays for text alone."""
        c = self.image
        if rgb is None:
            shapes = (0, c.patches**2, c.patch_size**2 * 3), (0, c.patches**2), (0, c.cells**2)
            crops, masks, index = (np.zeros(shape, np.float32) for shape in shapes)
            return PreparedImage(crops, masks, np.zeros(0, np.int32), index.astype(np.int32), (0, 0))
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
    cells: Tensor  # int64 [k]: the kept ones of all c * cells^2 cells
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

    def to(self, device: torch.device) -> Batch:
        """Return a copy on `device`; from pinned memory it is asynchronous."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by a data loader with pin_memory."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(v) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **changed)


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
    places = torch.from_numpy(np.concatenate(index).astype(np.int64).reshape(-1))
    cells = (places >= 0).nonzero()[:, 0]
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
    )


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
