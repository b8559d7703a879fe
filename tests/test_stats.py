"""Intervals that can be worked out by hand, and what a bootstrap over pictures must not forget."""

from __future__ import annotations

import math

import numpy as np
import pytest

from molmo_edge.evaluation.stats import Estimate, mean, proportion, quantile, score_mean, transformed


def test_wilson_is_not_sure_after_ten_of_ten() -> None:
    z2 = 1.959963984540054**2
    assert proportion([True] * 10).low == pytest.approx(10 / (10 + z2))
    assert proportion([True] * 10).high == 1
    assert proportion([False] * 10).high == pytest.approx(z2 / (10 + z2))
    half = proportion([True, False] * 20)
    assert half.value == 0.5
    assert half.low == pytest.approx(0.352, abs=1e-3)
    assert half.high == pytest.approx(0.648, abs=1e-3)


def test_nothing_has_no_value() -> None:
    assert math.isnan(proportion([]).value)
    assert math.isnan(mean([], []).value)
    assert math.isnan(quantile([], [], 0.5).value)


def test_equal_values_have_no_doubt() -> None:
    found = mean([0.0] * 6, "aabbcc")
    assert (found.value, found.low, found.high, found.n) == (0, 0, 0, 6)


def test_the_interval_of_a_mean_is_that_of_its_pictures() -> None:
    values = np.random.default_rng(0).normal(size=200)
    alone = mean(values, range(200))
    width = 2 * 1.96 * values.std() / math.sqrt(200)
    assert alone.high - alone.low == pytest.approx(width, rel=0.15)
    # Each picture's value ten times over is no more knowledge.
    repeated = mean(np.repeat(values, 10), np.repeat(np.arange(200), 10).tolist())
    assert (repeated.value, repeated.low, repeated.high) == pytest.approx((alone.value, alone.low, alone.high))
    assert repeated.n == 2000


def test_the_interval_of_a_quantile_holds_it() -> None:
    values = np.arange(1000.0)
    found = quantile(values, (np.arange(1000) % 100).tolist(), 0.9)
    assert found.value == pytest.approx(899.1)
    assert found.low <= found.value <= found.high
    assert found.high - found.low < 60


def test_a_ratio_keeps_its_ends_in_order() -> None:
    ratio = transformed(Estimate(0.1, 0.0, 0.2, 7), math.exp)
    assert (ratio.low, ratio.value, ratio.high, ratio.n) == (1, math.exp(0.1), math.exp(0.2), 7)


def test_scores_that_are_all_alike_are_in_doubt_by_their_pictures() -> None:
    found = score_mean([1.0] * 12, [f"{i // 3}" for i in range(12)])
    assert found.n == 12
    assert found.low == pytest.approx(proportion([True] * 4).low)
    mixed = score_mean([1.0, 0.0, 1.0, 1.0], "aabb")
    assert mixed.low < 0.5 < mixed.value == 0.75 < mixed.high


def test_one_picture_tells_no_interval_and_few_tell_a_wide_one() -> None:
    alone = mean([0.1, 0.5, 0.2], "aaa")
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
    assert alone.n == 3
    equal = mean([0.0, 0.0], "aa")
    assert equal.low == equal.high == 0, "nothing lost is nothing lost"


def test_what_is_never_negative_is_not_so_on_score_mean() -> None:
    found = mean([0.0, 0.0, 0.0, 0.9], "abcd")
    assert found.low == 0
    assert found.high <= 1
    assert mean([0.0, 0.0, 0.0, 9.0], "abcd").high > 5
    assert mean([0.1, -0.1, 0.3], "abc").low < 0


@pytest.mark.parametrize(("pictures", "least"), [(3, 0.85), (5, 0.88), (12, 0.9), (40, 0.92)])
def test_intervals_hold_the_truth_about_as_often_as_they_say(pictures: int, least: float) -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        found = mean(rng.normal(size=pictures), range(pictures))
        held += found.low <= 0 <= found.high
    assert least <= held / 300 <= 0.99


def test_few_images_widen_the_interval_by_students_t() -> None:
    """Two images of means 0 and 1: the bootstrap's ends are 0 and 1, t with one degree of freedom is 12.7."""
    found = mean([-1.0, 1.0], "ab")
    assert found.high == -found.low == pytest.approx(12.706 / 1.960 * math.sqrt(2), rel=1e-3)
