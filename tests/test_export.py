"""The exported graphs against the reference's own numbers, and the bundle they are written into."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported import ARCHITECTURES, CASES, GOLDEN, bundle, case, expected, greedy, prompt, relative, runtime
from safetensors.numpy import load_file, save_file
from torch import nn

import molmo_edge.export.component_graphs as component_graphs
from molmo_edge.checkpoints.bundle import open_bundle
from molmo_edge.checkpoints.hub_config import read_config, to_hub_config
from molmo_edge.checkpoints.tensor_sources import CheckpointError
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.config import DecoderConfig, ImageConfig, MolmoConfig, VisionConfig
from molmo_edge.export import CheckPhoto, ExportError, export_bundle
from molmo_edge.export.graph_builder import FP32, Graph
from molmo_edge.export.vision_graph import vision_encoder
from molmo_edge.frontend.image_files import ImageError
from molmo_edge.frontend.prompts import PromptError
from molmo_edge.presets import PRESETS
from molmo_edge.runtimes import open_runtime
from molmo_edge.runtimes.onnx import OnnxRuntime

TOLERANCE = 1e-4  # relative to the largest value: the one the golden values come with


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_reference(architecture: str, name: str) -> None:
    engine, c = runtime(architecture), case(architecture, name)
    tensors, cases = expected(architecture)
    patches = engine.encode_crops(c.crops)
    assert relative(patches[:, ::29], tensors[f"{name}.vit_features_sample"]) < TOLERANCE
    assert relative(engine.connect(patches, c.masks), tensors[f"{name}.image_features"]) < TOLERANCE

    embeddings = prompt(engine, c)
    cache = engine.new_cache(len(embeddings))
    assert relative(engine.forward(embeddings, cache), tensors[f"{name}.last_logits"]) < TOLERANCE

    cache = engine.new_cache(len(embeddings))
    chunks = np.split(embeddings, range(1, len(embeddings), 16))  # ends at 0, 16, 32, ...
    sampled = tensors[f"{name}.logits_every_16th"]
    logits = np.stack([engine.forward(chunk, cache) for chunk in chunks[: len(sampled)]])
    assert relative(logits, sampled) < TOLERANCE
    assert greedy(engine, embeddings, 24) == cases[name]["generated_ids"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_equal_the_reference(architecture: str) -> None:
    """Inside of the decoder, too: what goes into its last block."""
    engine, c = runtime(architecture), case(architecture, "wide_text")
    d = engine.config.decoder
    model = onnx.load(bundle(architecture) / "decoder.onnx")
    block = f"model.transformer.blocks.{d.n_layers - 2}"
    model.graph.output.append(onnx.helper.make_tensor_value_info(block, onnx.TensorProto.FLOAT, [1, "n", d.d_model]))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    embeddings = prompt(engine, c)
    feeds = {"embeddings": embeddings[None], "total_length": np.array([len(embeddings)], np.int32)}
    for value in session.get_inputs():
        if value.name.startswith("past_"):
            feeds[value.name] = np.zeros([len(embeddings) if s == "capacity" else s for s in value.shape], np.float32)
    hidden = session.run([block], feeds)[0][0]
    exact = expected(architecture)[0]["wide_text.hidden_before_last_block"]
    assert relative(hidden[::8], exact) < TOLERANCE


def test_only_an_all_padding_crop_is_zeroed() -> None:
    engine, c = runtime("molmoe"), case("molmoe", "square")
    crops = c.crops[:2].copy()
    crops[0] = -1
    crops[1, :-1] = -1  # all patches but one: still an image
    features = engine.encode_crops(crops)
    assert not features[0].any()
    assert features[1].any(axis=-1).all()


def test_weights_keep_their_hub_names() -> None:
    weights = {w.name: w for w in onnx.load(bundle("molmoe") / "decoder.onnx").graph.initializer}
    stored = onnx.numpy_helper.to_array(weights["model.transformer.blocks.0.attn.att_proj.weight"])
    source = open_tensors(GOLDEN / "molmoe").get("model.transformer.blocks.0.attn.att_proj.weight")
    np.testing.assert_array_equal(stored, source.T)


# DINOv2, which no golden checkpoint has, against a plain implementation in torch.

DINO = VisionConfig("dino", 32, 4, 4, 48, 17, norm_eps=1e-6, activation="gelu", layers=(-2, -4))
CONFIG = MolmoConfig(
    ImageConfig(crop_size=56, overlap_margins=(0, 0), resize="dino"), DINO, PRESETS["nano"].decoder, 64
)


class Tensors(dict[str, np.ndarray]):
    """A TensorSource in memory."""

    def names(self) -> list[str]:
        return list(self)

    def shape(self, name: str) -> tuple[int, ...]:
        return self[name].shape

    def get(self, name: str) -> np.ndarray:  # type: ignore[override]
        return self[name]


def random_dino() -> Tensors:
    rng = np.random.default_rng(0)
    d, hub = DINO.d_model, "model.vision_backbone.image_vit"
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (d,),
        "positional_embedding": (DINO.n_pos, d),
        "patch_embedding.weight": (d, 588),
        "patch_embedding.bias": (d,),
    }
    for n in range(DINO.n_layers):
        block = f"transformer.resblocks.{n}"
        for part in ("attention.wq", "attention.wk", "attention.wv", "attention.wo"):
            shapes |= {f"{block}.{part}.weight": (d, d), f"{block}.{part}.bias": (d,)}
        shapes |= {f"{block}.feed_forward.w1.weight": (48, d), f"{block}.feed_forward.w1.bias": (48,)}
        shapes |= {f"{block}.feed_forward.w2.weight": (d, 48), f"{block}.feed_forward.w2.bias": (d,)}
        for part in ("attention_norm.weight", "attention_norm.bias", "ffn_norm.weight", "ffn_norm.bias"):
            shapes[f"{block}.{part}"] = (d,)
        shapes |= {f"{block}.lambda1": (d,), f"{block}.lambda2": (d,)}
    return Tensors({f"{hub}.{k}": (rng.normal(size=s) * 0.3).astype(np.float32) for k, s in shapes.items()})


@torch.inference_mode()
def torch_dino(tensors: Tensors, crops: np.ndarray) -> np.ndarray:
    t = {k.removeprefix("model.vision_backbone.image_vit."): torch.from_numpy(v) for k, v in tensors.items()}
    x = torch.from_numpy(crops) @ t["patch_embedding.weight"].T + t["patch_embedding.bias"]
    x = torch.cat([t["class_embedding"].expand(len(x), 1, -1), x], dim=1) + t["positional_embedding"]
    outputs = []
    for n in range(DINO.n_layers):
        w = {k.removeprefix(f"transformer.resblocks.{n}."): v for k, v in t.items() if f"resblocks.{n}." in k}
        norm = nn.functional.layer_norm(x, (32,), w["attention_norm.weight"], w["attention_norm.bias"], 1e-6)
        attention = nn.MultiheadAttention(32, DINO.n_heads, batch_first=True).eval()
        parts = ("wq", "wk", "wv")
        attention.in_proj_weight.copy_(torch.cat([w[f"attention.{p}.weight"] for p in parts]))
        attention.in_proj_bias.copy_(torch.cat([w[f"attention.{p}.bias"] for p in parts]))
        attention.out_proj.weight.copy_(w["attention.wo.weight"])
        attention.out_proj.bias.copy_(w["attention.wo.bias"])
        x = x + w["lambda1"] * attention(norm, norm, norm, need_weights=False)[0]
        norm = nn.functional.layer_norm(x, (32,), w["ffn_norm.weight"], w["ffn_norm.bias"], 1e-6)
        h = nn.functional.gelu(norm @ w["feed_forward.w1.weight"].T + w["feed_forward.w1.bias"])
        x = x + w["lambda2"] * (h @ w["feed_forward.w2.weight"].T + w["feed_forward.w2.bias"])
        outputs.append(x[:, 1:])
    return torch.cat([outputs[layer] for layer in DINO.layers], dim=-1).numpy()


def test_dino_equals_torch(tmp_path: Path) -> None:
    tensors = random_dino()
    crops = np.random.default_rng(1).normal(size=(3, 16, 588)).astype(np.float32)
    exact = torch_dino(tensors, crops)
    for name in [name for name in tensors if "resblocks.3." in name]:
        del tensors[name]  # the last block is not used, so it need not even be there
    graph = Graph("vision_encoder")
    vision_encoder(graph, CONFIG, tensors, FP32)
    graph.save(tmp_path / "vision.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "vision.onnx", providers=["CPUExecutionProvider"])
    assert relative(session.run(None, {"crops": crops})[0], exact) < 1e-5


def tiny_checkpoint(directory: Path, **decoder: Any) -> MolmoConfig:
    """A checkpoint in MolmoE's dialect made from the golden dense one, with a decoder of another make."""
    tensors = load_file_as_float(GOLDEN / "qwen")
    config = read_config(GOLDEN / "qwen")
    values = {**config.decoder.__dict__, **decoder}
    config = MolmoConfig(config.image, config.vision, DecoderConfig(**values), config.projector_dim)
    raw, preprocessor = to_hub_config(config)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(raw))
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (directory / "tokenizer.json").write_bytes((GOLDEN / "qwen" / "tokenizer.json").read_bytes())
    if config.decoder.weight_tying:
        del tensors["model.transformer.ff_out.weight"]
    save_file(tensors, directory / "model.safetensors")
    return config


