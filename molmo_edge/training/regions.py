"""Heat maps as an auxiliary loss: all labelled objects of a picture at once, without questions.

For each name the model predicts a heat map over the pooled cells. The query is the name's embedding in the decoder and
the keys are the connector's cells, so any word can be a query. Targets are CenterNet's (arXiv 1904.07850): 1 at the
cell of an object's centre, and a smaller weight for negatives near it. Within a cell, a second dot product with the
towers' features chooses the patch that contains the centre, as MolmoPoint chooses a subpatch (arXiv 2603.28069).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo_edge.config import ImageConfig, MolmoConfig
from molmo_edge.data.regions import Box, Regions
from molmo_edge.frontend.crops import patch_grid
from molmo_edge.frontend.tokenizer import Tokenizer

UNKNOWN = -1  # in heat maps: neither positive nor negative
PEAK = 100  # in heat maps: an object's centre
_NEAR = 0.54 / 3  # standard deviation of a peak, as a share of the box's sides (CenterNet: radius / 3)


@dataclass(frozen=True, eq=False)
class Targets:
    """Targets of a picture's crops."""

    heat: np.ndarray  # int8 [n_crops, cells^2, n_names]: 0..PEAK, UNKNOWN
    centres: np.ndarray  # int64 [m, 4]: crop, cell, name and patch of the cell (row-major), per object and crop


def cell_grid(config: ImageConfig, centres: np.ndarray) -> np.ndarray:
    """Centres of patches [n, patches^2, 2] -> centres of pooled cells [n, cells^2, 2]."""
    side, p = config.cells, config.pool
    return np.asarray(centres.reshape(-1, side, p, side, p, 2).mean((2, 4)).reshape(-1, side * side, 2))


def make_targets(
    regions: Regions, config: ImageConfig, tiling: tuple[int, int], height: int, width: int, crops: Sequence[int]
) -> Targets:
    """Targets of `crops` (indices, 0 is the global view) of a picture of height x width pixels."""
    patches, sides = patch_grid(config, tiling, height, width)
    patches, sides = 100 * patches[list(crops)], 100 * sides[list(crops)] * config.pool
    cells = cell_grid(config, patches)  # [n, cells^2, 2], percent
    heat = np.where(regions.known, 0, UNKNOWN).astype(np.int8)
    heat = np.broadcast_to(heat, (*cells.shape[:2], len(regions.known))).copy()
    for name, box in regions.unsure:
        inside = overlap(cells, sides[:, None], box)
        heat[..., name][inside] = UNKNOWN
    found = []
    for name, (x0, y0, x1, y1) in regions.objects:
        centre = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
        near = heat_near(cells, sides[:, None], (x0, y0, x1, y1))
        column = heat[..., name]
        np.maximum(column, near, out=column, where=column != UNKNOWN)
        holds = (np.abs(cells - centre) <= sides[:, None] / 2).all(-1)
        for crop, cell in zip(*holds.nonzero(), strict=True):
            heat[crop, cell, name] = PEAK
            right, below = centre > cells[crop, cell]
            found.append((crop, cell, name, 2 * int(below) + int(right)))
    return Targets(heat, np.array(found, np.int64).reshape(-1, 4))


def heat_near(cells: np.ndarray, sides: np.ndarray, box: Box) -> np.ndarray:
    """The heat of an object at cells [..., 2], except PEAK at its centre: int8 [...].

    `sides`: of the cells, in a shape that broadcasts to theirs.
    """
    corners = np.array(box)
    centre = (corners[:2] + corners[2:]) / 2
    # At least a third of a cell: the neighbours of a smaller object see it, too.
    spread = np.maximum(_NEAR * (corners[2:] - corners[:2]), 0.35 * sides)
    near = np.exp(-(((cells - centre) / spread) ** 2).sum(-1) / 2)
    return np.asarray(np.minimum(np.round(PEAK * near), PEAK - 1), np.int8)


def overlap(cells: np.ndarray, sides: np.ndarray, box: Box) -> np.ndarray:
    """Which cells overlap the box: bool [...], as `heat_near`."""
    low, high = cells - sides / 2, cells + sides / 2
    return np.asarray((low < box[2:]).all(-1) & (high > box[:2]).all(-1))


