"""The experts that routers choose: equal on every engine for equal weights, and read where they are chosen."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported import EXACT, GOLDEN, bundle, gguf_bundle, gguf_runtime, relative, runtime

import molmo_edge.export.component_graphs as component_graphs
import molmo_edge.export.experts_graph as experts_module
import molmo_edge.modeling.bitsandbytes as bitsandbytes_module
import molmo_edge.modeling.decoder as decoder_module
from molmo_edge.checkpoints.bundle import open_bundle
from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.evaluation.routing import agreement, router_choices, top_experts, with_router_outputs
from molmo_edge.export import export_bundle
from molmo_edge.export.graph_builder import Graph, Linear, fp32_linear
from molmo_edge.export.int4_graph import Int4
from molmo_edge.export.int8_graph import int8_linear, q8_linear
from molmo_edge.runtimes import EngineError, LlamaOptions, Unavailable

MOLMOE = GOLDEN / "molmoe"
CONFIG = read_config(MOLMOE).decoder
needs_llama = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not here")


@functools.cache
def prompts() -> list[np.ndarray]:
    """One longer than a chunk of 512, one shorter than the sequences of a llama_context, one of a single row.

    The seed gives no near ties: the last chosen expert is always at least 3e-4 more likely than the next, while the
    engines differ by 5e-7 in float32.
    """
    rng = np.random.default_rng(35)
    rows = [runtime("molmoe").embed(rng.integers(0, 500, n)) for n in (600, 3, 1)]
    return [row + rng.normal(scale=row.std(), size=row.shape).astype(np.float32) for row in rows]


@functools.cache
def exact() -> list[np.ndarray]:
    return choices(MOLMOE)


def choices(model: Path, **options: object) -> list[np.ndarray]:
    found = router_choices(model, prompts(), threads=2, **options)  # type: ignore[arg-type]
    assert found is not None
    return found


def assert_equal(found: list[np.ndarray]) -> None:
    for one, other in zip(found, exact(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_choices_are_top_k_experts_of_every_layer_and_position() -> None:
    for found, rows in zip(exact(), prompts(), strict=True):
        assert found.shape == (CONFIG.n_layers, len(rows), CONFIG.top_k)
        assert (np.diff(found, axis=-1) > 0).all()  # ascending, none twice
        assert found.min() >= 0
        assert found.max() < CONFIG.n_experts
    assert len(np.unique(exact()[0])) == CONFIG.n_experts  # so that equal choices say something


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4"])
def test_pytorch_runs_the_experts_that_are_read(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_by = []

    def watched(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        weights, experts = original(logits, top_k)
        run_by.append(experts.sort(dim=-1).values.numpy())
        return weights, experts

    original = decoder_module.choose_experts
    for module in (decoder_module, bitsandbytes_module):
        monkeypatch.setattr(module, "choose_experts", watched)
    found = choices(MOLMOE, precision=precision)
    layers = (layer for prompt in found for layer in prompt)
    for one, other in zip(layers, run_by, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("plain", [False, True])  # plain attention has softmaxes of its own
@pytest.mark.parametrize("wide", [True, False])
def test_an_onnx_decoder_in_fp32_chooses_as_pytorch_does(
    wide: bool, plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_module, "WIDE_BELOW", 1 << 40 if wide else 0)
    export_bundle(MOLMOE, tmp_path / "bundle", plain=plain)
    assert_equal(choices(tmp_path / "bundle"))


@pytest.mark.parametrize("precision", ["fp32", "q4"])
def test_external_weights_are_used_in_place(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(component_graphs, "SIDECAR_ABOVE", 10_000)
    monkeypatch.setattr("molmo_edge.export.graph_builder.INLINE_BELOW", 256)
    export_bundle(MOLMOE, tmp_path / "bundle", {"decoder": precision}, measure=False)
    opened = open_bundle(tmp_path / "bundle")
    (data,) = tmp_path.glob("bundle/decoder*.onnx.data")
    graph, _ = with_router_outputs(opened.path("decoder"), CONFIG)
    assert len(graph) < 60_000 < data.stat().st_size
    before = {path.name for path in opened.directory.iterdir()}
    found = choices(opened.directory)
    assert {path.name for path in opened.directory.iterdir()} == before
    for one, inside in zip(found, choices(bundle("molmoe", precision)), strict=True):
        np.testing.assert_array_equal(one, inside)
    if precision == "fp32":
        assert_equal(found)


# ModelLoss: 0.993, 0.993, 0.977, 0.936.
@pytest.mark.parametrize(("precision", "least"), [("int8", 0.985), ("q8", 0.985), ("mixed", 0.965), ("q4", 0.92)])
def test_a_quantized_onnx_decoder_chooses_nearly_the_same(precision: str, least: float) -> None:
    decoder = open_bundle(bundle("molmoe", precision)).path("decoder")
    fused = sum(node.op_type == "QMoE" for node in onnx.load(decoder).graph.node)
    assert fused == (CONFIG.n_layers if precision in ("mixed", "q4") else 0)
    assert least < agreement(exact()[0], choices(bundle("molmoe", precision))[0]) < 1


def own_top_k(path: Path, rows: np.ndarray) -> np.ndarray:
    """The sorted outputs of a decoder's TopK nodes: [n_layers, n, top_k]."""
    model = onnx.load(path)
    names = [node.output[1] for node in model.graph.node if node.op_type == "TopK"]
    assert len(names) == CONFIG.n_layers
    shape: list[int | str | None] = [1, "n", CONFIG.top_k]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, shape) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"embeddings": rows[None], "total_length": np.array([len(rows)], np.int32)}
    for past in session.get_inputs():
        if past.name.startswith("past_"):
            number = np.float16 if past.type == "tensor(float16)" else np.float32
            feeds[past.name] = np.zeros([len(rows) if s == "capacity" else s for s in past.shape], number)
    return np.sort(np.concatenate(session.run(names, feeds)), axis=-1)


