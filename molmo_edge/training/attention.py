"""The attention mask of packed sequences: dense for SDPA, a block mask for FlexAttention.

Query i attends to key j if j <= i and segment[i] <= segment[j]: an annotation attends to the image, whose segment is
the largest, and to itself. In a Molmo2 the tokens of a sequence's images attend to each other in both directions. Both
forms follow from segments and image tokens alone and are equal (tests/test_training_step.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from molmo_edge.modeling.decoder import Mask


def packed_mask(segments: Tensor, kind: str = "auto", block: Tensor | None = None) -> Mask:
    """The mask that `Decoder` takes, for segments int [batch, n], in which padding is smaller than everything else.

    block: bool [batch, n], the tokens of images that attend to each other in both directions; None: all is causal.
    kind: "sdpa"; "flex", which has no gradients on a CPU; or "auto", which chooses by the device.
    """
    if kind == "flex" or (kind == "auto" and segments.is_cuda):
        return _flex(segments, block)
    n = segments.shape[1]
    before = torch.ones(n, n, dtype=torch.bool, device=segments.device).tril()[None]
    if block is not None:
        before = before | (block[:, :, None] & block[:, None, :])
    return ((segments[:, :, None] <= segments[:, None, :]) & before)[:, None]  # [batch, 1, n, n]


def _flex(segments: Tensor, block: Tensor | None) -> Mask:
    def may_look(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        before = query >= key
        if block is not None:
            before = before | (block[batch, query] & block[batch, key])
        return before & (segments[batch, query] <= segments[batch, key])

    attention, make_mask = _kernels(segments.is_cuda)
    batch, n = segments.shape
    blocks = make_mask(may_look, batch, None, n, n, device=segments.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cast(Tensor, attention(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1]))

    return attend


@cache
def _kernels(compiled: bool) -> tuple[Any, Any]:
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not compiled:
        return flex_attention, create_block_mask
    # One kernel for most lengths and batches, a few special ones; past the limit it would run uncompiled.
    config.recompile_limit = max(64, config.recompile_limit)
    return torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask, dynamic=True)