def join(targets: Sequence[Targets]) -> tuple[Tensor, Tensor]:
    """(heat int8 [crops, cells^2, n_names], centres int64 [m, 4]) of all pictures, concatenated."""
    first, centres = 0, []
    for one in targets:
        centres.append(one.centres + np.array([first, 0, 0, 0]))
        first += len(one.heat)
    return torch.from_numpy(np.concatenate([t.heat for t in targets])), torch.from_numpy(np.concatenate(centres))


class HeatMapHead(nn.Module):
    """Scores of names at cells, and at the patches within a cell."""

    def __init__(self, config: MolmoConfig, width: int = 256):
        super().__init__()
        d = config.decoder.d_model
        self.pool, self.side, self.width = config.image.pool, config.image.cells, width
        self.name = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * width), nn.GELU(), nn.Linear(2 * width, 2 * width))
        self.prior = nn.Linear(d, 1)
        self.cell = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, width))
        self.patch = nn.Sequential(nn.LayerNorm(config.feature_dim), nn.Linear(config.feature_dim, width))
        nn.init.zeros_(self.prior.weight)
        nn.init.constant_(self.prior.bias, -4.6)  # a prior of 0.01 (RetinaNet, arXiv 1708.02002)

    def queries(self, names: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """names [n, d_model] -> queries of cells [n, width] and of patches [n, width], and a bias [n]."""
        cells, patches = self.name(names).chunk(2, dim=-1)
        return cells, patches, self.prior(names)[:, 0]

    def heat(self, names: Tensor, cells: Tensor) -> Tensor:
        """names [n, d_model], cells [c, cells^2, d_model] -> logits [c, cells^2, n]."""
        queries, _, prior = self.queries(names)
        return cast(Tensor, self.cell(cells) @ queries.T / self.width**0.5 + prior)

    def patches(self, names: Tensor, features: Tensor, centres: Tensor) -> Tensor:
        """Patch within a cell: features [c, patches^2, feature_dim], centres int [m, 4] -> logits [m, pool^2]."""
        crop, cell, name, _ = centres.unbind(1)
        p, side = self.pool, self.side
        y, x = cell // side * p, cell % side * p
        at = torch.stack([(y + i) * side * p + x + j for i in range(p) for j in range(p)], dim=1)  # [m, pool^2]
        keys = self.patch(features[crop[:, None], at])
        return cast(Tensor, (keys * self.queries(names)[1][name][:, None]).sum(-1) / self.width**0.5)


def heat_loss(logits: Tensor, heat: Tensor) -> Tensor:
    """CenterNet's focal loss, summed over all known cells: logits [c, cells^2, n], heat int8 of that shape."""
    return heat_losses(logits, heat).sum()


def heat_losses(logits: Tensor, heat: Tensor) -> Tensor:
    """The terms of `heat_loss`, 0 where the heat is UNKNOWN. Both of any shape."""
    logits, target = logits.float(), heat.float() / PEAK
    positive = heat == PEAK
    p = logits.sigmoid()
    loss = torch.where(
        positive, (1 - p).square() * F.softplus(-logits), (1 - target).pow(4) * p.square() * F.softplus(logits)
    )
    return loss * (heat != UNKNOWN)


class Names:
    """A vocabulary of names. The embedding of a name is the mean over its tokens in the decoder."""

    def __init__(self, names: Sequence[str], tokenizer: Tokenizer):
        tokens = [tokenizer.encode(" " + name) for name in names]
        ids = np.zeros((len(names), max(map(len, tokens))), np.int64)
        weights = np.zeros(ids.shape, np.float32)
        for row, weight, one in zip(ids, weights, tokens, strict=True):
            row[: len(one)], weight[: len(one)] = one, 1 / len(one)
        self.names, self._ids, self._weights = tuple(names), torch.from_numpy(ids), torch.from_numpy(weights)

    def embed(self, embedding: Tensor) -> Tensor:
        """embedding [vocabulary, d_model] -> [n_names, d_model], scaled to unit variance."""
        self._ids, self._weights = self._ids.to(embedding.device), self._weights.to(embedding.device)
        rows = (embedding[self._ids] * self._weights[..., None]).sum(1)
        return rows / embedding.std()
