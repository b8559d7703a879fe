"""Students from larger checkpoints: experts that equal the dense FFN, layers left out by influence, smaller ViTs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from small_checkpoints import GOLDEN, PLAIN, a_batch, hidden, write_checkpoint

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.config import MolmoConfig, YarnConfig
from molmo_edge.data.drawn.generate import generate
from molmo_edge.modeling import load_checkpoint
from molmo_edge.training.distillation import DistillError
from molmo_edge.training.forward import Trainable
from molmo_edge.training.influence import measure_influence, most_influential
from molmo_edge.training.recipe import ExpertSchedule
from molmo_edge.training.student_checkpoint import split_ffn, student_config, write_student

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dense(small_checkpoints: dict[str, Path]) -> Path:
    return small_checkpoints["dense"]


def test_all_experts_together_are_the_dense_ffn(dense: Path, tmp_path: Path) -> None:
    config = write_student(dense, tmp_path / "student", n_experts=4)
    assert (config.decoder.n_experts, config.decoder.top_k, config.decoder.ffn_dim) == (4, 4, 12)
    assert read_config(tmp_path / "student") == config
    batch = a_batch(dense)
    before, after = (hidden(load_checkpoint(path)[0], batch) for path in (dense, tmp_path / "student"))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    molmo, _, _ = load_checkpoint(tmp_path / "student")
    for block in molmo.decoder.blocks:
        block.ffn.top_k = 3
    assert (hidden(molmo, batch) - before).abs().max() > 1e-3, "with fewer experts it is another model"
    assert ExpertSchedule(top_k=2).at(0, 10, 4) == 4


def test_norms_after_the_branches_and_stored_types(tmp_path: Path) -> None:
    golden = GOLDEN / "olmo"
    write_student(golden, tmp_path / "student", n_experts=2)
    a, b = load_checkpoint(golden)[0], load_checkpoint(tmp_path / "student")[0]
    x = torch.randn(1, 5, a.config.decoder.d_model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(b.decoder(x), a.decoder(x), rtol=1e-5, atol=1e-5)
    narrow = write_checkpoint(tmp_path / "narrow", "dense", dtype="BF16")
    write_student(narrow, tmp_path / "narrow-student", n_experts=4)
    batch = a_batch(narrow)
    before, after = (hidden(load_checkpoint(tmp_path / n)[0], batch) for n in ("narrow", "narrow-student"))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_split_ffn_is_exact() -> None:
    rng = np.random.default_rng(0)
    gate, up, down = (rng.standard_normal(shape).astype(np.float32) for shape in ((12, 5), (12, 5), (5, 12)))
    x = rng.standard_normal(5).astype(np.float32)

    def swiglu(g: np.ndarray, u: np.ndarray, d: np.ndarray) -> np.ndarray:
        return d @ (g @ x / (1 + np.exp(-(g @ x))) * (u @ x))

    experts = split_ffn(gate, up, down, 3)
    together = sum(swiglu(*(matrix[e] for matrix in experts)) for e in range(3)) / 3
    np.testing.assert_allclose(together, swiglu(gate, up, down), rtol=1e-5, atol=1e-5)


def test_kept_layers_are_copied(dense: Path, tmp_path: Path) -> None:
    config = write_student(dense, tmp_path / "student", layers=[1], vit_layers=[0, 1])
    assert (config.decoder.n_layers, config.vision.n_layers, config.vision.layers) == (1, 2, (-1, -2))
    old, new = (load_file(path / "model.safetensors") for path in (dense, tmp_path / "student"))
    for name, values in new.items():
        source = name.replace("transformer.blocks.0.", "transformer.blocks.1.")
        np.testing.assert_array_equal(values, old[source], err_msg=name)
    batch = a_batch(dense)
    a, b = (load_checkpoint(path)[0] for path in (dense, tmp_path / "student"))
    with torch.no_grad():
        features = [Trainable(molmo, PLAIN).eval().features(batch) for molmo in (a, b)]
    assert torch.equal(*features), "the third block of the ViT was for nothing"


def test_influence_is_one_minus_the_cosine(dense: Path) -> None:
    batch, (molmo, _, _) = a_batch(dense), load_checkpoint(dense)
    model = Trainable(molmo, PLAIN).eval()
    with torch.no_grad():  # the second layer does nothing, the first ViT block turns everything around
        molmo.decoder.blocks[1].attn.attn_out.weight.zero_()
        molmo.decoder.blocks[1].ffn.ff_out.weight.zero_()
        for branch in (molmo.vision.blocks[0].attention.wo, molmo.vision.blocks[0].feed_forward.w2):
            branch.weight.zero_()
            branch.bias.zero_()
    found = measure_influence(model, [batch, batch])
    assert found.decoder[1] == pytest.approx(0, abs=1e-6)
    assert found.vision[0] == pytest.approx(0, abs=1e-6)
    assert len(found.vision) == 2, "the third one is not run"
    states: list[torch.Tensor] = []
    handle = molmo.decoder.blocks[0].register_forward_hook(lambda _m, args, out: states.extend((args[0], out)))
    with torch.no_grad():
        model.run(batch)
    handle.remove()
    a, b = (state[0][: batch.lengths[0]] for state in states)
    cosine = (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
    assert found.decoder[0] == pytest.approx(float((1 - cosine).mean()), rel=1e-4)
    assert most_influential(found.decoder, 1) == (0,)


def test_layers_that_are_outputs_are_kept() -> None:
    influence = (0.9, 0.1, 0.5, 0.2, 0.05)
    assert most_influential(influence, 3) == (0, 2, 3)
    assert most_influential(influence, 3, always=(4, 1)) == (0, 1, 4)
    with pytest.raises(DistillError, match="2 to 5 can be kept, not 1"):
        most_influential(influence, 1, always=(4, 1))


def test_stretched_layers_keep_their_tables() -> None:
    config = MolmoConfig()
    yarn = YarnConfig(layers=(1, 3, 5))
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, yarn=yarn))
    kept = student_config(config, layers=[0, 1, 4, 5]).decoder.yarn
    assert kept is not None
    assert kept.layers == (1, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [1, 0]}, "rising numbers from 0 to 1"),
        ({"layers": [0, 2]}, "rising numbers from 0 to 1"),
        ({"vit_layers": [0, 2]}, r"layers \[1\] are its outputs"),
        ({"n_experts": 5}, "width 48 cannot be split into 5 equal experts"),
    ],
)
def test_impossible_students(dense: Path, changes: dict, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        student_config(read_config(dense), **changes)


def test_experts_cannot_be_split_again(small_molmoe: Path, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="has 8 experts already"):
        write_student(small_molmoe, tmp_path, n_experts=2)
    with pytest.raises(DistillError, match="is the checkpoint itself"):
        write_student(small_molmoe, small_molmoe, layers=[0])


def test_the_command(dense: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    generate("clocks", 4, tmp_path / "data" / "pixmo_clocks")
    base = ["train", "student", "--from", dense, "--out", tmp_path / "student", "--device", "cpu"]
    data = ["--data", tmp_path / "data", "--pictures", "2"]
    status, _, err = cli(*base, *data, "--layers", "1", "--vit-layers", "2", "--experts", "4")
    assert status == 0, err
    assert "influence of the decoder's layers: 0 " in err
    assert "(left out)" in err
    assert "1 layer, 4 experts of width 12; 2 ViT layers" in " ".join(err.split())
    assert read_config(tmp_path / "student").decoder.n_experts == 4
    status, _, err = cli(*base)
    assert status == 2
    assert "--layers, --vit-layers or --experts" in err
    status, _, err = cli(*base, "--layers", "1")
    assert status == 2
    assert "need --data" in err
