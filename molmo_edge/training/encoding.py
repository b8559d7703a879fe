"""An example becomes one training sequence with its crops; several of them become a batch.

Crops of a batch lie one behind the other, whichever sequence they belong to: nothing is computed for crops that only
fill up a shorter tiling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molmo_edge.config import ImageConfig
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.images import ImageProcessor
from molmo_edge.loading import load_image
from molmo_edge.tokenizer import Tokenizer
from molmo_edge.training import prompts
from molmo_edge.training.examples import Example
from molmo_edge.training.packing import IMAGE_SEGMENT, Packed, pack

PADDING_SEGMENT = -1  # smaller than any: padding sees everything before it, so that no row of a mask is empty
DROPPED = -1
_OF_TOKENS = ("input_ids", "targets", "loss_weights", "segments", "positions")
UNIT = 128  # lengths are padded to multiples of it: FlexAttention's blocks, and few shapes


class EncodingError(MolmoEdgeError):
    """An example that does not fit into a sequence."""


@dataclass(frozen=True)
class Encoding:
    """How examples become sequences."""

    style: str = "conversation"  # or "caption": a wanted length instead of roles and questions, stage 1
    sequence: int = 2304  # most tokens; what is behind them is cut off, as in the reference
    weighting: str = "root_subsegments"  # or "none", stage 1
    shuffle: bool = True  # the annotations: which of them a sequence cuts off is left to chance
    separator: bool = False  # an <im_end> between annotations; the reference has none


@dataclass(frozen=True, eq=False)
class Sample:
    """One sequence of n tokens with m crops; arrays of Packed, cut to the encoding's length."""

    packed: Packed
    crops: np.ndarray  # float32 [m, patches^2, patch_size^2 * 3]
    masks: np.ndarray  # float32 [m, patches^2]
    token_index: np.ndarray  # int32 [m, cells^2]: position in the sequence, negative where dropped
    seed: int  # of what is drawn for this sequence in a step: its dropout

    def __len__(self) -> int:
        return len(self.packed.input_ids)


@dataclass(frozen=True)
class Encoder:
    """Examples to sequences. `image` is the checkpoint's own geometry, `tokenizer` the checkpoint's own."""

    tokenizer: Tokenizer
    image: ImageConfig
    encoding: Encoding

    def __call__(self, example: Example, rng: np.random.Generator) -> Sample:
        """Raises EncodingError where no answer fits into the sequence, ImageError for a damaged picture."""
        write = prompts.captioning if self.encoding.style == "caption" else prompts.conversation
        annotations = list(example.annotations)
        if self.encoding.shuffle:
            annotations = [annotations[int(i)] for i in rng.permutation(len(annotations))]
        messages = [write(annotation, rng) for annotation in annotations]
        special, n = self.tokenizer.special, self.encoding.sequence
        tokens, crops, masks, token_index = self._image(example)
        packed = pack(
            self.tokenizer,
            tokens,
            messages,
            weighting=self.encoding.weighting,
            weights=[annotation.weight for annotation in annotations],
            separator=special.im_end if self.encoding.separator else None,
        )
        packed = replace(packed, **{name: getattr(packed, name)[:n] for name in _OF_TOKENS})
        if not packed.loss_weights.any():
            raise EncodingError(
                f"a sequence of {n} tokens has no room for an answer: {1 + len(tokens)} are the image's, "
                "so use fewer crops or longer sequences"
            )
        return Sample(packed, crops, masks, token_index, int(rng.integers(1 << 62)))

    def _image(self, example: Example) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """tokens int32 [k] without BOS, crops, masks, token_index; all of them empty for a text alone."""
        c = self.image
        if example.image is None:
            shapes = (0, c.patches**2, c.patch_size**2 * 3), (0, c.patches**2), (0, c.cells**2)
            crops, masks, index = (np.zeros(shape, np.float32) for shape in shapes)
            return np.zeros(0, np.int32), crops, masks, index.astype(np.int32)
        prepared = ImageProcessor(c, self.tokenizer.special)(load_image(example.image))
        index = np.where(prepared.token_index >= 0, prepared.token_index + 1, DROPPED).astype(np.int32)
        return prepared.tokens, prepared.crops, prepared.masks, index


@dataclass
class Batch:
    """b sequences of n tokens, padded; c crops, those of all sequences one behind the other."""

    ids: Tensor  # int64 [b, n]
    targets: Tensor  # int64 [b, n]
    weights: Tensor  # float32 [b, n], 0 where no answer is
    segments: Tensor  # int64 [b, n]: IMAGE_SEGMENT, the annotation's number, or PADDING_SEGMENT
    positions: Tensor  # int64 [b, n]
    crops: Tensor  # float32 [c, patches^2, patch_size^2 * 3]
    masks: Tensor  # float32 [c, patches^2]
    cells: Tensor  # int64 [k]: of all c * cells^2 cells those that are kept
    cells_at: Tensor  # int64 [k]: where these go among the b * n tokens laid end to end
    answered: Tensor  # int64 [m]: which of the b * n tokens predict an answer's token
    lengths: list[int]  # of each sequence, without padding
    seeds: list[int]  # of each sequence

    def to(self, device: torch.device) -> Batch:
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by a data loader that pins."""
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

    # What needs a look at the values is settled here: on a GPU it would wait for them.
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
    )


def image_tokens(batch: Batch) -> int:
    """Tokens of image blocks in a batch, BOS included: what packing spares."""
    return int((batch.segments == IMAGE_SEGMENT).sum())