def load_file_as_float(directory: Path) -> dict[str, np.ndarray]:
    source = open_tensors(directory)
    return {name: np.array(source.get(name)) for name in source.names()}


def test_tied_head_is_the_embedding(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "tied", weight_tying=True)
    export_bundle(tmp_path / "tied", tmp_path / "bundle")
    engine = open_runtime(tmp_path / "bundle", threads=1)
    untied = runtime("qwen")
    row = untied.embed(np.array([7]))
    logits = engine.forward(row, engine.new_cache(1))
    weights = onnx.load(tmp_path / "bundle" / "decoder.onnx").graph.initializer
    (head,) = [onnx.numpy_helper.to_array(w) for w in weights if w.name == "model.transformer.wte.embedding.weight"]
    source = open_tensors(GOLDEN / "qwen")
    np.testing.assert_array_equal(head.T, source.get("model.transformer.wte.embedding"))
    # The blocks are the same, so both heads see one vector: solve it from the untied logits.
    exact = untied.forward(row, untied.new_cache(1))
    hidden = np.linalg.lstsq(source.get("model.transformer.ff_out.weight"), exact, rcond=None)[0]
    assert relative(logits, head.T @ hidden) < TOLERANCE


# The bundle.


def test_manifest_describes_the_bundle() -> None:
    opened = open_bundle(bundle("qwen", "int8"), hashes=True)
    config = read_config(GOLDEN / "qwen")
    assert opened.config == config
    assert opened.manifest.special_ids.im_patch > 0
    words = {"vision_encoder": "int8", "connector": "q8", "embed_tokens": "int8", "decoder": "int8"}
    for name, word in words.items():
        component = opened.components[name]
        assert (component.engine, component.precision, component.file) == ("onnx", word, f"{name}_{word}.onnx")
        error = opened.components[name].relative_error
        assert error is not None
        assert 0 < error < 0.1
    assert (opened.directory / "tokenizer.json").read_bytes() == (GOLDEN / "qwen" / "tokenizer.json").read_bytes()


