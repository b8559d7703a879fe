"""Which part of an image each crop, patch and image token covers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from molmo_edge.config import ImageConfig
from molmo_edge.frontend.crops import (
    DROPPED,
    cell_patches,
    cell_tokens,
    group_patches,
    image_token_count,
    patch_grid,
    select_tiling,
)


@dataclass(frozen=True, eq=False)
class CropMap:
    """The geometry of the crops of one image of `width` x `height` pixels.

    Boxes are left, top, right, bottom in pixels of the image. Where an image is padded to the canvas of the crops,
    boxes extend beyond it. Crop 0 is the global view.
    """

    config: ImageConfig
    width: int
    height: int
    tiling: tuple[int, int]  # rows and columns of crops; (0, 0) for the global view only
    crops: np.ndarray  # float [n_crops, 4], boxes
    patches: np.ndarray  # float [n_crops * patches^2, 4], boxes
    tokens: np.ndarray  # int [n_cells], position of a cell's token among those of the image, from 0
    members: np.ndarray  # int [n_cells, pool^2], the patches of each cell, -1 for none
    cells: np.ndarray  # float [n_cells, 4], boxes
    token_count: int  # of the image, with the markers at the start and the end and those of columns; without BOS

    @property
    def is_global(self) -> np.ndarray:
        """Bool [n_cells]: whether a cell belongs to the global view."""
        return np.arange(len(self.tokens)) < self.config.cells**2

    @property
    def grid(self) -> np.ndarray:
        """Int [n_cells, 2]: row and column of each cell in its grid."""
        shapes = self.config.cell_grids(self.tiling)
        return np.concatenate([np.argwhere(np.ones(shape, bool)) for shape in shapes])

    @property
    def crops_of(self) -> np.ndarray:
        """Int [n_cells, pool^2]: the crop that each patch of a cell is taken from, -1 for none."""
        return np.where(self.members < 0, -1, self.members // self.config.patches**2)


def crop_map(config: ImageConfig, height: int, width: int) -> CropMap:
    """Map the crops and tokens of an image of height x width pixels."""
    tiling = select_tiling(height, width, config)
    centres, sides = patch_grid(config, tiling, height, width)
    half = sides[:, None].astype(float) / 2
    scale = np.array([width, height, width, height], float)
    boxes = np.concatenate([centres - half, centres + half], -1) * scale  # [n_crops, patches^2, 4]
    index = cell_tokens(config, tiling)
    if config.pools_across_crops:
        tokens, members = index, cell_patches(config, tiling)
    else:
        side = config.patches
        crop = group_patches(np.arange(side * side).reshape(side, side), config.pool).reshape(-1, config.pool**2)
        members = np.concatenate([crop + k * side * side for k in range(len(boxes))])
        kept = index.reshape(-1) != DROPPED
        tokens, members = index.reshape(-1)[kept], members[kept]
    order = np.argsort(tokens, kind="stable")
    tokens, members = tokens[order], members[order]
    patches = boxes.reshape(-1, 4)
    return CropMap(
        config,
        width,
        height,
        tiling,
        np.concatenate([boxes[..., :2].min(1), boxes[..., 2:].max(1)], -1),
        patches,
        tokens,
        members,
        _around(patches, members),
        image_token_count(config, tiling),
    )


def _around(patches: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The box around the patches of each cell: [n_cells, 4]."""
    missing = (members < 0)[..., None]
    low = np.where(missing, np.inf, patches[members][..., :2]).min(1)
    high = np.where(missing, -np.inf, patches[members][..., 2:]).max(1)
    return np.concatenate([low, high], -1)
