"""The attention mask of packed sequences: dense for SDPA, a block mask for FlexAttention, or one without padding.

Query i attends to key j if j <= i and segment[i] <= segment[j]: an annotation attends to the image, whose segment is
the largest, and to itself. In a Molmo2 the tokens of a sequence's images attend to each other in both directions. Both
forms follow from segments and image tokens alone and are equal (tests/test_training_step.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
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


@dataclass(frozen=True)
class Unpadded:
    """The tokens of a batch without its padding, in one row of N tokens.

    On a CPU every padded token costs time, and so do the keys that a query does not attend to. Here each sequence has
    its own attention: the image's tokens among themselves, and the text's to all of the sequence.
    """

    tokens: Tensor  # int64 [N]: which of the b * n tokens
    lengths: Sequence[int]  # of each sequence
    masks: Sequence[tuple[Tensor | None, Tensor | None]]  # of each sequence's image and text; None: causal, no text

    @classmethod
    def of(cls, segments: Tensor, lengths: Sequence[int], block: Tensor | None = None) -> Unpadded:
        """segments int [b, n] and block bool [b, n] as `packed_mask` takes them; lengths: tokens of each sequence."""
        masks: list[tuple[Tensor | None, Tensor | None]] = []
        for row, n in enumerate(lengths):
            own, blocks = segments[row : row + 1, :n], None if block is None else block[row : row + 1, :n]
            first = int((own == own[:, :1]).int().cumprod(1).sum())
            whole = cast(Tensor, packed_mask(own, "sdpa", blocks))
            masks.append(
                (None if block is None else whole[..., :first, :first], whole[..., first:, :] if first < n else None)
            )
        return cls((segments.flatten() >= 0).nonzero()[:, 0], lengths, masks)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, heads, N, head_dim], k and v [1, kv_heads, N, head_dim] -> as q."""
        if (repeats := q.shape[1] // k.shape[1]) > 1:  # older versions of PyTorch have no fast kernel for groups
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out = []
        for masks, *row in zip(self.masks, *(t.split(list(self.lengths), dim=2) for t in (q, k, v)), strict=True):
            image, text = masks
            own_q, own_k, own_v = row
            first = own_q.shape[2] - (0 if text is None else text.shape[2])
            head, tail = own_q[:, :, :first], own_q[:, :, first:]
            keys, values = own_k[:, :, :first], own_v[:, :, :first]
            out.append(F.scaled_dot_product_attention(head, keys, values, attn_mask=image, is_causal=image is None))
            if text is not None:
                out.append(F.scaled_dot_product_attention(tail, own_k, own_v, attn_mask=text))
        return torch.cat(out, dim=2)


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
