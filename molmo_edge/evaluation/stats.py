"""Estimates with 95 % confidence intervals: a bootstrap clustered by image, and Wilson's interval for proportions.

Questions about the same image are correlated, so the bootstrap resamples images, not questions or tokens. With few
images a percentile bootstrap is too narrow: its ends are scaled by Student's t and by the bias of the standard
deviation. With a single image the ends are NaN, unless all values are equal. SciPy's own bootstrap is not clustered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy.special import ndtri, stdtrit

N_RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A value, its 95 % confidence interval, and the number of samples."""

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        """For JSON: value, low, high and n."""
        return asdict(self)

    def interval(self, number: Callable[[float], str]) -> str:
        """ "[low, high]", "" for an interval of width 0, "[?]" for an unknown one; `number` formats the ends."""
        if self.low == self.high:
            return ""
        return "[?]" if math.isnan(self.low) else f"[{number(self.low)}, {number(self.high)}]"

    def format(self, number: Callable[[float], str]) -> str:
        """ "value [low, high]"."""
        return f"{number(self.value)} {self.interval(number)}".rstrip()

    def samples_for(self, half_width: float) -> int | None:
        """The samples, with as many for each image, with which an interval like this one is +- `half_width` wide.

        An interval narrows with the square root of the number of samples. None if it is unknown or has no width.
        """
        width = self.high - self.low
        return math.ceil(self.n * (width / (2 * half_width)) ** 2) if width > 0 else None


EMPTY = Estimate(math.nan, math.nan, math.nan, 0)


def proportion(flags: Sequence[bool | float]) -> Estimate:
    """The share of true `flags`, with Wilson's interval, which stays wide at 0 of n and at n of n."""
    from scipy.stats import binomtest  # takes a second

    if not flags:
        return EMPTY
    p = float(np.mean(np.asarray(flags, np.float64)))
    interval = binomtest(int(sum(flags)), len(flags)).proportion_ci(method="wilson")
    # Rounding can put an end on the wrong side of a p of exactly 0 or 1.
    return Estimate(p, min(p, float(interval.low)), max(p, float(interval.high)), len(flags))


def mean(values: Sequence[float] | np.ndarray, images: Sequence[Hashable]) -> Estimate:
    """The mean of `values`; `images` names the image of each."""
    array, index, count = _clusters(values, images)
    if not len(array):
        return EMPTY
    sums, sizes = np.bincount(index, array, count), np.bincount(index, minlength=count)
    weights = _resample(count)  # [N_RESAMPLES, images]
    return _estimate(float(array.mean()), (weights @ sums) / np.maximum(weights @ sizes, 1), array, count)


def quantile(values: Sequence[float] | np.ndarray, images: Sequence[Hashable], q: float) -> Estimate:
    """The `q`-quantile of `values`, 0 to 1; `images` names the image of each."""
    array, index, count = _clusters(values, images)
    if not len(array):
        return EMPTY
    order = np.argsort(array)
    ordered, index = array[order], index[order]
    resampled = []
    for weights in _resample(count):
        cumulative = np.cumsum(weights[index])
        resampled.append(ordered[min(int(np.searchsorted(cumulative, q * cumulative[-1])), len(ordered) - 1)])
    return _estimate(float(np.quantile(array, q)), np.array(resampled), array, count)


def score_mean(values: Sequence[float], images: Sequence[Hashable]) -> Estimate:
    """Like `mean`, with Wilson's interval for 0/1 values where a bootstrap has none: one per image, or all equal.

    Wilson's sample size is then the number of images.
    """
    n = len(set(images))
    if set(values) <= {0.0, 1.0} and (n == len(values) or len(set(values)) == 1):
        return replace(proportion(list(values)[:n]), n=len(values))
    return mean(values, images)


def transformed(estimate: Estimate, function: Callable[[float], float]) -> Estimate:
    """The estimate under an increasing function, for example from a mean log ratio to a ratio."""
    return Estimate(function(estimate.value), function(estimate.low), function(estimate.high), estimate.n)


def _clusters(values: Sequence[float] | np.ndarray, images: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray, int]:
    """The values, the cluster index of each, and the number of clusters."""
    numbers = {image: i for i, image in enumerate(dict.fromkeys(images))}
    return np.asarray(values, np.float64), np.array([numbers[image] for image in images], np.int64), len(numbers)


def _resample(count: int) -> np.ndarray:
    """How often each of `count` images is drawn, [N_RESAMPLES, count]. Seeded: the same in every run."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=N_RESAMPLES)


def _estimate(value: float, resampled: np.ndarray, values: np.ndarray, images: int) -> Estimate:
    n = len(values)
    if (values == values[0]).all():
        return Estimate(value, value, value, n)
    if images == 1:
        return Estimate(value, math.nan, math.nan, n)
    widen = stdtrit(images - 1, 0.975) / ndtri(0.975) * math.sqrt(images / (images - 1))
    low, high = (value + (float(end) - value) * widen for end in np.quantile(resampled, (0.025, 0.975)))
    if values.min() >= 0:  # the mean of values in [0, inf) or [0, 1] stays in that range
        low, high = max(0.0, low), min(high, 1.0) if values.max() <= 1 else high
    return Estimate(value, min(value, low), max(value, high), n)
