"""The memory of a run by arithmetic, against the tensors of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_checkpoints import a_batch, a_recipe

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.presets import PRESETS
from molmo_edge.training.memory import parameter_counts, run_memory
from molmo_edge.training.optimizer import Optimizer
from molmo_edge.training.parallel import world
from molmo_edge.training.trainer import build


def test_it_is_what_the_tensors_of_a_run_take(small_molmoe: Path) -> None:
    config = read_config(small_molmoe)
    for frozen in ((), ("vision",)):
        recipe = a_recipe(frozen=frozen)
        with world("cpu") as here:
            model = build(config, open_tensors(small_molmoe), "start", recipe, here)
            optimizer = Optimizer(model, recipe.optimizer)
            model(a_batch(small_molmoe)).cross_entropy.backward()
            optimizer.step(1, 10)
        found = run_memory(config, frozen=frozen)
        parameters = dict(model.named_parameters())
        assert {name.removeprefix("molmo."): p.numel() for name, p in parameters.items()} == parameter_counts(config)
        assert found.weights == sum(p.nbytes for p in parameters.values())
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        assert found.gradients == sum(p.nbytes for p in trained.values())
        assert found.states == sum(state.nbytes for state in optimizer.states().values())
        assert found.teacher == found.gathered == found.rounded == 0


def test_molmo_7b_to_molmoe() -> None:
    """The table in docs/training.md."""
    student, teacher = PRESETS["molmoe-1b"], PRESETS["molmo-7b-d"]
    table = {
        (gpus, states): run_memory(student, teacher, gpus=gpus, states=states)
        for gpus, states in ((1, "8bit"), (2, "8bit"), (4, "fp32"), (8, "fp32"))
    }
    gigabytes = {key: round(memory.total / 1e9) for key, memory in table.items()}
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
    for (gpus, states), total in gigabytes.items():
        memory = table[gpus, states]
        parts = (memory.weights + memory.gradients, memory.states, memory.teacher, memory.gathered)
        row = " | ".join(f"{part / 1e9:.1f}" for part in parts)
        assert f"| {gpus} | {states} | {row} | {total} |" in text
    assert run_memory(student, gpus=4).total < table[4, "fp32"].total, "with a cache"
    alone = run_memory(student)
    assert alone.weights + alone.gradients == pytest.approx(57.4e9, rel=0.02)
