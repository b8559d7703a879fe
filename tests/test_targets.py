"""Graphs for other machines: ONNX's own operators alone, float16, and what runs where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exported import ARCHITECTURES, CASES, GOLDEN, bundle, case, costs, expected, greedy, prompt, relative, runtime
from onnx.reference import ReferenceEvaluator

from molmo_edge.checkpoints.bundle import open_bundle
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.export import ExportError, component_graphs, export_bundle
from molmo_edge.export import experts_graph as experts_module
from molmo_edge.export.activation_ranges import overflows
from molmo_edge.export.bundle_weights import load_bundle_weights
from molmo_edge.export.options import ExportOptions, check_options
from molmo_edge.export.targets import TARGETS
from molmo_edge.modeling import load_checkpoint
from molmo_edge.modeling.weights import save_checkpoint
from molmo_edge.runtimes import Unavailable, open_runtime
from molmo_edge.runtimes.onnx import OnnxRuntime
from molmo_edge.runtimes.providers import place

TOLERANCE = 1e-4


def operators(path: Path) -> set[tuple[str, str]]:
    return {(node.domain, node.op_type) for node in onnx.load(path, load_external_data=False).graph.node}


# ONNX's own operators.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_graphs_equal_the_reference(architecture: str) -> None:
    engine = runtime(architecture, plain=True)
    tensors, cases = expected(architecture)
    for name in CASES:
        c = case(architecture, name)
        embeddings = prompt(engine, c)
        cache = engine.new_cache(len(embeddings) + 24)
        assert relative(engine.forward(embeddings, cache), tensors[f"{name}.last_logits"]) < TOLERANCE
        assert greedy(engine, embeddings, 24) == cases[name]["generated_ids"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_graphs_are_valid_onnx(architecture: str, precision: str) -> None:
    """The checker knows no operator of ONNX Runtime's, not even those that it keeps in the standard domain."""
    opened = open_bundle(bundle(architecture, precision, plain=True))
    for component in ("vision_encoder", "connector", "embed_tokens", "decoder"):
        onnx.checker.check_model(onnx.load(opened.path(component)))
        assert {domain for domain, _ in operators(opened.path(component))} == {""}
        assert opened.components[component].operators == "onnx"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_plain_decoder_runs_without_onnx_runtime(architecture: str) -> None:
    """On onnx's own evaluator, numpy code that shares nothing with ONNX Runtime: a prompt, then a token behind it."""
    path = open_bundle(bundle(architecture, plain=True)).path("decoder")
    evaluator, engine = ReferenceEvaluator(str(path)), runtime(architecture)
    rows = engine.embed(np.arange(7))
    cache = engine.new_cache(9)
    buffers = {}
    for value in onnx.load(path).graph.input:
        if value.name.startswith("past_"):
            shape = [axis.dim_value or 9 for axis in value.type.tensor_type.shape.dim]
            buffers[value.name] = np.full(shape, np.nan, np.float32)  # what was not written must not be read
    for part in (rows[:5], rows[5:6], rows[6:]):
        exact = engine.forward(part, cache)
        feeds = {"embeddings": part[None], "total_length": np.array([cache.length], np.int32), **buffers}
        found = dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))
        assert relative(found["logits"][0], exact) < TOLERANCE
        buffers = {name: found[name.replace("past_", "present_")] for name in buffers}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_experts_one_by_one(precision: str, plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a model too large to compute all of its experts; the weights come back under their own names."""
    monkeypatch.setattr(experts_module, "WIDE_BELOW", 0)
    export_bundle(GOLDEN / "molmoe", tmp_path / "bundle", {"decoder": precision}, plain=plain, measure=False)
    decoder = open_bundle(tmp_path / "bundle").path("decoder")
    assert sum(node.op_type == "NonZero" for node in onnx.load(decoder).graph.node) == 2 * 8
    engine = OnnxRuntime(runtime("molmoe").config, {"decoder": decoder})
    c, tensors = case("molmoe", "square"), expected("molmoe")[0]
    rows = prompt(runtime("molmoe"), c)
    logits = engine.forward(rows, engine.new_cache(len(rows)))
    assert relative(logits, tensors["square.last_logits"]) < (TOLERANCE if precision == "fp32" else 0.08)
    if precision == "fp32":
        again, exact = load_bundle_weights(tmp_path / "bundle"), load_checkpoint(GOLDEN / "molmoe")[0]
        for name, parameter in exact.decoder.named_parameters():
            np.testing.assert_array_equal(parameter.detach(), again.decoder.get_parameter(name).detach())


@pytest.mark.parametrize("precision", ["q8", "q4", "mixed", "q4f16"])
def test_plain_has_no_blocks(precision: str) -> None:
    with pytest.raises(ExportError, match="in standard ONNX operators, only fp32, fp16, int8"):
        check_options(ExportOptions(precision, plain=True))


# float16.


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float16_graphs_run(architecture: str, plain: bool) -> None:
    """On a CPU, where ONNX Runtime takes the casts away that round what enters a product: only weights and caches are
    float16. Measured: KL at most 1.3e-7, 98.9 % same top tokens (one tie of 96).
    """
    kl, same = costs(architecture, runtime(architecture, "fp16", plain=plain))
    assert 0 <= kl < 1e-6
    assert same > 0.97


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the evaluator's sigmoid, for large negative numbers
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float16_costs_next_to_nothing(architecture: str) -> None:
    """From pixels to logits on onnx's own evaluator, which rounds everything that the graph says, as a GPU does.

    Measured: 0.0004 to 0.0017 of the largest logit over all nine cases, KL at most 2.0e-6.
    """
    opened, c = open_bundle(bundle(architecture, "fp16", plain=True)), case(architecture, "wide_text")

    def run(component: str, output: str, **feeds: np.ndarray) -> np.ndarray:
        return ReferenceEvaluator(str(opened.path(component))).run([output], feeds)[0]

    features = run("vision_encoder", "features", crops=c.crops)
    image = run("connector", "image_features", features=features, masks=c.masks.astype(np.float32))
    rows = run("embed_tokens", "embeddings", ids=c.ids.astype(np.int64)).astype(np.float32)
    rows[c.index[c.index >= 0]] += image[c.index >= 0]
    caches = {}
    for value in onnx.load(opened.path("decoder")).graph.input:
        if value.name.startswith("past_"):
            shape = [axis.dim_value or len(rows) for axis in value.type.tensor_type.shape.dim]
            caches[value.name] = np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
    total = np.array([len(rows)], np.int32)
    logits = run("decoder", "logits", embeddings=rows[None], total_length=total, **caches)[0]
    assert 0 < relative(logits, expected(architecture)[0]["wide_text.last_logits"]) < 0.002


def test_float16_graphs_multiply_and_remember_in_float16() -> None:
    opened = open_bundle(bundle("molmoe", "fp16"))
    half = onnx.TensorProto.FLOAT16
    for component in ("vision_encoder", "connector", "decoder"):
        graph = onnx.load(opened.path(component)).graph
        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        routers = ("mlp.gate.weight",)
        products = [node for node in graph.node if node.op_type == "MatMul" and not node.input[1].endswith(routers)]
        assert products
        assert all(types[node.input[1]] == half for node in products)
    decoder = onnx.load(opened.path("decoder")).graph
    caches = [value for value in (*decoder.input, *decoder.output) if value.name.startswith(("past_", "present_"))]
    assert len(caches) == 8
    assert all(value.type.tensor_type.elem_type == half for value in caches)


def test_what_float16_cannot_hold_stays_float32() -> None:
    """OLMo's residual stream feeds its matrices without a norm, and reaches a million in the golden model."""
    entry = json.loads((bundle("olmo", "fp16") / "molmo_edge.json").read_text())["components"]
    assert entry["decoder"]["largest_value"] > 65504
    kept = entry["decoder"]["kept_in_fp32"]
    assert kept
    assert all("blocks." in name for name in kept)
    graph = onnx.load(bundle("olmo", "fp16") / entry["decoder"]["file"]).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for name in kept:
        assert types[f"{name}.weight"] == onnx.TensorProto.FLOAT
    assert "kept_in_fp32" not in entry["vision_encoder"]
    assert 1 < entry["vision_encoder"]["largest_value"] < 16000


@pytest.mark.parametrize("plain", [False, True])
def test_attention_behind_what_stays_float32_does_too(plain: bool, tmp_path: Path) -> None:
    """Values a million times larger, and the matrix behind them so much smaller: the same model, not for float16."""
    model, _, config = load_checkpoint(GOLDEN / "qwen")
    d = config.decoder
    with torch.no_grad():
        attention = model.decoder.blocks[0].attn
        attention.att_proj.weight[-d.n_kv_heads * d.head_dim :] *= 1e6
        attention.att_proj.bias[-d.n_kv_heads * d.head_dim :] *= 1e6
        attention.attn_out.weight *= 1e-6
    save_checkpoint(model, GOLDEN / "qwen" / "tokenizer.json", tmp_path / "checkpoint")
    manifest = export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", {"decoder": "fp16"}, plain=plain)
    block = "model.transformer.blocks.0"
    assert {f"{block}.att_proj", f"{block}.attn_out"} <= set(manifest["components"]["decoder"]["kept_in_fp32"])
    graph = onnx.load(open_bundle(tmp_path / "bundle").path("decoder")).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    assert types["past_value.0"] == onnx.TensorProto.FLOAT
    assert types["past_value.1"] == onnx.TensorProto.FLOAT16
    rows = runtime("qwen").embed(np.arange(9))
    found = []
    for decoder in (open_bundle(tmp_path / "bundle").path("decoder"), bundle("qwen") / "decoder.onnx"):
        engine = OnnxRuntime(config, {"decoder": decoder})
        found.append(engine.forward(rows, engine.new_cache(9)))
    assert relative(*found) < 1e-3


def test_weights_that_give_no_numbers_are_refused(tmp_path: Path) -> None:
    model, _, _ = load_checkpoint(GOLDEN / "qwen")
    with torch.no_grad():
        model.decoder.blocks[1].ffn.ff_out.weight[0, 0] = float("nan")
    save_checkpoint(model, GOLDEN / "qwen" / "tokenizer.json", tmp_path / "checkpoint")
    with pytest.raises(ExportError, match="outputs NaN or Inf"):
        export_bundle(tmp_path / "checkpoint", tmp_path / "bundle")
    with pytest.raises(ExportError, match="NaN or Inf"):
        export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", "q4", calibrate=GOLDEN)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"precision": "q4", "calibrate": GOLDEN}], ids=str)
def test_a_config_of_other_weights_is_a_sentence(options: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "qwen", tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"intermediate_size": 2 * config["intermediate_size"]}))
    with pytest.raises(MolmoEdgeError, match=r"config\.json|configuration"):
        export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", **options)


