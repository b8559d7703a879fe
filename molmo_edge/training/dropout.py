"""Residual dropout with a separate rate for answers, independent of the batch that a sequence is in.

Reference: olmo/model.py::Dropout. Each sequence has one generator per branch of the decoder, seeded with the sequence's
seed. The masks therefore do not depend on the number of ranks or on padding, a resumed run draws the same masks as an
uninterrupted one, and recomputed activations get the same mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from molmo_edge.training.encoding import Batch

_STRIDE = 0x9E3779B97F4A7C15  # odd, and far from a ratio of small numbers: seeds of branches do not meet


@dataclass(frozen=True)
class ResidualDropout:
    """The dropout of one batch."""

    keep: Tensor  # float32 [batch, n]: the probability that a value is kept
    lengths: list[int]
    seeds: list[int]

    def __call__(self, branch: Tensor, number: int) -> Tensor:
        """branch [batch, n, d] -> the branch with dropped values set to zero and the others scaled up."""
        scale = torch.zeros(branch.shape, dtype=branch.dtype, device=branch.device)  # padding is dropped completely
        for row, (n, seed) in enumerate(zip(self.lengths, self.seeds, strict=True)):
            generator = torch.Generator(branch.device)
            generator.manual_seed((seed + (number + 1) * _STRIDE) & ((1 << 63) - 1))
            drawn = torch.rand(n, branch.shape[-1], generator=generator, device=branch.device)
            keep = self.keep[row, :n, None]
            scale[row, :n] = ((drawn < keep) / keep).to(branch.dtype)
        return branch * scale


def residual_dropout(batch: Batch, rate: float, answers: float) -> ResidualDropout | None:
    """The dropout of a batch, or None if both rates are 0.

    rate: at all positions. answers: if above 0, at positions whose target belongs to an answer. The reference calls
    them residual_dropout and response_residual_dropout; stage 1 uses 0 and 0.1, stage 2 uses 0.1 and 0.
    """
    if not rate and not answers:
        return None
    keep = torch.full_like(batch.weights, 1 - rate)
    if answers:
        keep = torch.where(batch.weights > 0, 1 - answers, keep)
    return ResidualDropout(keep, batch.lengths, batch.seeds)
