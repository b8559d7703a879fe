"""A teacher's targets on disk: as good as the teacher, bound to it, and refused when damaged or foreign."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_checkpoints import a_recipe, spelled, write_checkpoint
from training_run import Noise

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.data.examples import Annotation, Example
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.training.alignment import aligned
from molmo_edge.training.distillation import DistillConfig, DistillError, TeacherTargets
from molmo_edge.training.encoding import Encoder, Encoding
from molmo_edge.training.forward import ForwardConfig
from molmo_edge.training.parallel import world
from molmo_edge.training.recipe import Recipe
from molmo_edge.training.run_checkpoints import completed_steps
from molmo_edge.training.taught_run import open_teacher
from molmo_edge.training.teacher import second_encoding
from molmo_edge.training.teacher_cache import open_targets
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


def step(
    student: Path, teacher: Path, out: Path, cache: Path | None, used: Recipe, data: Data = DATA
) -> dict[str, float]:
    """The figures of one step."""
    config, tokenizer = read_config(student), Tokenizer.from_file(student / "tokenizer.json")
    with world("cpu") as here:
        targets = open_teacher(teacher, config, tokenizer, data, used, here, cache=cache)
        model = build(config, open_tensors(student), "student", used, here, teacher=read_config(teacher))
        trainer = Trainer(model, tokenizer, data, used, out, here, None, targets)
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


def test_a_cache_pass_reports_and_begins_where_the_run_continues(
    small_molmoe: Path,
    teacher: Path,
    tmp_path: Path,
    cache: tuple[Path, dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("molmo_edge.training.teacher_cache.LOG_EVERY", 1e-9)
    config, tokenizer = read_config(small_molmoe), Tokenizer.from_file(small_molmoe / "tokenizer.json")
    for root, steps, expected in ((cache[0] / "targets", 0, "0 sequences computed, 8 found"), (tmp_path, 1, "4 seq")):
        caplog.clear()
        with world("cpu") as here, caplog.at_level("INFO"):
            open_teacher(teacher, config, tokenizer, DATA, recipe(), here, cache=root, step=steps)
        assert expected in caplog.messages[-1]
        assert caplog.messages[-1].startswith(f"teacher: {4 - 2 * steps} of {4 - 2 * steps} batches")
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4, "of the second step"


def test_the_steps_of_a_run_are_those_of_its_latest_whole_checkpoint(tmp_path: Path) -> None:
    with world("cpu") as here:
        assert completed_steps(tmp_path, here) == 0
        for name in ("step-00000004", "step-00000012", "step-00000016.part"):
            (tmp_path / "checkpoints" / name).mkdir(parents=True)
        assert completed_steps(tmp_path, here) == 12


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


# --- a teacher with other inputs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose tokenizer needs more tokens for the same text."""
    folder = write_checkpoint(tmp_path_factory.mktemp("speller") / "dense", "dense", seed=1)
    own = spelled(Tokenizer.from_file(folder / "tokenizer.json"))
    (folder / "tokenizer.json").write_text(own.definition, encoding="utf-8")
    return folder


class LongAndShort:
    """Every other question is long."""

    name = "long and short"

    def __len__(self) -> int:
        return 6

    def example(self, index: int, _rng: np.random.Generator) -> Example:
        picture = np.random.default_rng(index).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        return Example(picture, (Annotation("demo", ("two red dogs " * (1 + 9 * (index % 2)), f"a cup {index}")),))


def test_an_example_too_long_for_the_teacher_is_replaced_in_both_ways(
    small_molmoe: Path, speller: Path, tmp_path: Path
) -> None:
    data, long = Data([LongAndShort()], [1.0]), LongAndShort().example(1, np.random.default_rng(0))
    lengths = []
    for folder in (small_molmoe, speller):
        tokenizer, config = Tokenizer.from_file(folder / "tokenizer.json"), read_config(folder)
        lengths.append(len(Encoder(tokenizer, recipe().image(config), Encoding())(long, np.random.default_rng(0))))
    assert lengths[0] + 30 < lengths[1]
    used = recipe(encoding=Encoding(sequence=lengths[0] + 5), steps=3)
    online = step(small_molmoe, speller, tmp_path / "online", None, used, data)
    for n in range(2):
        cached = step(small_molmoe, speller, tmp_path / f"cached {n}", tmp_path / "targets", used, data)
        for name in ("loss", "divergence", "hidden_loss", "image_loss"):
            assert cached[name] == pytest.approx(online[name], rel=2e-3), name