@pytest.mark.parametrize("precision", ["int8", "fp16", "q4f16"])
def test_an_onnx_decoder_runs_the_experts_that_are_read(precision: str) -> None:
    rows = prompts()[0][:100]
    found = router_choices(bundle("molmoe", precision), [rows], threads=2)
    assert found is not None
    np.testing.assert_array_equal(found[0], own_top_k(open_bundle(bundle("molmoe", precision)).path("decoder"), rows))


def test_qmoe_uses_the_probabilities_that_are_read() -> None:
    path = open_bundle(bundle("molmoe", "q4")).path("decoder")
    nodes = onnx.load(path).graph.node
    made_by = {output: node for node in nodes for output in node.output}
    picked = [made_by[node.input[1]].input[0] for node in nodes if node.op_type == "QMoE"]  # in front of a Reshape
    assert picked == with_router_outputs(path, CONFIG)[1]


def four_bits(graph: Graph, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None) -> str:
    return Int4().linear(graph, x, name, weight, bias)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("linear", [fp32_linear, int8_linear, q8_linear, four_bits])
def test_a_router_is_found_in_every_precision(linear: Linear, plain: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    path, d = routers(tmp_path, linear, plain=plain), dataclasses.replace(CONFIG, n_layers=2)
    serialized, outputs = with_router_outputs(path, d)
    assert outputs == ["router.0", "router.1"]
    if plain and linear in (q8_linear, four_bits):
        return  # in no operator of ONNX's own: nothing that an export makes
    session = onnxruntime.InferenceSession(serialized, providers=["CPUExecutionProvider"])
    found = session.run(outputs, {"x": rng.normal(size=(1, 3, CONFIG.d_model)).astype(np.float32)})
    np.testing.assert_allclose(np.stack(found).sum(axis=-1), 1, rtol=1e-5)


def routers(directory: Path, linear: Linear, *, plain: bool = False, softmaxes: int = 1) -> Path:
    """A graph of two routers in reverse order, after a softmax like that of attention."""
    rng = np.random.default_rng(0)
    graph = Graph("decoder", plain=plain)
    x = graph.input("x", np.float32, [1, "n", CONFIG.d_model])
    x = graph.node("Softmax", x, axis=-1)
    for layer in (1, 0):
        weight = rng.normal(size=(CONFIG.n_experts, CONFIG.d_model)).astype(np.float32)
        logits = linear(graph, x, f"model.transformer.blocks.{layer}.mlp.gate", weight, None)
        for i in range(softmaxes):
            graph.node("Softmax", logits, axis=-1, name=f"router.{layer}" + "." * i)
    graph.output(x, np.float32, [1, "n", CONFIG.d_model])
    graph.save(directory / "decoder.onnx")
    return directory / "decoder.onnx"


@pytest.mark.parametrize("softmaxes", [0, 2])
def test_a_graph_with_other_routers_is_refused(softmaxes: int, tmp_path: Path) -> None:
    path = routers(tmp_path, fp32_linear, softmaxes=softmaxes)
    with pytest.raises(EngineError, match=f"layer 0 has {softmaxes} softmaxes after .*blocks.0.mlp.gate.weight"):
        with_router_outputs(path, dataclasses.replace(CONFIG, n_layers=2))


@needs_llama
def test_a_gguf_in_f32_chooses_as_pytorch_does() -> None:
    for options in (EXACT, LlamaOptions(cache="f32"), None):
        assert_equal(choices(gguf_bundle("molmoe", "f32"), engine_options=options))


# ModelLoss: 0.994, 0.978.
@needs_llama
@pytest.mark.parametrize(("precision", "least"), [("q8_0", 0.985), ("q4_k_m", 0.965)])
def test_a_quantized_gguf_chooses_nearly_the_same(precision: str, least: float) -> None:
    assert least < agreement(exact()[0], choices(gguf_bundle("molmoe", precision))[0]) < 1


@needs_llama
def test_a_gguf_runs_the_experts_that_are_read() -> None:
    """llama.cpp's own top_k: the first columns of a sorted matrix of ids, [n, n_experts] in memory."""
    from molmo_edge.runtimes.llama import open_watched
    from molmo_edge.runtimes.llama_library import load_library
    from molmo_edge.runtimes.llama_states import tensor_reader

    read, own = tensor_reader(), {}

    @load_library().ggml_backend_sched_eval_callback
    def watch(tensor: int, ask: bool, _: object) -> bool:
        name, values = read(tensor, not ask)
        if name.startswith("ffn_moe_topk-") and not ask:
            ids = np.pad(values.view(np.int32), (0, -len(values) % CONFIG.n_experts)).reshape(-1, CONFIG.n_experts)
            own[name] = np.sort(ids[:, : CONFIG.top_k], axis=-1)
        return name.startswith("ffn_moe_topk-") or not ask

    directory, rows = gguf_bundle("molmoe", "q4_k_m"), prompts()[0][:100]
    open_watched(open_bundle(directory), watch, threads=2)(len(rows)).append(rows)
    found = router_choices(directory, [rows], threads=2)
    assert found is not None
    np.testing.assert_array_equal(found[0], np.stack([own[f"ffn_moe_topk-{i}"] for i in range(CONFIG.n_layers)]))


@needs_llama
def test_a_watched_decoder_gives_the_same_logits() -> None:
    from molmo_edge.runtimes.llama import open_watched
    from molmo_edge.runtimes.llama_library import load_library

    rows, engine = prompts()[0], gguf_runtime("molmoe", "f32")
    seen: list[bool] = []
    watch = load_library().ggml_backend_sched_eval_callback(lambda _tensor, ask, _: seen.append(ask) or not ask)
    directory = gguf_bundle("molmoe", "f32")
    cache = open_watched(open_bundle(directory), watch, threads=2, options=EXACT)(len(rows) + 1)
    assert relative(cache.append(rows), engine.forward(rows, engine.new_cache(len(rows)))) < 1e-5
    assert seen
    assert all(seen)
    twin = cache.copy()
    assert relative(twin.append(rows[:1]), cache.append(rows[:1])) < 1e-5


def engines() -> list[Path]:
    ggufs = [gguf_bundle("molmoe", "f32")] if importlib.util.find_spec("llama_cpp") else []
    return [MOLMOE, bundle("molmoe"), *ggufs]


def test_a_dense_decoder_has_no_choices() -> None:
    for model in (GOLDEN / "qwen", bundle("qwen")):
        assert router_choices(model, prompts()) is None


@needs_llama
def test_a_dense_gguf_has_no_choices() -> None:
    assert router_choices(gguf_bundle("qwen", "f16"), prompts()) is None


def test_rows_that_do_not_fit_are_refused() -> None:
    for model in engines():
        for rows, why in (
            (np.zeros((3, CONFIG.d_model + 1), np.float32), r"shape \[n, 32\], not \[3, 33\]"),
            (np.zeros(CONFIG.d_model, np.float32), r"not \[32\]"),
            (np.zeros((0, CONFIG.d_model), np.float32), "0 positions"),
            (np.zeros((CONFIG.max_position_embeddings + 1, CONFIG.d_model), np.float32), "the model's context has"),
            (np.full((3, CONFIG.d_model), np.nan, np.float32), "NaN or Inf"),
        ):
            with pytest.raises(EngineError, match=why):
                router_choices(model, [rows])


def test_missing_models_and_packages_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MolmoEdgeError, match="neither a bundle"):
        router_choices(tmp_path, prompts())
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(Unavailable, match=r'pip install "molmo-edge\[export\]"'):
        router_choices(bundle("molmoe"), prompts())