def test_large_weights_go_to_a_sidecar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(component_graphs, "SIDECAR_ABOVE", 100_000)
    monkeypatch.setattr("molmo_edge.export.graph_builder.INLINE_BELOW", 2048)
    export_bundle(GOLDEN / "olmo", tmp_path / "bundle")
    opened = open_bundle(tmp_path / "bundle", hashes=True)
    assert opened.components["decoder_data"].file == "decoder.onnx.data"
    assert opened.components["decoder"].bytes < 20_000
    engine, c = open_runtime(tmp_path / "bundle", threads=2), case("olmo", "wide_text")
    assert isinstance(engine, OnnxRuntime)
    np.testing.assert_array_equal(prompt(engine, c), prompt(runtime("olmo"), c))
    assert greedy(engine, prompt(engine, c), 24) == expected("olmo")[1]["wide_text"]["generated_ids"]


def test_tied_weights_count_in_the_size_of_the_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is written once more, and may be what takes the graph past 2 GB."""
    config = tiny_checkpoint(tmp_path / "tied", weight_tying=True)
    tensors = open_tensors(tmp_path / "tied")
    blocks = sum(tensors.get(name).nbytes for name in tensors.names() if ".transformer.blocks." in name)
    monkeypatch.setattr(component_graphs, "SIDECAR_ABOVE", blocks + 1)
    path = tmp_path / "decoder.onnx"
    graph = component_graphs.build_component("decoder", path, config, tensors, FP32)
    assert graph.sidecar == tmp_path / "decoder.onnx.data"


@pytest.mark.parametrize(
    ("image", "question", "error"),
    [("missing.jpg", "What is it?", ImageError), ("coffee.png", " ", PromptError)],
)
def test_a_check_that_cannot_be_answered_is_refused_first(
    image: str, question: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for component in component_graphs.BUILDERS:
        monkeypatch.setitem(component_graphs.BUILDERS, component, lambda *_: pytest.fail("the conversion was begun"))
    with pytest.raises(error):
        export_bundle(GOLDEN / "qwen", tmp_path / "bundle", check=CheckPhoto(GOLDEN / image, question))
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(component_graphs.BUILDERS, "decoder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(GOLDEN / "qwen", tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="exists already"):
        export_bundle(GOLDEN / "qwen", tmp_path)


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("int3", "'int3' is not a supported"),
        ({"decoder": "fp8"}, "'fp8' is not a supported"),
        ({"tail": "int8"}, "'tail' is not a supported component"),
        ({"head": "fp16"}, "not a supported precision for head"),
    ],
)
def test_unknown_precisions_are_refused(tmp_path: Path, precision: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export_bundle(GOLDEN / "qwen", tmp_path / "bundle", precision)


def test_precisions_mix(tmp_path: Path) -> None:
    manifest = export_bundle(GOLDEN / "qwen", tmp_path / "bundle", {"vision_encoder": "int8", "decoder": "q8"})
    found = {name: entry.get("precision") for name, entry in manifest["components"].items()}
    assert found == {
        "vision_encoder": "int8",
        "connector": "fp32",
        "embed_tokens": "fp32",
        "decoder": "q8",
        "tokenizer": None,
    }
    written = json.loads((tmp_path / "bundle" / "molmo_edge.json").read_text())
    assert written["components"] == manifest["components"]


def test_weights_of_another_config_are_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "wrong", ffn_dim=40)
    with pytest.raises(CheckpointError, match=r"ff_proj.weight has shape \[96, 32\], but the configuration requires"):
        export_bundle(tmp_path / "wrong", tmp_path / "bundle")
    tiny_checkpoint(tmp_path / "deeper", n_layers=3)
    with pytest.raises(CheckpointError, match=r"blocks\.2"):
        export_bundle(tmp_path / "deeper", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


# The reader that export and the torch loader share.


def test_safetensors_are_read_as_the_library_does(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray] = {
        "f32": np.arange(6, dtype=np.float32).reshape(2, 3),
        "f16": np.array([1.5, -2.25], np.float16),
        "f64": np.array(0.5),
        "empty": np.zeros((0, 4), np.float32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    source = open_tensors(tmp_path)
    for name, exact in load_file(tmp_path / "model.safetensors").items():
        assert source.shape(name) == exact.shape
        assert source.get(name).dtype == np.float32
        np.testing.assert_array_equal(source.get(name), exact)


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    whole = load_file_as_float(GOLDEN / "qwen")
    names = sorted(whole)
    weight_map = {}
    for k, part in enumerate((names[::2], names[1::2])):
        save_file({name: whole[name] for name in part}, tmp_path / f"model-{k}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{k}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    source = open_tensors(tmp_path)
    assert sorted(source.names()) == names
    for name in names:
        np.testing.assert_array_equal(source.get(name), whole[name])

    index.write_text(json.dumps({"weight_map": {"a": "../model-0.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside of its directory"):
        open_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model-0.safetensors"}}))
    with pytest.raises(CheckpointError, match='no tensor "a"'):
        open_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model-9.safetensors"}}))
    with pytest.raises(CheckpointError, match="is missing"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("keep", [0.0, 0.00001, 0.5, 0.999])
def test_cut_checkpoints_are_refused(tmp_path: Path, name: str, keep: float) -> None:
    source = GOLDEN / ("molmoe-pickle" if name.endswith(".bin") else "qwen") / name
    content = source.read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=r"[Dd]ownload it again"):
        open_tensors(tmp_path)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"a": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a complete PyTorch state dict"):
        open_tensors(tmp_path)
    assert not (tmp_path / "sprung").exists()
