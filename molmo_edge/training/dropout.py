"""Residual dropout with rates of its own for answers, the same whatever a sequence is batched with.

Reference: olmo/model.py::Dropout. Each sequence draws from generators of its own, one for each branch of the decoder,
seeded with the sequence's number. So the masks do not depend on the number of ranks or on the padding, a resumed run
draws what the stopped one would have, and activations that are computed again meet the same mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from molmo_edge.training.encoding import Batch

_STRIDE = 0x9E3779B97F4A7C15  # odd, and far from a ratio of small numbers: seeds of branches do not meet


@dataclass(frozen=True)
class ResidualDropout:
    """Of one batch: a branch's values are dropped at `rate`, or at `answers` where an answer's token is predicted."""

    keep: Tensor  # float32 [batch, n]: the probability to be kept
    lengths: list[int]
    seeds: list[int]

    def __call__(self, branch: Tensor, number: int) -> Tensor:
        """branch [batch, n, d] -> the same, some values zero and the others larger."""
        scale = torch.zeros(branch.shape, dtype=branch.dtype, device=branch.device)  # padding is dropped whole
        for row, (n, seed) in enumerate(zip(self.lengths, self.seeds, strict=True)):
            generator = torch.Generator(branch.device)
            generator.manual_seed((seed + (number + 1) * _STRIDE) & ((1 << 63) - 1))
            drawn = torch.rand(n, branch.shape[-1], generator=generator, device=branch.device)
            keep = self.keep[row, :n, None]
            scale[row, :n] = ((drawn < keep) / keep).to(branch.dtype)
        return branch * scale


def residual_dropout(batch: Batch, rate: float, answers: float) -> ResidualDropout | None:
    """For a batch; None where nothing is dropped.

    rate: for all positions; answers: for those whose target belongs to an answer, where it is above 0 (reference:
    residual_dropout and response_residual_dropout: stage 1 has 0 and 0.1, stage 2 0.1 and 0).
    """
    if not rate and not answers:
        return None
    keep = torch.full_like(batch.weights, 1 - rate)
    if answers:
        keep = torch.where(batch.weights > 0, 1 - answers, keep)
    return ResidualDropout(keep, batch.lengths, batch.seeds)