def test_ties_choose_the_lower_ids() -> None:
    probabilities = np.array([[[0.2, 0.3, 0.2, 0.1, 0.2], [0.2, 0.2, 0.2, 0.2, 0.2]]], np.float32)
    assert top_experts(probabilities, 2).tolist() == [[[0, 1], [0, 1]]]
    assert top_experts(probabilities, 3).tolist() == [[[0, 1, 2], [0, 1, 2]]]


def test_agreement_counts_choices() -> None:
    a = np.array([[[0, 1], [2, 3]]])
    for b, share in (
        ([[[0, 1], [2, 3]]], 1.0),
        ([[[1, 0], [3, 2]]], 1.0),  # in any order
        ([[[0, 5], [2, 3]]], 0.75),
        ([[[5, 0], [2, 6]]], 0.5),
        ([[[2, 3], [0, 1]]], 0.0),  # at the other position
    ):
        assert agreement(a, np.array(b)) == share
    assert agreement(a, np.array([[[0, 1, 7], [3, 4, 5]]])) == 0.75  # of more experts
    for wrong in (np.zeros((1, 3, 2)), np.zeros((2, 2, 2))):
        with pytest.raises(ValueError, match="different layers or positions"):
            agreement(a, wrong)
    for one in exact():
        assert agreement(one, one) == 1
