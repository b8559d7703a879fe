"""Random choices, all from a numpy generator: the same state gives the same choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of `options`."""
    return options[int(rng.integers(len(options)))]


def some(rng: np.random.Generator, options: Sequence[T], number: int) -> list[T]:
    """`number` different ones, or all if there are fewer, in random order."""
    return [options[int(i)] for i in rng.permutation(len(options))[:number]]


def whole(rng: np.random.Generator, low: int, high: int) -> int:
    """An integer from `low` to `high`, both included."""
    return int(rng.integers(low, high + 1))