def test_too_large() -> None:
    values = {"a": 16000.0, "b": 17000.0, "c": float("inf"), "d": float("nan"), "e": 0.0}
    assert overflows(values) == {"b", "c", "d"}


def test_a_decoder_that_cannot_be_tried_is_refused_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(component_graphs, "MEASURED_BELOW", 1000)
    with pytest.raises(ExportError, match="may exceed float16's range"):
        export_bundle(GOLDEN / "olmo", tmp_path / "olmo", "q4f16")
    components = export_bundle(GOLDEN / "qwen", tmp_path / "qwen", "q4f16")["components"]
    assert components["decoder"]["largest_value"] is None
    assert components["vision_encoder"]["largest_value"] > 0


# Targets.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_target_answers(architecture: str, target: str) -> None:
    """On the CPU, which has all of their operators. Measured: as q4 (cuda, tensorrt) or mixed (the others)."""
    engine = runtime(architecture, None, target=target)
    kl, same = costs(architecture, engine)
    bound = {"cuda": 0.07, "tensorrt": 0.07}.get(target, 0.014)
    print(f"{architecture} {target}: same top token {same:.1%}, mean KL {kl:.2g}, 96 positions")
    assert 0 < kl < bound
    assert same > 0.55
    manifest = json.loads((bundle(architecture, None, target=target) / "molmo_edge.json").read_text())
    assert manifest["target"]["name"] == target
    assert manifest["target"]["defaults"]
    for name, word in TARGETS[target].precision.items():
        assert manifest["components"][name]["precision"] == word


