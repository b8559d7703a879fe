"""Heat maps of stored questions: where the objects of each name are among the patches that can be chosen."""

from __future__ import annotations

import numpy as np

from molmo_edge.training.regions import PEAK, UNKNOWN
from recipes.nano.head_states import Choices

_NEAR, _LEAST = 0.18, 0.35  # standard deviation of a peak: share of the box's sides, and of a patch's at least


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
        inside = (cells - sides / 2 < box[2:]).all(1) & (cells + sides / 2 > box[:2]).all(1)
        heat[row, inside] = UNKNOWN
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    for row, box, middle in zip(choices.box_names[sure], boxes[sure], middles[sure], strict=True):
        spread = np.maximum(_NEAR * (box[2:] - box[:2]), _LEAST * sides)
        near = PEAK * np.exp(-(((cells - middle) / spread) ** 2).sum(1) / 2)
        near = np.minimum(np.round(near), PEAK - 1).astype(np.int8)
        heat[row] = np.where(heat[row] == UNKNOWN, UNKNOWN, np.maximum(heat[row], near))
    for row, middle in zip(choices.box_names[sure], middles[sure], strict=True):
        heat[row, np.abs((cells - middle) / sides).max(1).argmin()] = PEAK
    return heat
