"""The one linear layer of the model: it works in the dtype of its weights, whatever comes in.

So a bfloat16 model keeps its residual stream, its norms and its router in float32, as the autocast that Molmo was
trained and measured under did, and no other line has to know of a dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        return F.linear(match(x, w), w, None if self.bias is None else match(self.bias, w))


def match(x: Tensor, weight: Tensor) -> Tensor:
    """`x` in the dtype of `weight`; under autocast, which casts both itself, as it is."""
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight.dtype)


def working_dtype(weight: Tensor) -> torch.dtype:
    """What products with `weight` are made in: its own dtype, or autocast's."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
