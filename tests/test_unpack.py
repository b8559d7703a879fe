"""Weights that come back out of a bundle: the same as went in, and the same answers on PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import bundle

from molmo_edge.checkpoints.bundle import default_bundle
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.export import export_bundle, export_checkpoint
from molmo_edge.export.bundle_weights import BundleTensors, load_bundle_weights
from molmo_edge.frontend.crops import load_image
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import load_checkpoint, save_checkpoint
from molmo_edge.molmo import Molmo
from molmo_edge.runtimes.torch import TorchRuntime

GOLDEN = Path(__file__).parent / "golden"
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("architecture", ["molmoe", "qwen", "olmo"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.0), ("int8", 0.015), ("q8", 0.008), ("q4", 0.16)])
def test_weights_survive_a_bundle(architecture: str, precision: str, tolerance: float, tmp_path: Path) -> None:
    model, _, config = load_checkpoint(GOLDEN / architecture)
    export_bundle(GOLDEN / architecture, tmp_path / "bundle", precision, measure=False)
    again = dict(load_bundle_weights(tmp_path / "bundle").named_parameters())
    for name, parameter in model.named_parameters():
        if name.startswith(f"vision.blocks.{config.vision.last_layer + 1}."):
            continue  # never runs, so a bundle does not hold it
        error = (again[name] - parameter).norm() / parameter.norm().clamp(min=1e-9)
        assert error <= tolerance, f"{name}: {error:.4f}"


@pytest.mark.parametrize("precision", ["int8", "q8"])
def test_experts_come_from_one_widened_matrix(precision: str) -> None:
    """Widening all experts of a layer for each one of them took the square of their number."""
    tensors = BundleTensors(bundle("molmoe", precision))
    d = tensors.config.decoder
    for part in ("gate", "up", "down"):
        names = [f"model.transformer.blocks.0.mlp.experts.{e}.{part}_proj.weight" for e in range(d.n_experts)]
        assert tensors.shape(names[0]) == ((d.d_model, d.ffn_dim) if part == "down" else (d.ffn_dim, d.d_model))
        experts = [tensors.get(name) for name in names]
        assert all(np.may_share_memory(expert.base, experts[0].base) for expert in experts)
        assert not any(expert.flags.writeable for expert in experts)
        assert not any(np.shares_memory(expert, experts[0]) for expert in experts[1:])


def test_a_checkpoint_without_new_embedding(tmp_path: Path) -> None:
    """additional_vocab_size 0: neither the checkpoint nor the bundle has such a tensor."""
    model, _, config = load_checkpoint(GOLDEN / "molmoe")
    config = replace(config, decoder=replace(config.decoder, additional_vocab_size=0))
    model.config = config
    model.decoder.new_embedding = torch.nn.Parameter(model.decoder.new_embedding.detach()[:0])
    save_checkpoint(model, GOLDEN / "molmoe" / "tokenizer.json", tmp_path / "checkpoint")
    assert "model.transformer.wte.new_embedding" not in open_tensors(tmp_path / "checkpoint").names()
    loaded, _, config_again = load_checkpoint(tmp_path / "checkpoint")
    assert config_again == config
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle")
    assert "model.transformer.wte.new_embedding" not in BundleTensors(tmp_path / "bundle").names()
    again = load_bundle_weights(tmp_path / "bundle")
    ids = torch.arange(config.decoder.embedding_size)
    for other in (loaded, again):
        assert torch.equal(other.decoder.embed(ids), model.decoder.embed(ids))


def test_nano_on_onnx_equals_nano_on_pytorch_token_for_token(tmp_path: Path) -> None:
    """The embedded weights, widened, as fp32 graphs and as a PyTorch model: the same greedy answers."""
    model = load_bundle_weights(default_bundle())
    tokenizer_json = default_bundle() / "tokenizer.json"
    save_checkpoint(model, tokenizer_json, tmp_path / "checkpoint")
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle")
    with (
        Molmo(tmp_path / "bundle") as onnx,
        Molmo.from_parts(TorchRuntime.from_model(model), Tokenizer.from_file(tokenizer_json)) as torch_molmo,
    ):
        for name in ("cat.jpg", "coffee.jpg"):
            rgb = load_image(EXAMPLES / name)
            ours, theirs = onnx.encode(rgb), torch_molmo.encode(rgb)
            scale = np.abs(theirs.embeddings).max()
            assert np.abs(ours.embeddings - theirs.embeddings).max() <= 1e-4 * scale
            for question in ("Point to the cat.", "How many cups are there?", "Describe this image."):
                assert onnx.ask(ours, question).token_ids == torch_molmo.ask(theirs, question).token_ids


def test_layer_scale_is_folded_without_changing_the_features(tmp_path: Path) -> None:
    """DINOv2's LayerScale comes back as ones, in matrices that give the same features."""
    model = load_bundle_weights(default_bundle())
    crops = torch.rand(1, 256, 588, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for block in model.vision.blocks:
            block.lambda1.fill_(0.5)
            block.lambda2.fill_(-2.0)
        features = model.vision(crops)
    save_checkpoint(model, default_bundle() / "tokenizer.json", tmp_path / "checkpoint")
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle")
    again = load_bundle_weights(tmp_path / "bundle")
    assert again.vision.blocks[0].lambda1.unique().tolist() == [1.0]
    with torch.no_grad():
        torch.testing.assert_close(again.vision(crops), features, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ["molmoe", "qwen", "olmo"])
def test_a_bundle_is_exported_again(architecture: str, tmp_path: Path) -> None:
    """To safetensors and to another bundle: what the checkpoint itself gives."""
    export_checkpoint(bundle(architecture), tmp_path / "checkpoint", "fp32")
    found, exact = open_tensors(tmp_path / "checkpoint"), open_tensors(GOLDEN / architecture)
    config = load_checkpoint(tmp_path / "checkpoint")[2]
    unused = f".resblocks.{config.vision.last_layer + 1}."  # never runs, so a bundle does not hold it
    for name in exact.names():
        assert unused in name or np.array_equal(found.get(name), exact.get(name)), name
    export_bundle(bundle(architecture), tmp_path / "again", "q8", measure=False)
    export_bundle(GOLDEN / architecture, tmp_path / "direct", "q8", measure=False)
    for file in (tmp_path / "direct").glob("*.onnx"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("precision", ["int8", "q8", "q4"])
def test_dithered_weights_lie_as_far_from_the_bundle_as_the_original(precision: str) -> None:
    original, plain = open_tensors(GOLDEN / "molmoe"), BundleTensors(bundle("molmoe", precision))
    dithered, again = (BundleTensors(bundle("molmoe", precision), dither=seed) for seed in (1, 1))
    name = "model.transformer.blocks.0.attn.att_proj.weight"
    far = float(np.linalg.norm(dithered.get(name) - plain.get(name)))
    assert far == pytest.approx(float(np.linalg.norm(original.get(name) - plain.get(name))), rel=0.1)
    assert (dithered.get(name) == again.get(name)).all(), "the same at every run"
    norm = "model.transformer.blocks.0.attn.attn_norm.weight"
    assert (dithered.get(norm) == original.get(norm)).all(), "what was not rounded is as it was"
