"""Heat maps of stored questions: where the objects of each name are among the patches that can be chosen."""

from __future__ import annotations

import numpy as np

from molmo_edge.training.regions import PEAK, UNKNOWN, heat_near, overlap
from recipes.nano.head_states import Choices


def heat_of(choices: Choices) -> np.ndarray:
    """int8 [m, n]: PEAK at the patch with an object's center, less near it, UNKNOWN where the name may be, else 0."""
    size = choices.shape[::-1]
    there = choices.slots[..., None]
    centers = np.where(there, choices.places, 0).sum(1) / there.sum(1)  # row and column
    cells = 100 * (centers[:, ::-1] + 0.5) / size  # [n, 2], x and y in percent
    sides = 100 * choices.slots.shape[1] ** 0.5 / size  # of a patch
    heat = np.zeros((len(choices.names), len(cells)), np.int8)
    boxes, sure = choices.boxes, choices.sure
    for row, box in zip(choices.box_names[~sure], boxes[~sure], strict=True):
        heat[row, overlap(cells, sides, box)] = UNKNOWN
    for row, box in zip(choices.box_names[sure], boxes[sure], strict=True):
        near = heat_near(cells, sides, box)
        heat[row] = np.where(heat[row] == UNKNOWN, UNKNOWN, np.maximum(heat[row], near))
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    for row, middle in zip(choices.box_names[sure], middles[sure], strict=True):
        heat[row, np.abs((cells - middle) / sides).max(1).argmin()] = PEAK
    return heat
