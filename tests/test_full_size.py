"""The makers and users of large checkpoints, on one too large for the memory that they may take."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.tensor_sources import check_tensors
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.config import ConvTowerConfig, MolmoConfig, PointHeadConfig
from molmo_edge.presets import PRESETS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from make_random_checkpoint import make_checkpoint  # noqa: E402

_NANO = PRESETS["nano"]
PLAIN = replace(  # nano's crops, ViT and decoder, with nothing beside them
    _NANO,
    image=replace(_NANO.image, overview=0),
    decoder=replace(_NANO.decoder, additional_head=False),
    conv_tower=None,
    point_head=None,
)
SMALL = replace(PLAIN, decoder=replace(PLAIN.decoder, n_layers=1, vocab_size=600, embedding_size=640))
DENSE = replace(SMALL, decoder=replace(SMALL.decoder, n_experts=0, top_k=0, ffn_dim=700))
WITH_TOWER_AND_HEAD = replace(
    SMALL,
    image=replace(SMALL.image, overview=96),
    decoder=replace(SMALL.decoder, additional_head=True),
    conv_tower=ConvTowerConfig(steps=(1, 1, 1, 1), pyramid_dim=32),
    point_head=PointHeadConfig(645, 646, 647, dim=64, numbered=False),
)


def peak_of(program: str, *arguments: str) -> float:
    """Bytes that a Python process had resident at most."""
    ending = "\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    command = [sys.executable, "-c", program + ending, *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


@pytest.mark.parametrize(
    ("config", "files"),
    [
        (SMALL, {"pytorch_model.bin"}),
        (DENSE, {"model.safetensors"}),
        (WITH_TOWER_AND_HEAD, {"pytorch_model.bin"}),
    ],
)
def test_a_random_checkpoint_has_the_public_layout(config: MolmoConfig, files: set[str], tmp_path: Path) -> None:
    size = make_checkpoint(config, tmp_path / "a", seed=3)
    assert {p.name for p in (tmp_path / "a").iterdir()} == files | {
        "config.json", "preprocessor_config.json", "tokenizer.json"
    }  # fmt: skip
    assert size == sum((tmp_path / "a" / name).stat().st_size for name in files)
    assert read_config(tmp_path / "a") == config
    source = open_tensors(tmp_path / "a")
    shapes = check_tensors(config, source, where="a")
    assert set(source.names()) == set(shapes)
    assert {source.dtype(name) for name in shapes} == {"F32"}
    make_checkpoint(config, tmp_path / "b", seed=3)
    make_checkpoint(config, tmp_path / "c", seed=4)
    same, other = open_tensors(tmp_path / "b"), open_tensors(tmp_path / "c")
    for name in shapes:
        values = source.get(name)
        np.testing.assert_array_equal(values, same.get(name))
        if values.ndim > 1:
            assert not np.array_equal(values, other.get(name))
            assert 0.015 < values.std() < 0.025


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """1.2 GB of weights in 28 layers: converting takes what PyTorch takes, NF4 what NF4 weights take."""
    config = replace(PLAIN, decoder=replace(PLAIN.decoder, n_layers=28, ffn_dim=640))
    size = make_checkpoint(config, tmp_path / "large")
    assert size > 1.2e9
    empty = peak_of("import molmo_edge.modeling.weights, molmo_edge.modeling.bitsandbytes")
    export = "import sys; from molmo_edge.export import export_checkpoint as e; e(sys.argv[1], sys.argv[2])"
    assert peak_of(export, str(tmp_path / "large"), str(tmp_path / "out")) < empty + 0.15e9
    index = json.loads((tmp_path / "out" / "config.json").read_text())
    assert index["n_layers"] == 28
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 0.6e9
    load = "import sys; from molmo_edge.modeling import load_checkpoint as l; l(sys.argv[1], precision='nf4')"
    pytest.importorskip("bitsandbytes")
    from molmo_edge.modeling.precision import weight_bytes

    loaded = peak_of(load, str(tmp_path / "large")) - empty
    assert loaded < weight_bytes(config, "nf4", "cpu") + 0.25e9 < 0.6e9
