"""A teacher's targets on disk: as good as the teacher, bound to it, and refused when damaged or foreign."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from small_checkpoints import a_recipe, write_checkpoint
from training_run import Noise

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.training.distillation import DistillConfig, DistillError
from molmo_edge.training.forward import ForwardConfig
from molmo_edge.training.parallel import world
from molmo_edge.training.recipe import Recipe
from molmo_edge.training.taught_run import open_teacher
from molmo_edge.training.telemetry import Window
from molmo_edge.training.trainer import Data, Trainer, build

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = DistillConfig(top_k=8, hidden=0.5, image=0.5)
DATA = Data([Noise("noise", 6, 2)], [1.0])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("teacher") / "dense", "dense", seed=1)


def recipe(**changes: Any) -> Recipe:
    forward = ForwardConfig(answer_dropout=0.0, recompute=False)
    return a_recipe(**{"forward": forward, "distill": CONFIG, "steps": 2, **changes})


def step(student: Path, teacher: Path, out: Path, cache: Path | None, used: Recipe) -> dict[str, float]:
    """The figures of one step."""
    config, tokenizer = read_config(student), Tokenizer.from_file(student / "tokenizer.json")
    with world("cpu") as here:
        targets = open_teacher(teacher, config, tokenizer, DATA, used, here, cache=cache)
        model = build(config, open_tensors(student), "student", used, here, teacher=read_config(teacher))
        trainer = Trainer(model, tokenizer, DATA, used, out, here, None, targets)
        batches = trainer.batches()
        values, _, _ = trainer.update([next(batches) for _ in range(trainer.share.steps)], Window(1.0))
    return values


@pytest.fixture(scope="module")
def cache(small_molmoe: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("cache")
    return folder, step(small_molmoe, teacher, folder / "run", folder / "targets", recipe())


def files(cache: Path) -> list[Path]:
    return sorted((cache / "targets").rglob("*.safetensors"))


def test_cached_targets_are_those_of_the_teacher(
    small_molmoe: Path, teacher: Path, tmp_path: Path, cache: tuple[Path, dict[str, float]]
) -> None:
    online = step(small_molmoe, teacher, tmp_path, None, recipe())
    for name in ("loss", "divergence", "hidden_loss", "image_loss", "norm_connector", "norm_decoder"):
        assert cache[1][name] == pytest.approx(online[name], rel=2e-3), name
    assert len(files(cache[0])) == 8, "2 steps of 4 sequences"


def test_only_what_is_missing_is_computed(
    small_molmoe: Path, teacher: Path, cache: tuple[Path, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = {path: path.stat().st_mtime_ns for path in files(cache[0])}
    monkeypatch.setattr("molmo_edge.training.taught_run.build_teacher", None)  # it is not opened
    step(small_molmoe, teacher, cache[0] / "again", cache[0] / "targets", recipe())
    assert {path: path.stat().st_mtime_ns for path in files(cache[0])} == written


def test_another_teacher_or_setting_has_files_of_its_own(
    small_molmoe: Path, teacher: Path, tmp_path: Path, cache: tuple[Path, dict[str, float]]
) -> None:
    shutil.copytree(cache[0] / "targets", tmp_path / "targets")
    assert len(list((tmp_path / "targets").iterdir())) == 1
    step(small_molmoe, teacher, tmp_path / "run", tmp_path / "targets", recipe(distill=DistillConfig(top_k=4), steps=1))
    assert len(list((tmp_path / "targets").iterdir())) == 2


def test_damaged_and_foreign_files_are_refused(
    small_molmoe: Path, teacher: Path, tmp_path: Path, cache: tuple[Path, dict[str, float]]
) -> None:
    shutil.copytree(cache[0] / "targets", tmp_path / "targets")
    for path in files(tmp_path):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DistillError, match=r"\.safetensors is damaged .*: delete it"):
        step(small_molmoe, teacher, tmp_path / "run", tmp_path / "targets", recipe())
    whole = files(cache[0])[0].read_bytes()
    for path in files(tmp_path):
        path.write_bytes(whole)
    with pytest.raises(DistillError, match="belongs to another teacher, setting or sequence: delete it"):
        step(small_molmoe, teacher, tmp_path / "run", tmp_path / "targets", recipe())


def test_what_cannot_be_cached(small_molmoe: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="set top_k"):
        step(small_molmoe, teacher, tmp_path, tmp_path, recipe(distill=DistillConfig(top_k=0)))
