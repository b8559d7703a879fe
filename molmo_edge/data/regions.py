"""Boxes, and named boxes in an image for an auxiliary grounding loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Box = tuple[float, float, float, float]  # x0, y0, x1, y1, percent of width and height where nothing else is stated


@dataclass(frozen=True)
class Regions:
    """Boxes of named objects. A name is an index into the vocabulary of the data set."""

    objects: tuple[tuple[int, Box], ...]
    known: np.ndarray  # bool [n_names]: whether `objects` and `unsure` hold every instance of the name
    unsure: tuple[tuple[int, Box], ...] = ()  # areas where the name may or may not be present


def area(box: Sequence[float]) -> float:
    """Of x0, y0, x1, y1; 0 if the box is empty."""
    return max(0, box[2] - box[0]) * max(0, box[3] - box[1])


def shared_area(a: Sequence[float], b: Sequence[float]) -> float:
    """Area of the intersection of two boxes."""
    return area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
