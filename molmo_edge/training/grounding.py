"""Two auxiliary losses that supervise every labelled object of a picture at once.

Question answering alone stays on a plateau for a long time: it learns the grammar and the prior, not which
name is where. `naming_loss` pulls a connector cell towards the decoder's own embedding of the object's name;
`looking_loss` asks one attention layer to look at the object whose point is about to be written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from molmo_edge.config import ImageConfig


def cell_centres(
    config: ImageConfig, tokens: np.ndarray, im_patch: int, tiling: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Where each pooled cell stands: positions int [k] in `tokens`, centres float32 [k, 2] in percent (x, y).

    The global view's cells first, then the stitched grid, as in the sequence. Only for resize="dino", where
    the canvas is the whole picture.
    """
    if config.resize != "dino":
        raise ValueError('cell centres are only known for resize="dino"')
    positions = np.flatnonzero(tokens == im_patch)
    grids = [(config.cells, config.cells)]
    if len(positions) > config.cells**2:
        margin = sum(config.overlap_margins)
        rows, columns = ((n * config.window + margin) // config.pool for n in tiling)
        grids.append((rows, columns))
    centres = []
    for rows, columns in grids:
        y, x = np.mgrid[:rows, :columns]
        centres.append(np.stack([(x + 0.5) / columns, (y + 0.5) / rows], -1).reshape(-1, 2) * 100)
    xy = np.concatenate(centres).astype(np.float32)
    if len(xy) != len(positions):
        raise ValueError(f"{len(positions)} image tokens do not fit a tiling of {tiling}")
    return positions, xy


def cells_in_box(xy: np.ndarray, box: np.ndarray, shrink: float = 0.0) -> np.ndarray:
    """Which of the centres [k, 2] lie in box (x0, y0, x1, y1); the nearest one of each grid where none does."""
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * (1 - shrink)
    inside = (np.abs(xy - centre) <= half).all(-1)
    return inside if inside.any() else _nearest(xy, centre)


def _nearest(xy: np.ndarray, centre: np.ndarray) -> np.ndarray:
    distance = ((xy - centre) ** 2).sum(-1)
    return distance <= distance.min() + 1e-6


@dataclass
class NamedRegions:
    """The labelled objects of a batch as weights over cells."""

    weights: Tensor  # float32 [objects, positions of the whole batch laid end to end], rows sum to 1
    names: Tensor  # int [objects], index into the name table


def naming_loss(cells: Tensor, regions: NamedRegions, table: Tensor, temperature: float = 0.07) -> Tensor:
    """Cross entropy of the right name for each object, by cosine between its mean cell and every name.

    cells: [positions, d_model], image features as they are added to the embeddings (zeros elsewhere);
    table: [names, d_model], rows of unit length.
    """
    means = F.normalize(regions.weights @ cells.float(), dim=-1)  # [objects, d_model]
    return F.cross_entropy(means @ table.T / temperature, regions.names)


def looking_loss(q: Tensor, k: Tensor, queries: Tensor, visible: Tensor, wanted: Tensor, heads: int) -> Tensor:
    """-log of the attention that falls on the wanted cells, mean over queries and over the first `heads` heads.

    q, k: [batch, n_heads, n, head_dim] after rotation; queries: int [m, 2], (row of the batch, position);
    visible, wanted: bool [m, n].
    """
    total = q.new_zeros((), dtype=torch.float32)
    for row in range(len(q)):  # one product a row of the batch: gathering k for each query would copy it m times
        mine = queries[:, 0] == row
        scores = q[row, :heads, queries[mine, 1]].float() @ k[row, :heads].float().transpose(1, 2)  # [heads, m, n]
        scores = (scores / q.shape[-1] ** 0.5).masked_fill(~visible[mine], float("-inf")).log_softmax(-1)
        total = total - scores.masked_fill(~wanted[mine], float("-inf")).logsumexp(-1).sum()
    return total / (len(queries) * heads)
