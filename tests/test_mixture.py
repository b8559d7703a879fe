"""The order of samples: has the given rates, shows each example once per epoch, and is independent of sharding."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from molmo_edge.config import ImageConfig
from molmo_edge.data.examples import Annotation, Example
from molmo_edge.data.mixture import Group, MixtureError, Order, mixture_rates
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.training.encoding import Encoder, Encoding
from molmo_edge.training.guard import DivergedError, Guard
from molmo_edge.training.loader import DataError, MicroBatches, Samples, Share, open_loader
from molmo_edge.training.optimizer import OptimizerConfig, Rate, part_of, rate_at
from molmo_edge.training.recipe import CAPTION, MULTITASK, RecipeError, recipe_for

GOLDEN = Path(__file__).parent / "golden"


def draws(order: Order, count: int) -> list[tuple[int, int, int, int]]:
    return [tuple(draw) for draw in islice(order, count)]


def test_rates_go_with_square_roots_inside_of_groups() -> None:
    groups = [Group(0.6, {"a": None, "b": 400}), Group(0.4, {"c": None, "missing": None})]
    rates = mixture_rates(groups, {"a": 100, "b": 10_000, "c": 7})
    assert rates == pytest.approx({"a": 0.6 * 10 / 30, "b": 0.6 * 20 / 30, "c": 0.4})
    with pytest.raises(MixtureError, match="none of the mixture"):
        mixture_rates(groups, {"other": 3})


def test_the_papers_mixture() -> None:
    assert sum(group.rate for group in MULTITASK.mixture) == pytest.approx(1.0)
    names = [name for group in MULTITASK.mixture for name in group.sizes]
    assert len(names) == len(set(names)) == 32
    from molmo_edge.data.catalog import known

    assert set(names) <= set(known())
    assert set(CAPTION.mixture[0].sizes) <= set(known())


def test_every_example_comes_once_an_epoch() -> None:
    order = Order([5, 8], [0.5, 0.5], seed=3)
    seen: dict[tuple[int, int], list[int]] = {}
    for _, source, index, epoch in draws(order, 100):
        seen.setdefault((source, epoch), []).append(index)
    for (source, epoch), indices in seen.items():
        assert len(set(indices)) == len(indices)
        if (source, epoch + 1) in seen:
            assert sorted(indices) == list(range([5, 8][source]))
    assert seen[0, 0] != seen[0, 1], "another order in the next epoch"


def test_rates_are_kept() -> None:
    sources = [source for _, source, _, _ in draws(Order([50, 9000, 7], [0.2, 0.7, 0.1], seed=0), 20_000)]
    np.testing.assert_allclose(np.bincount(sources) / len(sources), [0.2, 0.7, 0.1], atol=0.01)


@pytest.mark.parametrize("first", [1, 4095, 4096, 9000])
def test_an_order_can_be_taken_up_anywhere(first: int) -> None:
    whole = draws(Order([50, 900], [0.3, 0.7], seed=1), first + 20)
    assert draws(Order([50, 900], [0.3, 0.7], seed=1, first=first), 20) == whole[first:]


def test_ranks_share_every_step_among_them() -> None:
    order = Order([50, 90], [0.3, 0.7], seed=1)
    whole = [draw for batch in MicroBatches(order, Share(8, 2), 0, 6) for draw in batch]
    parts = [list(MicroBatches(order, Share(8, 2, rank, 2), 0, 6)) for rank in range(2)]
    assert [len(p) for p in parts] == [12, 12]
    together = []
    for step in range(6):
        for part in parts:
            together += [draw for batch in part[2 * step : 2 * step + 2] for draw in batch]
    assert together == whole
    late = [draw for batch in MicroBatches(order, Share(8, 2), 4, 6) for draw in batch]
    assert late == whole[32:]
    with pytest.raises(DataError, match="not a multiple"):
        Share(10, 2, 0, 2)


@dataclass(frozen=True)
class Words:
    damaged: frozenset[int] = frozenset()
    name: str = "words"

    def __len__(self) -> int:
        return 30

    def example(self, index: int, rng: np.random.Generator) -> Example:
        if index in self.damaged:
            raise MolmoEdgeError("its picture is gone")
        return Example(None, (Annotation("demo", (f"What is {index}?", f"It is {rng.integers(100)}.")),))


def loaded(data: Words, workers: int) -> tuple[list[list[int]], list[str]]:
    encoder = Encoder(Tokenizer.from_file(GOLDEN / "molmoe" / "tokenizer.json"), ImageConfig(), Encoding())
    batches = open_loader(
        Samples([data], encoder, 5), Order([30], [1.0], 5), Share(4, 2), step=2, steps=9, workers=workers
    )
    ids, replaced = [], []
    for one in batches:
        ids += one.batch.ids.tolist()
        replaced += one.replaced
    return ids, replaced


def test_workers_change_nothing_and_damage_is_replaced() -> None:
    clean, none = loaded(Words(), 0)
    assert not none
    assert len(clean) == 7 * 4
    assert loaded(Words(), 2)[0] == clean
    damaged = Words(frozenset({3, 4}))
    mended, replaced = loaded(damaged, 0)
    assert loaded(damaged, 2) == (mended, replaced)
    assert len(mended) == len(clean)
    assert {r.split(":")[0] for r in replaced} == {"words 3", "words 4"}
    drawn = [index in damaged.damaged for _, _, index, _ in draws(Order([30], [1.0], 5, first=8), 28)]
    assert [a != b for a, b in zip(clean, mended, strict=True)] == drawn, "the others stay as they are"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_keeps_its_own_message(workers: int) -> None:
    with pytest.raises(DataError) as raised:
        loaded(Words(frozenset(range(30))), workers)
    assert str(raised.value).startswith("20 examples in a row")
    assert "\n" not in str(raised.value)
    assert "words" in str(raised.value)
    assert "Traceback" not in str(raised.value)


FAILING_WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
import test_mixture as t
from molmo_edge.training.loader import Samples, Share, open_loader, start

class Broken(t.Words):
    def example(self, index, rng):
        raise KeyError("a fault of the data set")

encoder = t.Encoder(t.Tokenizer.from_file(t.GOLDEN / "molmoe" / "tokenizer.json"), t.ImageConfig(), t.Encoding())
samples = Samples([Broken()], encoder, 5)
batches = start(open_loader(samples, t.Order([30], [1.0], 5), Share(4, 2), step=0, steps=9, workers=1))
next(batches)
"""


