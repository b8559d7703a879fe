"""Boxes of named objects in an image, for an example's auxiliary grounding loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Box = tuple[float, float, float, float]  # x0, y0, x1, y1, percent of width and height


@dataclass(frozen=True)
class Regions:
    """Boxes of named objects. A name is an index into the vocabulary of the data set."""

    objects: tuple[tuple[int, Box], ...]
    known: np.ndarray  # bool [n_names]: whether `objects` and `unsure` hold every instance of the name
    unsure: tuple[tuple[int, Box], ...] = ()  # areas where the name may or may not be present
