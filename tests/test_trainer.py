"""Runs of the trainer: equal loss curves on one rank and two, uninterrupted and resumed, and nothing lost to a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

RUN = Path(__file__).parent / "training_run.py"
STEPS = 20


def start(checkpoint: Path, directory: Path, *options: str, ranks: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, str(RUN), str(checkpoint), str(directory), *options]
    if ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(checkpoint: Path, directory: Path, *options: str, ranks: int = 1) -> None:
    process = start(checkpoint, directory, *options, ranks=ranks)
    out, _ = process.communicate(timeout=300)
    killed = any(option.startswith("--kill") for option in options)
    expected = 0 if not killed else 1 if ranks > 1 else -signal.SIGKILL  # torchrun says no more than that it failed
    assert process.returncode == expected, out


def curve(directory: Path) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def whole(small_molmoe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    run(small_molmoe, directory)
    assert len(curve(directory)) == STEPS
    return directory


def same(one: Path, other: Path, first: int = 1) -> None:
    a, b = curve(one), curve(other)
    for step in range(first, STEPS + 1):
        for name in ("loss", "z_loss", "norm_connector", "norm_vision", "norm_decoder"):
            assert a[step][name] == pytest.approx(b[step][name], rel=1e-5, abs=1e-6), (step, name)
        assert a[step]["expert_load_max"] == b[step]["expert_load_max"]


def weights(directory: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(directory / "model" / "model.safetensors")


def test_it_learns(whole: Path) -> None:
    log = curve(whole)
    assert log[STEPS]["loss"] < 0.7 * log[1]["loss"]
    assert log[1]["rate_decoder"] == pytest.approx(3e-3 / 5), "a fifth of the way up"
    assert log[STEPS]["utilisation"] > 0
    assert log[STEPS]["tokens_per_second"] > 0


def test_two_ranks_have_the_curve_of_one(small_molmoe: Path, whole: Path, tmp_path: Path) -> None:
    run(small_molmoe, tmp_path, ranks=2)
    same(whole, tmp_path)
    ours = weights(tmp_path)
    for name, expected in weights(whole).items():
        if not name.endswith("wk.bias"):  # a softmax does not see it: its gradient is rounding, which Adam enlarges
            assert np.linalg.norm(ours[name] - expected) <= 2e-4 * np.linalg.norm(expected) + 1e-6, name


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(
    small_molmoe: Path, whole: Path, tmp_path: Path, ranks: int
) -> None:
    run(small_molmoe, tmp_path, "--kill-at", "12")
    assert max(curve(tmp_path)) >= 12
    run(small_molmoe, tmp_path, ranks=ranks)
    same(whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["--experts", "--replicas"])
def test_other_arrangements_have_the_same_curve(small_molmoe: Path, whole: Path, tmp_path: Path, layout: str) -> None:
    """Two shards of experts on two ranks each; two copies of a model that two ranks share."""
    run(small_molmoe, tmp_path, layout, "2", "--kill-at", "12", ranks=4)
    run(small_molmoe, tmp_path)
    same(whole, tmp_path)


@pytest.mark.slow
def test_eight_bit_states_are_taken_up_exactly(small_molmoe: Path, whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    run(small_molmoe, tmp_path / "whole", "--states", "8bit")
    run(small_molmoe, tmp_path / "killed", "--states", "8bit", "--kill-at", "12")
    run(small_molmoe, tmp_path / "killed", "--states", "8bit")
    same(tmp_path / "whole", tmp_path / "killed")
    eight, full = curve(tmp_path / "whole")[STEPS], curve(whole)[STEPS]
    assert eight["loss"] == pytest.approx(full["loss"], rel=0.02)
    assert eight["loss"] != full["loss"]


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written_costs_that_checkpoint_alone(
    small_molmoe: Path, whole: Path, tmp_path: Path
) -> None:
    run(small_molmoe, tmp_path, "--kill-in-save", "10")
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000005", "step-00000010.part"]
    run(small_molmoe, tmp_path)
    same(whole, tmp_path)
    lines = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [*range(1, 11), *range(6, 21)], "resumed from the last complete one"
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000015", "step-00000020"], "the last two are kept"


@pytest.mark.slow
def test_two_ranks_with_cached_features_and_the_attention_loss(small_molmoe: Path, tmp_path: Path) -> None:
    for ranks, name in ((1, "one"), (2, "two")):
        options = ("--pointed", "--features", str(tmp_path / f"features-{name}"), "--validate")
        run(small_molmoe, tmp_path / name, *options, ranks=ranks)
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert one.keys() == two.keys() == set(range(1, STEPS + 1))
    for step, line in one.items():
        for name in ("loss", "attention_loss", "norm_connector", "norm_decoder"):
            assert line[name] == pytest.approx(two[step][name], rel=1e-4), (step, name)
    assert one[STEPS]["attention_loss"] < one[1]["attention_loss"]


@pytest.mark.slow
def test_a_teacher_on_two_ranks_and_after_a_kill(
    small_molmoe: Path, small_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    options = ("--teacher", str(small_checkpoints["dense"]), "--validate")
    run(small_molmoe, tmp_path / "one", *options)
    run(small_molmoe, tmp_path / "two", *options, "--kill-at", "12", ranks=2)
    run(small_molmoe, tmp_path / "two", *options, ranks=2)
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert one.keys() == two.keys() == set(range(1, STEPS + 1))
    for step, line in one.items():
        for name in ("loss", "divergence", "hidden_loss", "image_loss", "norm_connector", "norm_decoder"):
            assert line[name] == pytest.approx(two[step][name], rel=1e-4), (step, name)
    assert one[STEPS]["divergence"] < one[1]["divergence"]


@pytest.mark.slow
def test_each_rank_rounds_its_shards(small_molmoe: Path, tmp_path: Path) -> None:
    """The first steps: a weight between two of sixteen levels turns rounding errors into larger differences later."""
    for ranks, name in ((1, "one"), (2, "two")):
        run(small_molmoe, tmp_path / name, "--qat", "q4", "--steps", "3", ranks=ranks)
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    for step, line in one.items():
        assert line["loss"] == pytest.approx(two[step]["loss"], rel=1e-4), step


@pytest.mark.slow
def test_a_run_is_not_taken_up_with_other_data(small_molmoe: Path, tmp_path: Path) -> None:
    run(small_molmoe, tmp_path, "--steps", "5")
    process = start(small_molmoe, tmp_path, "--few", "8")
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "a run with different settings: data" in out


@pytest.mark.slow
def test_bfloat16_products_keep_float32_weights(small_molmoe: Path, whole: Path, tmp_path: Path) -> None:
    """Also behind a validation, which leaves what belongs to no block gathered."""
    run(small_molmoe, tmp_path, "--precision", "bf16", "--validate", "--steps", "10", ranks=2)
    ours, exact = curve(tmp_path)[1]["loss"], curve(whole)[1]["loss"]
    assert ours == pytest.approx(exact, rel=0.01)
    assert ours != exact
    for name, values in weights(tmp_path).items():
        if values.ndim > 1 and "wte.embedding" not in name and "resblocks.2" not in name:  # not frozen
            rounded = values.view(np.uint32) & 0xFFFF
            assert rounded.any(), f"{name} has no more digits than bfloat16"


def test_a_signal_in_the_last_step_ends_the_process_after_the_model_is_written(
    small_molmoe: Path, tmp_path: Path
) -> None:
    process = start(small_molmoe, tmp_path, "--steps", "3", "--stop-at", "2")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, out
    assert len(curve(tmp_path)) == 3
    assert len(weights(tmp_path)) > 10
    run(small_molmoe, tmp_path, "--steps", "3")


@pytest.mark.slow
def test_sigterm_through_torchrun_leaves_a_checkpoint(small_molmoe: Path, tmp_path: Path) -> None:
    process = start(small_molmoe, tmp_path, "--steps", "2000", ranks=2)
    until = time.monotonic() + 120
    while not (tmp_path / "log.jsonl").exists() or len(curve(tmp_path)) < 3:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    process.terminate()
    out, _ = process.communicate(timeout=100)
    assert "stopped by a signal after saving a checkpoint" in out, out
    stopped = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert (tmp_path / "checkpoints" / f"step-{stopped:08}").is_dir()


def test_a_part_whose_gradient_is_no_number_is_not_touched(small_molmoe: Path, tmp_path: Path) -> None:
    run(small_molmoe, tmp_path, "--steps", "4", "--nan-at", "2")
    notes = [json.loads(line).get("note", "") for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum("skipped: its gradient's norm is nan" in note for note in notes) == 1
    assert all(np.isfinite(values).all() for values in weights(tmp_path).values())


def test_only_the_run_that_writes_a_checkpoint_may_remove_what_is_left_of_it(tmp_path: Path) -> None:
    from molmo_edge.training.parallel import world
    from molmo_edge.training.run_checkpoints import Checkpoints

    part = tmp_path / "step-00000005.part"
    part.mkdir()
    with world("cpu") as here:
        checkpoints = Checkpoints(tmp_path, here)
        assert checkpoints.latest() is None
        assert part.exists(), "another process may be writing it"
        checkpoints.remove_parts()
    assert not part.exists()