def test_an_option_overrides_the_target() -> None:
    plan = check_options(ExportOptions({"decoder": "fp16"}, target="cuda"))
    assert plan.precision == dict(TARGETS["cuda"].precision, decoder="fp16")
    with pytest.raises(ExportError, match="supported: cpu-x86, cpu-arm64, cuda, tensorrt, coreml"):
        check_options(ExportOptions(target="tpu"))
    with pytest.raises(ExportError, match="vision_encoder cannot be q8"):
        check_options(ExportOptions({"vision_encoder": "q8"}, target="coreml"))


@pytest.mark.parametrize("target", ["tensorrt", "coreml"])
def test_engines_without_fused_operators_get_plain_graphs(target: str) -> None:
    opened = open_bundle(bundle("molmoe", None, target=target))
    assert opened.device == target
    for component in ("vision_encoder", "connector"):
        assert {domain for domain, _ in operators(opened.path(component))} == {""}
    assert ("com.microsoft", "GroupQueryAttention") in operators(opened.path("decoder"))


ALL = {"CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider", "CoreMLExecutionProvider"}


@pytest.mark.parametrize(
    ("device", "made_for", "available", "where"),
    [
        ("auto", "cpu", ALL, "cpu"),
        ("auto", "cuda", ALL, "cuda"),
        ("auto", "cuda", {"CPUExecutionProvider"}, "cpu"),
        ("auto", "tensorrt", ALL - {"TensorrtExecutionProvider"}, "cuda"),
        ("auto", "tensorrt", {"CPUExecutionProvider"}, "cpu"),
        ("auto", "elsewhere", ALL, "cpu"),  # a target of a later version
        ("cpu", "cuda", ALL, "cpu"),
        ("cuda", "cpu", ALL, "cuda"),
        ("tensorrt", "cuda", ALL, "tensorrt"),
        ("coreml", "cpu", ALL, "coreml"),
    ],
)
def test_what_runs_where(device: str, made_for: str, available: set[str], where: str) -> None:
    config = runtime("molmoe").config
    placement = place(device, made_for, available, config)
    names = {part: [name for name, _ in placement.of(part)] for part in ("vision_encoder", "embed_tokens", "decoder")}
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    first = {"cpu": [], "cuda": [cuda], "tensorrt": ["TensorrtExecutionProvider", cuda]}
    first["coreml"] = ["CoreMLExecutionProvider"]
    assert placement.device == where
    assert names["vision_encoder"] == [*first[where], cpu]
    assert names["embed_tokens"] == [cpu]
    assert names["decoder"] == ([cuda, cpu] if where in ("cuda", "tensorrt") else [cpu])
    assert placement.cache == ("cuda" if where in ("cuda", "tensorrt") else "cpu")


