"""Intervals that can be worked out by hand, and what a bootstrap over pictures must not forget."""

from __future__ import annotations

import math

import numpy as np
import pytest

from molmo_edge.evaluation.runs import average
from molmo_edge.evaluation.stats import mean, quantile, share, transformed


def test_wilson_is_not_sure_after_ten_of_ten() -> None:
    z2 = 1.959963984540054**2
    assert share([True] * 10).low == pytest.approx(10 / (10 + z2))
    assert share([True] * 10).high == 1
    assert share([False] * 10).high == pytest.approx(z2 / (10 + z2))
    half = share([True, False] * 20)
    assert (
        half.value == 0.5 and half.low == pytest.approx(0.352, abs=1e-3) and half.high == pytest.approx(0.648, abs=1e-3)
    )


def test_nothing_has_no_value() -> None:
    assert math.isnan(share([]).value) and math.isnan(mean([], []).value) and math.isnan(quantile([], [], 0.5).value)


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
    assert found.low <= found.value <= found.high and found.high - found.low < 60


def test_a_ratio_keeps_its_ends_in_order() -> None:
    ratio = transformed(mean([0.0, 0.2], "ab"), math.exp)
    assert ratio.low == 1 and ratio.value == pytest.approx(math.exp(0.1)) and ratio.high == pytest.approx(math.exp(0.2))


def test_scores_that_are_all_alike_are_in_doubt_by_their_pictures() -> None:
    found = average([1.0] * 12, [f"{i // 3}" for i in range(12)])
    assert found.n == 12 and found.low == pytest.approx(share([True] * 4).low)
    mixed = average([1.0, 0.0, 1.0, 0.0], "aabb")
    assert mixed.low == mixed.value == mixed.high == 0.5, "each picture has one right and one wrong answer"
