"""The linear layer of the model: it casts its input to the dtype of its weights.

So a bfloat16 model keeps its residual stream, its norms and its router in float32, as under the autocast that Molmo was
trained and evaluated with, and no other code deals with dtypes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Module(nn.Module):
    """An nn.Module whose call returns a tensor; PyTorch's own is typed as returning anything."""

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            """Return the output of `forward`."""
            ...


class Linear(Module, nn.Linear):
    """nn.Linear in the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the dtype of the weight, or that of autocast."""
        w = self.weight
        return F.linear(match(x, w), w, None if self.bias is None else match(self.bias, w))


def match(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x` in the dtype of `weight`, or unchanged under autocast, which casts both itself."""
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight.dtype)


def working_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of products with `weight`: its own, or autocast's."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