def test_tensorrt_is_told_its_shapes() -> None:
    placement = place("tensorrt", "cpu", ALL, runtime("molmoe").config)
    options = dict(placement.of("connector")[0][1])
    width = runtime("molmoe").config.vision.feature_dim
    assert options["trt_profile_min_shapes"] == f"features:1x576x{width},masks:1x576"
    # Engines are kept by the names of files and nodes, which all bundles share.
    folders = {
        dict(place("tensorrt", "cpu", ALL, runtime("molmoe").config, identity).of("connector")[0][1])[key]
        for identity in ("one", "other")
        for key in ("trt_engine_cache_path", "trt_timing_cache_path")
    }
    assert len(folders) == 2
    assert options["trt_profile_max_shapes"] == f"features:37x576x{width},masks:37x576"


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("cuda", "no CUDAExecutionProvider .* install onnxruntime-gpu"),
        ("tensorrt", "no TensorrtExecutionProvider"),
        ("coreml", "no CoreMLExecutionProvider"),
        ("mps", 'use device="coreml" on a Mac'),
        ("vulkan", "molmo-edge export --engine gguf"),
    ],
)
def test_a_provider_that_is_not_there(device: str, says: str) -> None:
    with pytest.raises(Unavailable, match=says):
        open_runtime(bundle("qwen"), device=device)
    if device in ("tensorrt", "coreml", "vulkan"):
        with pytest.raises(Unavailable, match="--engine gguf" if device == "vulkan" else f"--target {device}"):
            open_runtime(GOLDEN / "qwen", device=device)


def test_a_provider_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime itself goes on with the CPU and prints a warning."""
    import onnxruntime

    class Session:
        def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
            pass

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    config, decoder = runtime("qwen").config, bundle("qwen") / "decoder.onnx"  # exported with real sessions
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    engine = OnnxRuntime(config, {"decoder": decoder}, placement=place("cuda", "cpu", ALL, config))
    with pytest.raises(Unavailable, match="has CUDAExecutionProvider but cannot start it"):
        engine.new_cache(4)
    engine.close()
