"""Quantisation-aware training: weights are rounded exactly as in an export, and trained through the rounding."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from base_layouts import GOLDEN
from small_checkpoints import a_batch, a_recipe, write_checkpoint
from training_run import Noise

pytest.importorskip("onnx")

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.tensor_names import hub_layout
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.config import DecoderConfig, ImageConfig, MolmoConfig, VisionConfig
from molmo_edge.export import export_bundle
from molmo_edge.export.bundle_weights import BundleTensors
from molmo_edge.export.int8_graph import quantize_channels, quantize_rows
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import Molmo, load_checkpoint, save_checkpoint
from molmo_edge.quantize.rounding import nearest
from molmo_edge.training.fake_quantization import (
    Qat,
    QatError,
    Rounded,
    round_channels,
    round_q4,
    round_q8,
    rounded_parameters,
)
from molmo_edge.training.forward import ForwardConfig, Trainable
from molmo_edge.training.parallel import world
from molmo_edge.training.trainer import Data, Trainer, build

pytestmark = pytest.mark.usefixtures("one_thread")


def weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = rng.standard_normal((rows, columns)).astype(np.float32)
    found[0] = 0
    found[1, :4] = (2, -2, 2, -2)  # several largest
    return found


def test_roundings_equal_those_of_the_exporter() -> None:
    w = weights(24, 257)
    q, scale = quantize_channels(w)
    np.testing.assert_array_equal(round_channels(torch.from_numpy(w)).numpy(), q * scale[:, None])
    padded = np.pad(w, ((0, 0), (0, 31))).reshape(24, -1, 32)
    q, scale = quantize_rows(padded)
    np.testing.assert_array_equal(
        round_q8(torch.from_numpy(w)).numpy(), (q * scale[..., None]).reshape(24, -1)[:, :257]
    )
    for block in (32, 64, 128):
        w = weights(24, 512, seed=block)
        expected = nearest("", w, block, False).restored()
        np.testing.assert_array_equal(round_q4(torch.from_numpy(w), block).numpy(), expected)


def dino(folder: Path, top_k: int = 2) -> Path:
    """A ViT with LayerScale, and experts whose sizes four-bit experts support."""
    decoder = DecoderConfig(
        d_model=64, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=32, n_experts=4, top_k=top_k, vocab_size=500,
        embedding_size=512, additional_vocab_size=16, qk_norm=True,
    )  # fmt: skip
    config = MolmoConfig(
        ImageConfig(crop_size=56, overlap_margins=(0, 0), max_crops=2),
        VisionConfig("dino", 32, 2, 4, 64, n_pos=17, activation="gelu", layers=(-1, -2)),
        decoder,
        projector_dim=32,
    )
    model = Molmo(config).init_weights(std=0.15, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for block in model.vision.blocks:
            block.lambda1.copy_(torch.linspace(0.1, 2, 32))
            block.lambda2.copy_(torch.linspace(2, 0.1, 32))
    save_checkpoint(model, GOLDEN / "molmoe" / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "experts": write_checkpoint(folder / "experts", "experts"),
        "dense": write_checkpoint(folder / "dense", "dense"),
        "dino": dino(folder / "dino"),
        "all active": dino(folder / "active", top_k=4),
    }


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *(("experts", precision) for precision in ("q8", "int8", "q4")),
        *(("dino", precision) for precision in ("q8", "mixed")),
        *(("all active", precision) for precision in ("q4", "mixed")),
        ("dense", "mixed"),
    ],
)
def test_rounded_weights_are_those_of_a_bundle(
    models: dict[str, Path], tmp_path: Path, name: str, precision: str
) -> None:
    export_bundle(models[name], tmp_path / "bundle", precision, measure=False)
    bundle = BundleTensors(tmp_path / "bundle")
    molmo, _, config = load_checkpoint(models[name])
    found = rounded_parameters(molmo, precision)
    changed = set()
    for parameter, slot in hub_layout(config).items():
        if any(hub not in bundle.names() for hub in slot):
            continue
        stored = np.stack([bundle.get(hub) for hub in slot]) if len(slot) > 1 else bundle.get(slot[0])
        own = molmo.get_parameter(parameter).detach()
        if parameter in found:
            np.testing.assert_array_equal(found[parameter].numpy(), stored, err_msg=parameter)
            changed.add(parameter)
        elif "lambda" not in parameter and not (
            parameter.startswith("vision") and (parameter.endswith((".wo.bias", ".w2.bias")) or ".2." in parameter)
        ):
            np.testing.assert_array_equal(own.numpy(), stored, err_msg=parameter)
    assert changed == set(found), "every rounded parameter was compared"
    assert {"decoder.embedding", "decoder.head.weight", "connector.projector.w2.weight"} <= changed


def test_weights_are_rounded_within_a_step_only(models: dict[str, Path]) -> None:
    molmo, _, config = load_checkpoint(models["dino"])
    before = {name: p.detach().clone() for name, p in molmo.named_parameters()}
    exported = rounded_parameters(molmo, "mixed")
    with Rounded(molmo, "mixed").weights():
        for name, values in exported.items():
            own, expected = molmo.get_parameter(name).detach(), values
            if name.endswith(("attention.wo.weight", "feed_forward.w2.weight")) and name.startswith("vision"):
                block = name.rsplit(".", 3)[0]
                own = own * molmo.get_parameter(f"{block}.lambda{1 + ('w2' in name)}").detach()[:, None]
                torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-7)
            else:
                assert torch.equal(own, expected), name
    assert all(torch.equal(before[name], p.detach()) for name, p in molmo.named_parameters())
    assert config.decoder.n_experts == 4


def test_gradients_are_those_at_the_rounded_weights(models: dict[str, Path]) -> None:
    batch = a_batch(models["dense"])
    found = []
    for swap in (True, False):
        molmo, _, _ = load_checkpoint(models["dense"])
        model, rounded = Trainable(molmo, ForwardConfig(answer_dropout=0.0)), Rounded(molmo, "q4")
        if swap:
            with rounded.weights():
                model(batch).cross_entropy.backward()
        else:
            with torch.no_grad():
                for name, values in rounded_parameters(molmo, "q4").items():
                    molmo.get_parameter(name).copy_(values)
            model(batch).cross_entropy.backward()
        found.append({name: p.grad for name, p in molmo.named_parameters() if p.grad is not None})
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name


def test_a_run_lowers_the_loss_of_the_rounded_model(models: dict[str, Path], tmp_path: Path) -> None:
    start = models["experts"]
    config, source = read_config(start), open_tensors(start)
    recipe = a_recipe(steps=6, qat=Qat("q4", share=0.5), validate_every=1, forward=ForwardConfig(answer_dropout=0.0))
    noise = Noise("noise", 4, 1)
    with world("cpu") as here:
        model = build(config, source, "start", recipe, here)
        tokenizer = Tokenizer.from_file(start / "tokenizer.json")
        trainer = Trainer(model, tokenizer, Data([noise], [1.0], [noise]), recipe, tmp_path, here)
        before = trainer.validate()["validation_loss"]
        trainer.step = 3
        rounded = trainer.validate()["validation_loss"]
        trainer.step = 0
        written = trainer.train()
        after = trainer.validate()["validation_loss"]
    assert rounded != before, "from step 3 on, validation uses rounded weights as well"
    assert after < before
    export_bundle(written, tmp_path / "bundle", "q4", measure=False)
    stored = BundleTensors(tmp_path / "bundle").get("lm_head.weight")
    np.testing.assert_array_equal(rounded_parameters(model.molmo, "q4")["decoder.head.weight"].numpy(), stored)


def test_what_cannot_be_rounded(models: dict[str, Path]) -> None:
    with pytest.raises(QatError, match="supported: int8, q8, q4, mixed"):
        Qat("fp16")
    with pytest.raises(QatError, match="above 0 and at most 1"):
        Qat("q4", share=0.0)
    molmo, _, config = load_checkpoint(models["dense"])
    molmo.config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, weight_tying=True))
    with pytest.raises(QatError, match="is also its head"):
        Rounded(molmo, "q8")