@pytest.mark.parametrize("none_in", [1, 2])
def test_sequences_without_anything_to_compare(
    small_molmoe: Path, speller: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, none_in: int
) -> None:
    """none_in 1: no sequence has pairs; 2: every other one has none."""

    def some(*runs: Any) -> np.ndarray:
        text = next(iter(runs[0].values())).text
        return np.zeros((0, 2), np.int64) if sum(text) % none_in == 0 else aligned(*runs)

    monkeypatch.setattr("molmo_edge.training.teacher.aligned", some)
    used = recipe(micro=1)
    online = step(small_molmoe, speller, tmp_path / "online", None, used)
    assert (online["divergence"] == 0) == (online["hidden_loss"] == 0) == (none_in == 1)
    cached = step(small_molmoe, speller, tmp_path / "cached", tmp_path / "targets", used)
    for name in ("loss", "divergence", "hidden_loss", "image_loss"):
        assert cached[name] == pytest.approx(online[name], rel=2e-3), name


def test_another_reading_of_the_teacher_has_files_of_its_own(
    small_molmoe: Path, teacher: Path, speller: Path, tmp_path: Path
) -> None:
    def folders(of: Path, *recipes: Recipe) -> int:
        found = set()
        for used in recipes:
            config, tokenizer = read_config(small_molmoe), Tokenizer.from_file(small_molmoe / "tokenizer.json")
            theirs = Tokenizer.from_file(of / "tokenizer.json")
            second = second_encoding(read_config(of), theirs, config, tokenizer, used)
            assert used.distill is not None
            cache = open_targets(tmp_path, "teacher", used.distill, config, tokenizer.definition, second)
            found.add(cache.directory)
        return len(found)

    readings = (recipe(), recipe(max_crops=2), recipe(encoding=Encoding(sequence=64)))
    assert folders(speller, *readings) == 3
    assert folders(teacher, *readings) == 1, "the files are named by what the teacher reads"
    settings = [
        DistillConfig(divergence=0.0, hidden=1.0, **changes) for changes in ({}, {"top_k": 4}, {"temperature": 2})
    ]
    assert folders(teacher, *(recipe(distill=one) for one in settings)) == 1, "nothing is compared with either"


def test_large_states_keep_their_direction(small_molmoe: Path, tmp_path: Path) -> None:
    config, tokenizer = read_config(small_molmoe), Tokenizer.from_file(small_molmoe / "tokenizer.json")
    sample = Encoder(tokenizer, recipe().image(config), Encoding())(
        LongAndShort().example(0, np.random.default_rng(0)), np.random.default_rng(0)
    )
    cache, m = open_targets(tmp_path, "t", CONFIG, config, tokenizer.definition, None), sample.answered
    states, cells = torch.randn(m, 2, 16) * 1e6, torch.randn(4, 16) * 1e-6
    zeros = torch.zeros(0, 0)
    targets = TeacherTargets(
        torch.zeros(m, 9), torch.zeros(m, 8, dtype=torch.long), torch.ones(m), states, cells, zeros, zeros, zeros
    )
    cache.write(cache.path(sample), targets)
    found = cache.read(sample)
    for before, after in ((states, found.hidden), (cells, found.cells)):
        assert torch.cosine_similarity(before, after, dim=-1).min() > 0.9999


def test_what_cannot_be_cached(small_molmoe: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="set top_k"):
        step(small_molmoe, teacher, tmp_path, tmp_path, recipe(distill=DistillConfig(top_k=0)))
