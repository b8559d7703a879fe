"""Intervals computed by hand, and properties of the bootstrap over images."""

from __future__ import annotations

import math

import numpy as np
import pytest

from molmo_edge.evaluation.stats import Estimate, mean, proportion, quantile, score_mean, transformed


def test_wilson_intervals() -> None:
    z2 = 1.959963984540054**2
    assert proportion([True] * 10).low == pytest.approx(10 / (10 + z2))
    assert proportion([True] * 10).high == 1
    assert proportion([False] * 10).high == pytest.approx(z2 / (10 + z2))
    half = proportion([True, False] * 20)
    assert half.value == 0.5
    assert half.low == pytest.approx(0.352, abs=1e-3)
    assert half.high == pytest.approx(0.648, abs=1e-3)


def test_no_samples_give_nan() -> None:
    assert math.isnan(proportion([]).value)
    assert math.isnan(mean([], []).value)
    assert math.isnan(quantile([], [], 0.5).value)


def test_the_samples_for_a_narrower_interval() -> None:
    """A tenth of the width takes a hundred times the samples."""
    assert Estimate(0.2, 0.1, 0.3, 40).samples_for(0.01) == pytest.approx(4000, abs=1)
    values = np.random.default_rng(1).normal(size=4000)
    few, many = mean(values[:500], range(500)), mean(values, range(4000))
    assert few.samples_for((many.high - many.low) / 2) == pytest.approx(4000, rel=0.3)
    assert Estimate(0.2, 0.2, 0.2, 40).samples_for(0.01) is None
    assert Estimate(0.2, math.nan, math.nan, 40).samples_for(0.01) is None


def test_equal_values_have_an_interval_of_no_width() -> None:
    found = mean([0.0] * 6, "aabbcc")
    assert (found.value, found.low, found.high, found.n) == (0, 0, 0, 6)


def test_the_interval_of_a_mean_depends_on_the_number_of_images() -> None:
    values = np.random.default_rng(0).normal(size=200)
    alone = mean(values, range(200))
    width = 2 * 1.96 * values.std() / math.sqrt(200)
    assert alone.high - alone.low == pytest.approx(width, rel=0.15)
    # Repeating the value of each image adds no information.
    repeated = mean(np.repeat(values, 10), np.repeat(np.arange(200), 10).tolist())
    assert (repeated.value, repeated.low, repeated.high) == pytest.approx((alone.value, alone.low, alone.high))
    assert repeated.n == 2000


def test_the_interval_of_a_quantile_contains_it() -> None:
    values = np.arange(1000.0)
    found = quantile(values, (np.arange(1000) % 100).tolist(), 0.9)
    assert found.value == pytest.approx(899.1)
    assert found.low <= found.value <= found.high
    assert found.high - found.low < 60


def test_a_ratio_keeps_its_ends_in_order() -> None:
    ratio = transformed(Estimate(0.1, 0.0, 0.2, 7), math.exp)
    assert (ratio.low, ratio.value, ratio.high, ratio.n) == (1, math.exp(0.1), math.exp(0.2), 7)


def test_equal_scores_have_wilsons_interval_for_the_number_of_images() -> None:
    found = score_mean([1.0] * 12, [f"{i // 3}" for i in range(12)])
    assert found.n == 12
    assert found.low == pytest.approx(proportion([True] * 4).low)
    mixed = score_mean([1.0, 0.0, 1.0, 1.0], "aabb")
    assert mixed.low < 0.5 < mixed.value == 0.75 < mixed.high


def test_one_image_has_no_interval() -> None:
    alone = mean([0.1, 0.5, 0.2], "aaa")
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
    assert alone.n == 3
    equal = mean([0.0, 0.0], "aa")
    assert equal.low == equal.high == 0, "unless all values are equal"


def test_intervals_stay_in_the_range_of_the_values() -> None:
    found = mean([0.0, 0.0, 0.0, 0.9], "abcd")
    assert found.low == 0
    assert found.high <= 1
    assert mean([0.0, 0.0, 0.0, 9.0], "abcd").high > 5
    assert mean([0.1, -0.1, 0.3], "abc").low < 0


@pytest.mark.parametrize(("images", "least"), [(3, 0.85), (5, 0.88), (12, 0.9), (40, 0.92)])
def test_intervals_have_about_the_nominal_coverage(images: int, least: float) -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        found = mean(rng.normal(size=images), range(images))
        held += found.low <= 0 <= found.high
    assert least <= held / 300 <= 0.99


def test_few_images_widen_the_interval_by_students_t() -> None:
    """The bootstrap's ends are -1 and 1; t is 12.7 for one degree of freedom."""
    found = mean([-1.0, 1.0], "ab")
    assert found.high == -found.low == pytest.approx(12.706 / 1.960 * math.sqrt(2), rel=1e-3)
