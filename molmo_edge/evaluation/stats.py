"""Figures with their uncertainty: bootstrap over pictures, Wilson for shares.

Questions about one picture go right and wrong together, so pictures are what is drawn again, not questions and not
tokens. All intervals are 95 %. A bootstrap of few pictures is too sure of itself: its ends are moved out as Student's t
lies outside of the normal distribution, and one picture alone has no interval (its ends are NaN), unless all its values
are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

DRAWS = 1000
_Z = 1.959963984540054  # of the normal distribution, 95 % two-sided


@dataclass(frozen=True)
class Estimate:
    """A value, where it lies with 95 % confidence, and how many things it was taken over."""

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def share(flags: Sequence[bool | float]) -> Estimate:
    """The share of those that hold, with Wilson's interval, which is honest about 0 of n and n of n too."""
    n = len(flags)
    if not n:
        return Estimate(math.nan, math.nan, math.nan, 0)
    p = float(np.mean(np.asarray(flags, np.float64)))
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    # Rounding may put an end a hair on the wrong side of a 0 or a 1 that is exact.
    return Estimate(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)), n)


def mean(values: Sequence[float] | np.ndarray, pictures: Sequence[Hashable]) -> Estimate:
    """The mean of `values`, which belong to `pictures`, one each."""
    values, index, count = _clustered(values, pictures)
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan, 0)
    sums = np.bincount(index, values, count)
    sizes = np.bincount(index, minlength=count)
    draws = _draws(count)  # [DRAWS, pictures]
    return _figure(float(values.mean()), (draws @ sums) / np.maximum(draws @ sizes, 1), values, count)


def quantile(values: Sequence[float] | np.ndarray, pictures: Sequence[Hashable], q: float) -> Estimate:
    """The value below which the share `q` of `values` lies."""
    values, index, count = _clustered(values, pictures)
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan, 0)
    order = np.argsort(values)
    ordered, index = values[order], index[order]
    found = []
    for draw in _draws(count):
        weight = np.cumsum(draw[index])
        found.append(ordered[min(int(np.searchsorted(weight, q * weight[-1])), len(ordered) - 1)])
    return _figure(float(np.quantile(values, q)), np.array(found), values, count)


def average(values: Sequence[float], pictures: Sequence[Hashable]) -> Estimate:
    """As `mean`, but Wilson's interval where each picture has one answer, right or wrong, and where all are alike.

    A bootstrap knows no doubt about n of n. Wilson's n is then that of the pictures.
    """
    n = len(set(pictures))
    if set(values) <= {0.0, 1.0} and (n == len(values) or len(set(values)) == 1):
        return replace(share(list(values)[:n]), n=len(values))
    return mean(values, pictures)


def transformed(figure: Estimate, how: Callable[[float], float]) -> Estimate:
    """The figure under a growing function: of a mean logarithm, the ratio."""
    return Estimate(how(figure.value), how(figure.low), how(figure.high), figure.n)


def _clustered(
    values: Sequence[float] | np.ndarray, pictures: Sequence[Hashable]
) -> tuple[np.ndarray, np.ndarray, int]:
    array: np.ndarray = np.asarray(values, np.float64)
    numbers = {picture: i for i, picture in enumerate(dict.fromkeys(pictures))}
    return array, np.array([numbers[picture] for picture in pictures], np.int64), len(numbers)


def _draws(count: int) -> np.ndarray:
    """How often each of `count` pictures is drawn, [DRAWS, count]; the same at every run."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=DRAWS)


def _figure(value: float, draws: np.ndarray, values: np.ndarray, pictures: int) -> Estimate:
    n = len(values)
    if (values == values[0]).all():
        return Estimate(value, value, value, n)
    if pictures == 1:
        return Estimate(value, math.nan, math.nan, n)
    low, high = (value + (float(end) - value) * _wider(pictures) for end in np.quantile(draws, (0.025, 0.975)))
    if values.min() >= 0:  # a divergence, a distance, a share: what is never negative is not so on average
        low, high = max(0.0, low), min(high, 1.0) if values.max() <= 1 else high
    return Estimate(value, min(value, low), max(value, high), n)


def _wider(pictures: int) -> float:
    """How much further out Student's t of so many pictures has its ends, and the spread that a bootstrap misses."""
    z, v = _Z, pictures - 1  # the series of Cornish and Fisher; too short for two pictures, 9.7 where it should be 12.7
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return t / z * math.sqrt(pictures / v)
