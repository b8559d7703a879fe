"""Who sees whom in a packed sequence, for SDPA as a dense mask and for FlexAttention as blocks of one.

Query i sees key j where j is not behind it and segment[i] <= segment[j]: an annotation sees the image, whose segment is
the largest, and itself. Both forms follow from the segments alone, and are equal (tests/test_training_step.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from molmo_edge.modeling.decoder import Mask


def packed_mask(segments: Tensor, kind: str = "auto") -> Mask:
    """segments int [batch, n], padding's smaller than all -> what `Decoder` takes as a mask.

    kind: "sdpa", "flex" (CUDA in practice: on a CPU it knows no gradients), or "auto", by the device.
    """
    if kind == "flex" or (kind == "auto" and segments.is_cuda):
        return _flex(segments)
    n = segments.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=segments.device).tril()
    return ((segments[:, :, None] <= segments[:, None, :]) & causal)[:, None]  # [batch, 1, n, n]


def _flex(segments: Tensor) -> Mask:
    def may_look(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (segments[batch, query] <= segments[batch, key])

    attention, make_mask = _kernels(segments.is_cuda)
    batch, n = segments.shape
    blocks = make_mask(may_look, batch, None, n, n, device=segments.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cast(Tensor, attention(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1]))

    return attend


@cache
def _kernels(compiled: bool) -> tuple[Any, Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not compiled:
        return flex_attention, create_block_mask
    # One kernel for most lengths and batches, a few special ones; past the limit it would run uncompiled.
    config = torch._dynamo.config
    config.recompile_limit = max(64, config.recompile_limit)
    return torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask, dynamic=True)
