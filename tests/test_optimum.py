"""Graphs made by optimum: they equal PyTorch, stand in for our own, and what its int8 costs."""

from __future__ import annotations

import functools
import json
import platform
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("optimum.exporters.onnx")

import numpy as np
import onnxruntime
import torch
import yaml
from exported import ARCHITECTURES, CASES, GOLDEN, bundle, case, expected, greedy, prompt, relative, runtime
from transformers import AutoConfig, AutoModel

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.tensor_sources import CheckpointError
from molmo_edge.config import ImageConfig, MolmoConfig, VisionConfig
from molmo_edge.export import ExportError
from molmo_edge.export import optimum as subject
from molmo_edge.export import optimum_components as parts
from molmo_edge.export.optimum import COMPONENTS, TARGETS, export_with_optimum, quantize_with_optimum
from molmo_edge.modeling import Molmo, load_checkpoint, save_checkpoint
from molmo_edge.runtimes.onnx import OnnxRuntime

TOLERANCE = 1e-4
Feeds = dict[str, np.ndarray]


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="molmo-edge-test-")


@functools.cache
def graphs(architecture: str) -> Path:
    directory = Path(_scratch().name) / architecture
    export_with_optimum(GOLDEN / architecture, directory, COMPONENTS)
    return directory


@functools.cache
def model(architecture: str) -> Molmo:
    return load_checkpoint(GOLDEN / architecture)[0]


@functools.cache
def feeds(architecture: str, name: str = "square") -> dict[str, Feeds]:
    """For each component what reaches it in a real question; of embed_tokens, all its rows."""
    engine, c = runtime(architecture), case(architecture, name)
    d = engine.config.decoder
    return {
        "vision_encoder": {"crops": c.crops},
        "connector": {"features": engine.encode_crops(c.crops), "masks": c.masks.astype(np.float32)},
        "embed_tokens": {"ids": np.arange(d.embedding_size + d.additional_vocab_size)},
        "decoder_without_cache": {"embeddings": prompt(engine, c)[None]},
    }


@torch.inference_mode()
def by_torch(architecture: str, component: str, inputs: Feeds) -> np.ndarray:
    m, x = model(architecture), [torch.from_numpy(value) for value in inputs.values()]
    if component == "vision_encoder":
        return m.vision(*x).numpy()
    if component == "connector":
        return m.connector(*x).numpy()
    if component == "embed_tokens":
        return m.decoder.embed(*x).numpy()
    return m.decoder.logits(m.decoder(*x)[:, -1]).numpy()


def run(path: Path, inputs: Feeds) -> np.ndarray:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_torch(architecture: str, name: str) -> None:
    for component, inputs in feeds(architecture, name).items():
        found = run(graphs(architecture) / f"{component}.onnx", inputs)
        difference = relative(found, by_torch(architecture, component, inputs))
        print(f"{architecture} {name} {component}: {difference:.1e}")
        assert difference < TOLERANCE
    logits = expected(architecture)[0][f"{name}.last_logits"]
    assert relative(found[0], logits) < TOLERANCE


