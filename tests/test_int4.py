"""Four-bit weights: the rounding, the packing, the two operators, and what they cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exported import ARCHITECTURES, bundle, case, costs, prompt, runtime
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantize import norm_error, normal, run

from molmo_edge.checkpoints.manifest import MANIFEST, write_manifest
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.export import ExportError, export_bundle
from molmo_edge.export.bundle_weights import BundleTensors, load_bundle_weights
from molmo_edge.export.component_graphs import build_component
from molmo_edge.export.graph_precisions import graph_precision
from molmo_edge.export.int8_graph import quantize_rows
from molmo_edge.export.source import open_source
from molmo_edge.modeling import load_checkpoint
from molmo_edge.quantize.rounding import nearest, pack_nibbles, unpack_nibbles
from molmo_edge.runtimes import Unavailable, open_runtime
from molmo_edge.runtimes.onnx import OnnxRuntime

GOLDEN = Path(__file__).parent / "golden"


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 4), st.sampled_from([16, 32, 64, 128]))
def test_rounding_uses_all_levels(seed: int, rows: int, blocks: int, block: int) -> None:
    weight = np.random.default_rng(seed).standard_t(3, (rows, blocks * block)).astype(np.float32)
    rounded = nearest("", weight, block, False)
    assert rounded.codes.dtype == np.uint8
    assert rounded.codes.max() <= 15
    assert rounded.scale.shape == (rows, blocks)
    each = weight.reshape(rows, blocks, block)
    restored = (rounded.codes.reshape(each.shape).astype(np.float32) - 8) * rounded.scale[..., None]
    np.testing.assert_array_equal(restored.reshape(weight.shape), rounded.restored())
    largest, step = np.abs(each).max(axis=-1), np.abs(rounded.scale)[..., None]
    assert (largest * 0.8399 <= 8 * step[..., 0]).all()
    assert (8 * step[..., 0] <= largest * 1.0001).all()
    if block <= 32:
        assert np.allclose(np.abs(restored).max(axis=-1), largest, rtol=1e-6)  # the largest is kept exactly
    inside = np.abs(each) <= 7 * step
    assert (np.abs(restored - each) <= step * 0.5001)[inside].all()
    # Never worse than the plain rule, the largest value over -8.
    plain = each[np.abs(each) == largest[..., None]].reshape(rows, blocks, -1)[..., :1] / np.float32(-8)
    levels = np.clip(np.rint(each / plain), -8, 7) * plain
    assert (((restored - each) ** 2).sum(axis=-1) <= ((levels - each) ** 2).sum(axis=-1) * 1.0001).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.floats(-3, 3), st.sampled_from([16, 32, 64, 128]))
def test_a_zero_point_keeps_zero_and_both_ends(seed: int, shift: float, block: int) -> None:
    weight = (np.random.default_rng(seed).normal(size=(3, 2 * block)) + shift).astype(np.float32)
    weight[0, 0] = 0
    rounded = nearest("", weight, block, True)
    assert rounded.zero_point is not None
    assert rounded.zero_point.dtype == np.uint8
    assert rounded.zero_point.max() <= 15
    assert rounded.restored()[0, 0] == 0
    steps = np.repeat(rounded.scale, block, axis=-1)
    # Half a step, half of the zero point's, and what a narrower range cuts off.
    assert (np.abs(rounded.restored() - weight) <= steps * (1.0001 + 15 * 0.16)).all()
    if abs(shift) > 2:  # of one sign: a symmetric block leaves half of its levels unused
        assert norm_error(rounded.restored(), weight) < norm_error(nearest("", weight, block, False).restored(), weight)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_packing_is_undone(seed: int, pairs: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, (3, 2 * pairs), dtype=np.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (3, pairs)
    assert (packed & 15 == codes[:, ::2]).all()
    np.testing.assert_array_equal(unpack_nibbles(packed), codes)


def test_the_signed_scale_beats_the_symmetric_one() -> None:
    weight = normal(64, 256)
    signed = nearest("", weight, 32, False).restored()
    blocks = weight.reshape(64, 8, 32)
    seven = np.abs(blocks).max(axis=-1, keepdims=True) / 7
    symmetric = (np.rint(blocks / seven) * seven).reshape(weight.shape)
    assert norm_error(signed, weight) < 0.93 * norm_error(symmetric, weight)


def test_one_matrix() -> None:
    """Against its own rounded weights only the rounding of inputs is left; a width that no block divides, too."""
    for width in (576, 1536, 48):
        x, weight, bias = normal(64, width), normal(96, width, seed=1), normal(96, seed=2)
        padded = np.pad(weight, ((0, 0), (0, -width % 32)))
        exact = x @ nearest("", padded, 32, False).restored()[:, :width].T + bias
        found = run(graph_precision("q4"), x, weight, bias)
        assert norm_error(found, exact) < 0.012
        assert 0.05 < norm_error(found, x @ weight.T + bias) < 0.13
    x, weight = normal(3, 32), normal(5, 32, seed=1)
    x[1], weight[2] = 0, 0
    y = run(graph_precision("q4"), x, weight)
    assert np.isfinite(y).all()
    assert not y[1].any()
    assert not y[:, 2].any()


@pytest.mark.parametrize("precision", ["q4", "mixed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_the_graph_computes_what_its_weights_say(architecture: str, precision: str) -> None:
    """The bundle's own weights, widened, on PyTorch: only the rounding of inputs to eight bits is left.

    A wrong order of gate and up, a renormalised mixture or a wrong nibble would show as an error of order one.
    """
    directory, c = bundle(architecture, precision), case(architecture, "square")
    model = load_bundle_weights(directory)
    embeddings = prompt(runtime(architecture), c)
    theirs = model.decoder.logits(model.decoder(torch.from_numpy(embeddings)[None])[0, -1]).numpy()
    ours = runtime(architecture, precision)
    found = ours.forward(embeddings, ours.new_cache(len(embeddings)))
    assert norm_error(found, theirs) < 0.08


def test_experts_go_through_qmoe_and_come_back() -> None:
    directory = bundle("molmoe", "q4")
    graph = onnx.load(str(directory / "decoder_q4.onnx")).graph
    assert sum(node.op_type == "QMoE" for node in graph.node) == 2
    assert not any("gate_proj" in tensor.name for tensor in graph.initializer)
    tensors, (exact, _, _) = BundleTensors(directory), load_checkpoint(GOLDEN / "molmoe")
    for part, matrices in (("gate", exact.decoder.blocks[1].ffn.gate), ("down", exact.decoder.blocks[1].ffn.down)):
        for e, matrix in enumerate(matrices):
            found = tensors.get(f"model.transformer.blocks.1.mlp.experts.{e}.{part}_proj.weight")
            assert 0 < norm_error(found, matrix.detach().numpy()) < 0.15


def test_the_manifest_says_what_rounding_cost_and_what_it_needs() -> None:
    components = json.loads((bundle("molmoe", "q4") / "molmo_edge.json").read_text())["components"]
    assert {name: part.get("onnxruntime") for name, part in components.items() if "engine" in part} == {
        "vision_encoder": "1.20", "connector": "1.22", "embed_tokens": "1.20", "decoder": "1.31"
    }  # fmt: skip
    errors = components["decoder"]["weight_errors"]
    exact, tensors = open_tensors(GOLDEN / "molmoe"), BundleTensors(bundle("molmoe", "q4"))
    block = "model.transformer.blocks.1"
    names = [f"{block}.mlp.experts.{e}.up_proj.weight" for e in range(8)]
    for key, members in (
        (f"{block}.attn.att_proj", [f"{block}.attn.att_proj.weight"]),
        (f"{block}.mlp.experts.up_proj", names),
    ):
        ours, theirs = (np.stack([source.get(name) for name in members]) for source in (tensors, exact))
        relative, largest = errors[key]
        assert relative == pytest.approx(norm_error(ours, theirs), rel=0.01)
        assert largest == pytest.approx(np.abs(ours - theirs).max(), rel=0.01)
    assert {name for name in errors if "experts" in name} == {
        f"model.transformer.blocks.{n}.mlp.experts.{part}_proj" for n in (0, 1) for part in ("gate", "up", "down")
    }
    assert all(0 < relative < 0.16 for relative, _ in errors.values())


def test_an_older_onnxruntime_is_told_so(tmp_path: Path) -> None:
    shutil.copytree(bundle("molmoe", "q4"), tmp_path / "bundle")
    text = (tmp_path / "bundle" / MANIFEST).read_text()
    assert '"onnxruntime": "1.31"' in text
    write_manifest(tmp_path / "bundle", json.loads(text.replace('"onnxruntime": "1.31"', '"onnxruntime": "99.5"')))
    with pytest.raises(Unavailable, match=r"decoder_q4\.onnx needs onnxruntime 99\.5 or later, \d.* is installed"):
        open_runtime(tmp_path / "bundle")


def test_a_large_decoder_is_not_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molmo_edge.export.component_graphs.MEASURED_BELOW", 100_000)
    components = export_bundle(GOLDEN / "molmoe", tmp_path / "bundle", "q4")["components"]
    assert "relative_error" in components["vision_encoder"]
    assert "relative_error" not in components["decoder"]
    assert components["decoder"]["weight_errors"]


@pytest.mark.parametrize("word", ["q4", "mixed"])
def test_a_word_for_the_whole_bundle(word: str) -> None:
    manifest = json.loads((bundle("molmoe", word) / "molmo_edge.json").read_text())
    precisions = {name: part["precision"] for name, part in manifest["components"].items() if "precision" in part}
    assert precisions == {"vision_encoder": "int8", "connector": "q8", "embed_tokens": "int8", "decoder": word}
    errors = manifest["components"]["decoder"]["weight_errors"]
    attention = errors["model.transformer.blocks.0.attn.att_proj"][0]
    assert attention < 0.02 if word == "mixed" else attention > 0.05


def test_mixed_is_q4_with_attention_in_int8(tmp_path: Path) -> None:
    config, tensors = open_source(GOLDEN / "molmoe")
    named = graph_precision("mixed")
    by_part = graph_precision("q4", {"attention": "int8"})
    for name, precision in (("named", named), ("by_part", by_part)):
        build_component("decoder", tmp_path / name, config, tensors, precision)
    assert (tmp_path / "named").read_bytes() == (tmp_path / "by_part").read_bytes()


def test_sides_that_no_block_divides_are_matrices(tmp_path: Path) -> None:
    """An odd FFN cannot go through QMoE; the model still exports, and answers nearly as in fp32."""
    from dataclasses import replace

    from molmo_edge.modeling import Molmo, save_checkpoint

    _, _, config = load_checkpoint(GOLDEN / "molmoe")
    config = replace(config, decoder=replace(config.decoder, ffn_dim=24), projector_dim=16)
    model = Molmo(config).init_weights(std=0.1, generator=torch.Generator().manual_seed(0)).eval()
    save_checkpoint(model, GOLDEN / "molmoe" / "tokenizer.json", tmp_path / "checkpoint")
    export_bundle(tmp_path / "checkpoint", tmp_path / "q4", {"decoder": "q4"}, measure=False)
    export_bundle(tmp_path / "checkpoint", tmp_path / "fp32")
    rows = normal(9, config.decoder.d_model)
    found = []
    for name in ("q4", "fp32"):
        manifest = json.loads((tmp_path / name / "molmo_edge.json").read_text())
        files = {part: tmp_path / name / manifest["components"][part]["file"] for part in ("decoder",)}
        engine = OnnxRuntime(config, files)
        found.append(engine.forward(rows, engine.new_cache(9)))
        engine.close()
    assert 0 < norm_error(*found) < 0.3


def test_the_embedding_keeps_eight_bits() -> None:
    table = load_checkpoint(GOLDEN / "molmoe")[0].decoder.embedding.detach().numpy()
    q, scale = quantize_rows(table)
    tensors = BundleTensors(bundle("molmoe", "q4"))
    np.testing.assert_allclose(
        tensors.get("model.transformer.wte.embedding"), q * scale[:, None].astype(np.float32), rtol=1e-6
    )


# Measured on the golden models, whose weights are random and whose rows are as short as a block, the worst of the
# three: int8 KL 0.0018 and 89.6 % same top tokens, q8 0.00085 and 94.8 %, q4 0.055 and 62.5 %,
# mixed 0.011 and 81.2 %.
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("precision", "most", "least"),
    [("int8", 0.0023, 0.85), ("q8", 0.0011, 0.9), ("q4", 0.07, 0.55), ("mixed", 0.014, 0.75)],
)
def test_bundles_say_what_their_precision_costs(architecture: str, precision: str, most: float, least: float) -> None:
    kl, same = costs(architecture, runtime(architecture, precision))
    print(f"{architecture} {precision}: same top token {same:.1%}, mean KL {kl:.2g}, 96 positions")
    assert 0 < kl < most
    assert same > least


def bits(node: onnx.NodeProto) -> int:
    return next(attribute.i for attribute in node.attribute if attribute.name == "bits")


@pytest.mark.parametrize("options", [{"block": 64}, {"block": 128}, {"asymmetric": True}], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_other_blocks_and_zero_points(architecture: str, options: dict[str, Any]) -> None:
    """As `test_the_graph_computes_what_its_weights_say`."""
    directory, c = bundle(architecture, "q4", **options), case(architecture, "square")
    model = load_bundle_weights(directory)
    embeddings = prompt(runtime(architecture), c)
    theirs = model.decoder.logits(model.decoder(torch.from_numpy(embeddings)[None])[0, -1]).numpy()
    ours = runtime(architecture, "q4", **options)
    assert norm_error(ours.forward(embeddings, ours.new_cache(len(embeddings))), theirs) < 0.08
    graph = onnx.load(str(directory / "decoder_q4.onnx"), load_external_data=False).graph
    zero_points = {bool(node.input[3:]) for node in graph.node if node.op_type == "MatMulNBits" and bits(node) == 4}
    assert zero_points == {bool(options.get("asymmetric"))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "q4", "block": 48}, "a block of 48 weights is not supported .supported: 32, 64, 128"),
        ({"precision": "int8", "block": 64}, "4-bit weights"),
        ({"precision": {"vision_encoder": "q4"}, "calibrate": "."}, "to a decoder in .*, not in fp32"),
        ({"precision": "q4", "calibrate": "no/such"}, "is not a folder"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export_bundle(GOLDEN / "molmoe", tmp_path / "bundle", **options)
