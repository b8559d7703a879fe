"""Runs of the trainer: the same curve on one rank and on two, whole and taken up, and nothing lost to a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from molmo_edge.config import DecoderConfig, ImageConfig, MolmoConfig, VisionConfig
from molmo_edge.modeling import Molmo, save_checkpoint

GOLDEN = Path(__file__).parent / "golden"
RUN = Path(__file__).parent / "training_run.py"
STEPS = 20


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Molmo of MolmoE's anatomy that takes a hundredth of a second."""
    config = MolmoConfig(
        ImageConfig(crop_size=56, overlap_margins=(0, 0), max_crops=2),
        VisionConfig("openai", 32, 3, 4, 64, n_pos=17, layers=(-1, -2)),
        DecoderConfig(
            d_model=32,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            ffn_dim=16,
            n_experts=8,
            top_k=2,
            vocab_size=500,
            embedding_size=512,
            additional_vocab_size=16,
            qk_norm=True,
        ),
        projector_dim=32,
    )
    directory = tmp_path_factory.mktemp("start")
    model = Molmo(config).init_weights(std=0.15, generator=torch.Generator().manual_seed(0))
    save_checkpoint(model, GOLDEN / "molmoe" / "tokenizer.json", directory)
    return directory


def start(checkpoint: Path, directory: Path, *options: str, ranks: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, str(RUN), str(checkpoint), str(directory), *options]
    if ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(checkpoint: Path, directory: Path, *options: str, ranks: int = 1) -> None:
    process = start(checkpoint, directory, *options, ranks=ranks)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out


def curve(directory: Path) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    run(checkpoint, directory)
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
    assert log[1]["rate_decoder"] == 0, "warm-up begins at zero"
    assert log[STEPS]["utilisation"] > 0 and log[STEPS]["tokens_per_second"] > 0


def test_two_ranks_have_the_curve_of_one(checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path, ranks=2)
    same(whole, tmp_path)
    ours = weights(tmp_path)
    for name, expected in weights(whole).items():
        np.testing.assert_allclose(ours[name], expected, rtol=2e-3, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(
    checkpoint: Path, whole: Path, tmp_path: Path, ranks: int
) -> None:
    run(checkpoint, tmp_path, "--kill-at", "12")
    assert max(curve(tmp_path)) >= 12
    run(checkpoint, tmp_path, ranks=ranks)
    same(whole, tmp_path)