@pytest.mark.parametrize("component", subject.BUNDLE_COMPONENTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_inputs_and_outputs_are_those_of_our_own_graphs(architecture: str, component: str) -> None:
    def described(directory: Path) -> list[tuple[object, ...]]:
        session = onnxruntime.InferenceSession(directory / f"{component}.onnx", providers=["CPUExecutionProvider"])
        return [(v.name, v.type, v.shape) for v in (*session.get_inputs(), *session.get_outputs())]

    assert described(graphs(architecture)) == described(bundle(architecture))


@pytest.mark.parametrize("components", [("vision_encoder",), subject.BUNDLE_COMPONENTS])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_stay_with_its_graphs(architecture: str, components: tuple[str, ...]) -> None:
    names = ("vision_encoder", "connector", "embed_tokens", "decoder")
    files = {name: (graphs if name in components else bundle)(architecture) / f"{name}.onnx" for name in names}
    engine = OnnxRuntime(read_config(GOLDEN / architecture), files, threads=2)
    for name in CASES:
        ids = greedy(engine, prompt(engine, case(architecture, name)), 24)
        assert ids == expected(architecture)[1][name]["generated_ids"]
    engine.close()


def test_an_all_padding_crop_gives_zeros() -> None:
    crops = case("molmoe", "square").crops[:2].copy()
    crops[0] = -1
    crops[1, :-1] = -1
    features = run(graphs("molmoe") / "vision_encoder.onnx", {"crops": crops})
    assert not features[0].any()
    assert features[1].any(axis=-1).all()


# Norm of the difference over the norm of the fp32 output, measured on x86-64 with VNNI, the largest of the three
# architectures and targets: vision 0.015, connector 0.055, embeddings 0.009, decoder (not OLMo's) 0.026.
# On x86 without VNNI, the 16 bits in which pairs of products are added saturate for arm64's and avx512_vnni's weights
# (vision 0.09 to 0.13 on an AMD EPYC without AVX-512): those files are not for it, and their error is not judged there.
BOUNDS = {"vision_encoder": 0.03, "connector": 0.08, "embed_tokens": 0.012, "decoder_without_cache": 0.06}


def saturates(target: str) -> bool:
    flags = Path("/proc/cpuinfo")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return target != "avx2" and x86 and flags.exists() and "vnni" not in flags.read_text()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_int8(architecture: str, target: str, tmp_path: Path) -> None:
    source = tmp_path / "fp32"
    source.mkdir()
    for path in graphs(architecture).iterdir():
        if architecture != "olmo" or path.stem != "decoder_without_cache":
            (source / path.name).write_bytes(path.read_bytes())
    made = quantize_with_optimum(source, target, tmp_path / "int8")
    assert set(made) == set(COMPONENTS) - ({"decoder_without_cache"} if architecture == "olmo" else set())
    for component, path in made.items():
        assert path.name == f"{component}_int8_{target}.onnx"
        inputs, original = feeds(architecture)[component], source / f"{component}.onnx"
        exact, found = run(original, inputs), run(path, inputs)
        error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        share = path.stat().st_size / original.stat().st_size
        print(f"{architecture} {component} {target}: relative error {error:.4f}, size {share:.2f}")
        assert found.shape == exact.shape
        assert error > 0
        assert error < BOUNDS[component] or saturates(target)
        assert share < 0.9  # of models so small that the graph weighs as much as its weights
    assert made["embed_tokens"].stat().st_size < 0.3 * (source / "embed_tokens.onnx").stat().st_size


def test_int8_stays_beside_its_source_and_replaces_nothing(tmp_path: Path) -> None:
    export_with_optimum(GOLDEN / "qwen", tmp_path / "graphs", ["embed_tokens"])
    made = quantize_with_optimum(tmp_path / "graphs", "avx2")
    assert made == {"embed_tokens": tmp_path / "graphs" / "embed_tokens_int8_avx2.onnx"}
    with pytest.raises(ExportError, match="exists already"):
        quantize_with_optimum(tmp_path / "graphs", "avx2")


def test_int8_of_a_decoder_in_olmos_style_is_refused() -> None:
    with pytest.raises(ExportError, match="norms after attention and FFN"):
        quantize_with_optimum(graphs("olmo"), "avx2")


def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_ONNX_EXTERNAL_DATA", "1")  # optimum's own switch for what 2 GB would do
    made = export_with_optimum(GOLDEN / "qwen", tmp_path / "graphs", ["connector"])
    assert (tmp_path / "graphs" / "connector.onnx_data").stat().st_size > made["connector"].stat().st_size
    inputs = feeds("qwen")["connector"]
    exact = run(made["connector"], inputs)
    np.testing.assert_array_equal(exact, run(graphs("qwen") / "connector.onnx", inputs))
    small = quantize_with_optimum(tmp_path / "graphs", "avx2", tmp_path / "int8")
    np.testing.assert_allclose(run(small["connector"], inputs), exact, atol=0.1 * np.abs(exact).max())


def test_the_model_is_registered_and_nothing_stays_patched() -> None:
    graphs("molmoe")
    config = AutoConfig.from_pretrained(GOLDEN / "molmoe")
    assert type(config) is subject.MolmoHubConfig
    assert type(AutoModel.from_pretrained(GOLDEN / "molmoe")) is subject.MolmoForExport
    assert parts.vision.__dict__.get("len", len) is len
    assert "_all_experts" not in parts.decoder.SparseFFN.forward.__qualname__
    assert torch.equal(torch.arange(2).repeat_interleave(2, dim=0), torch.tensor([0, 0, 1, 1]))


def test_a_graph_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "TOLERANCE", 0.0)
    with pytest.raises(ExportError, match="differ from PyTorch"):
        export_with_optimum(GOLDEN / "qwen", tmp_path / "graphs", ["vision_encoder"])
    assert not list(tmp_path.iterdir())


