"""Attention supervision: the token that precedes a point's coordinates attends to the object that the point is for.

From answers alone a model learns grammar and priors long before it learns locations. This auxiliary loss is -log of the
attention of some heads of one layer that falls on the image tokens inside the object's box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from molmo_edge.data.regions import Box
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.training.packing import Packed


@dataclass(frozen=True)
class AttentionLoss:
    """The settings of attention supervision."""

    weight: float
    layer: int  # of the decoder
    heads: int  # number of supervised heads, the first ones of the layer


@dataclass(frozen=True, eq=False)
class AttendedCells:
    """For each point of a sequence, the token that predicts its first digit and the image tokens of its object."""

    queries: tuple[int, ...]
    cells: tuple[np.ndarray, ...]  # int positions in the sequence


def cells_of_points(
    tokenizer: Tokenizer,
    packed: Packed,
    messages: Sequence[Sequence[str]],
    boxes: Sequence[Sequence[Box]],
    centres: np.ndarray,
    index: np.ndarray,
) -> AttendedCells:
    """messages, boxes: of each annotation, as it was packed; centres: [n_crops, cells^2, 2] of cells in percent.

    index: int [n_crops, cells^2], the position of each cell in the sequence, negative where dropped. The boxes of an
    annotation are in the order of the points of its last answer.
    """
    kept = (index >= 0) & (index < len(packed.input_ids))
    at, xy, crop = index[kept], centres[kept], np.nonzero(kept)[0]
    queries, cells = [], []
    for texts, mine, start in zip(messages, boxes, packed.answer_starts, strict=True):
        for offset, box in zip(point_offsets(tokenizer, texts[-1]), mine, strict=False):
            if start + offset <= len(packed.input_ids):
                queries.append(start + offset - 1)
                cells.append(at[cells_in_box(xy, crop > 0, np.asarray(box))])
    return AttendedCells(tuple(queries), tuple(cells))


def point_offsets(tokenizer: Tokenizer, text: str) -> list[int]:
    """For each point in an answer, how many of the answer's tokens come before the first digit of x."""
    offsets, start = [], 0
    while (start := text.find(" x", start)) >= 0:
        quote = text.find('="', start)
        if quote < 0:
            break
        if text[start + 2 : quote].isdigit() or quote == start + 2:
            offsets.append(len(tokenizer.encode(text[: quote + 2])))
        start = quote
    return offsets


def cells_in_box(xy: np.ndarray, detail: np.ndarray, box: np.ndarray) -> np.ndarray:
    """bool [k]: which of the centres [k, 2] lie in box (x0, y0, x1, y1).

    Where none does, the nearest of the global view and the nearest of the crops; detail: bool [k], in a crop.
    """
    inside: np.ndarray = np.asarray(((xy >= box[:2]) & (xy <= box[2:])).all(-1))
    if inside.any():
        return inside
    distance = ((xy - (box[:2] + box[2:]) / 2) ** 2).sum(-1)
    for part in (detail, ~detail):
        if part.any():
            inside = inside | (part & (distance <= distance[part].min() + 1e-6))
    return inside


def join_attended(attended: Sequence[AttendedCells | None], n: int) -> dict[str, Tensor]:
    """`queries` and `attended` of a batch whose sequences have n tokens; empty where no sequence has any."""
    found = [
        (row, q, c) for row, one in enumerate(attended) if one for q, c in zip(one.queries, one.cells, strict=True)
    ]
    if not found:
        return {}
    wanted = torch.zeros(len(found), n, dtype=torch.bool)
    for mask, (_, _, cells) in zip(wanted, found, strict=True):
        mask[torch.from_numpy(cells).long()] = True
    return {"queries": torch.tensor([[row, q] for row, q, _ in found]), "attended": wanted}


def attention_loss(q: Tensor, k: Tensor, segments: Tensor, queries: Tensor, attended: Tensor, heads: int) -> Tensor:
    """-log of the attention that falls on the attended tokens, a mean over queries and over the first `heads` heads.

    q [batch, n_heads, n, head_dim] and k [batch, n_kv_heads, n, head_dim] after rotation; segments int [batch, n];
    queries int [m, 2]: row and position; attended bool [m, n].
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    n = segments.shape[1]
    total = q.new_zeros((), dtype=torch.float32)
    for row in range(len(q)):  # one product a row: gathering k for each query would copy it m times
        mine = queries[:, 0] == row
        at = queries[mine, 1]
        visible = (segments[row, at, None] <= segments[row]) & (torch.arange(n, device=q.device) <= at[:, None])
        scores = q[row, :heads, at].float() @ k[row, :heads].float().transpose(1, 2)  # [heads, m, n]
        scores = (scores / q.shape[-1] ** 0.5).masked_fill(~visible, float("-inf")).log_softmax(-1)
        total = total - scores.masked_fill(~attended[mine], float("-inf")).logsumexp(-1).sum()
    return total / (len(queries) * heads)