def test_a_run_whose_worker_fails_exits() -> None:
    command = [sys.executable, "-c", FAILING_WORKER, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "a fault of the data set" in done.stderr
    assert "is killed by signal" not in done.stderr, "the end of the workers is no error of its own"


# --- schedules, parts, guard ------------------------------------------------------------------------------------------


def test_schedule_is_the_references() -> None:
    rate = Rate(2e-4, 200)
    assert rate_at(rate, 1, 1000, 0.1) == pytest.approx(1e-6)
    assert rate_at(rate, 100, 1000, 0.1) == pytest.approx(1e-4)
    assert rate_at(rate, 200, 1000, 0.1) == pytest.approx(2e-4)
    assert rate_at(rate, 600, 1000, 0.1) == pytest.approx(2e-4 * 0.55)
    assert rate_at(rate, 1000, 1000, 0.1) == pytest.approx(2e-5)
    assert part_of("molmo.decoder.new_embedding") == "connector"
    assert part_of("molmo.vision.pre_ln.weight") == "vision"
    assert OptimizerConfig().clip == 1.0


def test_recipes_differ_by_model_as_in_the_paper() -> None:
    assert recipe_for("multitask", "molmoe-1b").optimizer.decoder.peak == 2e-5
    assert recipe_for("multitask", "molmo-7b-d").optimizer.decoder.peak == 1e-5
    assert recipe_for("multitask", "molmo-72b").steps == 20_000
    assert recipe_for("caption", "molmo-72b").optimizer.decoder.peak == 1e-5
    with pytest.raises(RecipeError, match='"third" is not a stage'):
        recipe_for("third")


def test_the_guard_leaves_out_what_would_do_harm() -> None:
    guard = Guard()
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert guard.judge(2.0 + 0.05 * rng.normal(), [1.0]) is None
    assert "far above" in (guard.judge(4.0, [1.0]) or "")
    assert "norm is nan" in (guard.judge(2.0, [1.0, float("nan"), 1.0]) or "")
    assert "loss is inf" in (guard.judge(float("inf"), [1.0]) or "")
    assert guard.mean == pytest.approx(2.0, abs=0.05)
    assert guard.skipped == 3
    assert Guard(**guard.state()) == guard
    assert guard.judge(2.1, [1.0]) is None
    assert guard.in_a_row == 0
    for _ in range(19):
        guard.judge(float("nan"), [1.0])
    with pytest.raises(DivergedError, match="20 steps in a row"):
        guard.judge(float("nan"), [1.0])
    young = Guard()
    for loss in (2.0, 9.0):
        assert young.judge(loss, [1.0]) is None, "a young run may jump"