def test_what_fails_in_optimum_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_part", lambda *_: 1 / 0)
    with pytest.raises(ExportError, match="optimum could not export"):
        export_with_optimum(GOLDEN / "qwen", tmp_path / "graphs", ["connector"])
    assert not list(tmp_path.iterdir())


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'decoder' is not a component"):
        export_with_optimum(GOLDEN / "qwen", tmp_path / "graphs", ["decoder"])
    with pytest.raises(ExportError, match="no components given"):
        export_with_optimum(GOLDEN / "qwen", tmp_path / "graphs", [])
    with pytest.raises(ExportError, match="exists already"):
        export_with_optimum(GOLDEN / "qwen", tmp_path)
    with pytest.raises(ExportError, match="'sse2' is not a supported target"):
        quantize_with_optimum(graphs("qwen"), "sse2")
    with pytest.raises(ExportError, match="holds no graph"):
        quantize_with_optimum(tmp_path, "avx2")


def test_what_is_no_checkpoint_in_hub_layout_is_refused(tmp_path: Path) -> None:
    config = (GOLDEN / "molmoe" / "config.json").read_text()
    empty, reference = tmp_path / "empty", tmp_path / "reference"
    empty.mkdir()
    (empty / "config.json").write_text(config)
    reference.mkdir()
    (reference / "config.yaml").write_text(yaml.safe_dump({"model": json.loads(config)}))
    with pytest.raises(CheckpointError, match="contains no weights"):
        export_with_optimum(empty, tmp_path / "graphs")
    with pytest.raises(ExportError, match="--engine torch"):
        export_with_optimum(reference, tmp_path / "graphs")


def test_dino_tied_weights_and_a_single_table(tmp_path: Path) -> None:
    """What no golden checkpoint has; each graph is compared with PyTorch before it is kept."""
    vision = VisionConfig("dino", 32, 4, 4, 48, 17, norm_eps=1e-6, activation="gelu", layers=(-2, -4))
    image = ImageConfig(crop_size=56, overlap_margins=(0, 0), resize="dino")
    golden = read_config(GOLDEN / "qwen").decoder
    config = MolmoConfig(image, vision, replace(golden, weight_tying=True, additional_vocab_size=0), 64)
    made = Molmo(config).init_weights(0.3, torch.Generator().manual_seed(0))
    save_checkpoint(made, GOLDEN / "qwen" / "tokenizer.json", tmp_path / "checkpoint")
    files = export_with_optimum(tmp_path / "checkpoint", tmp_path / "graphs", COMPONENTS)
    ids = np.arange(golden.embedding_size)
    exact = made.decoder.embedding.detach().numpy()
    np.testing.assert_array_equal(run(files["embed_tokens"], {"ids": ids}), exact)


def test_without_optimum_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    monkeypatch.delitem(sys.modules, "molmo_edge.export.optimum")
    with pytest.raises(ExportError, match=r'pip install "molmo-edge\[optimum\]"'):
        import molmo_edge.export.optimum  # noqa: F401
