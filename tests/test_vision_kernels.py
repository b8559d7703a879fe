"""The change of a vision tower that puts the compiled kernels' layers and attention in it.

A tower rounds in every layer again, so that its features differ by less than its own rounding costs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from kernel_graphs import KERNELS, MICROSOFT, VISION, needs_kernels
from onnx import TensorProto, helper, numpy_helper
from test_quantize import norm_error

import molmo_edge.cli.doctor  # noqa: F401 - before onnxruntime, whose usage reports it switches off
from molmo_edge.checkpoints.tensor_names import hub_shapes
from molmo_edge.config import ImageConfig, MolmoConfig, VisionConfig
from molmo_edge.errors import EngineError
from molmo_edge.export.graph_builder import Graph
from molmo_edge.export.graph_precisions import graph_precision
from molmo_edge.export.vision_graph import vision_encoder
from molmo_edge.presets import PRESETS
from molmo_edge.runtimes import kernels
from molmo_edge.runtimes.onnx_sessions import load_session


def vision_graph(path: Path, precision: str = "int8", width: int = 64, **changed: Any) -> Path:
    """A small tower, in a large file's form: its weights may be beside it."""
    values = {"d_model": width, "n_layers": 2, "n_heads": 4, "mlp_dim": 96, "n_pos": 50, "layers": (-1, -2)}
    vision = VisionConfig(**{**values, **changed})
    config = MolmoConfig(ImageConfig(crop_size=98, overlap_margins=(0, 0)), vision, PRESETS["nano"].decoder, 64)
    rng = np.random.default_rng(4)
    tensors = {
        name: rng.normal(float(name.endswith("norm.weight")), shape[-1] ** -0.5, shape).astype(np.float32)
        for name, shape in hub_shapes(config).items()
        if "vision_backbone.image_vit" in name
    }
    graph = Graph("vision_encoder", path.with_name(f"{path.name}.data"))
    vision_encoder(graph, config, tensors, graph_precision(precision))
    graph.save(path)
    return path


def operators_of(encoded: bytes) -> dict[tuple[str, str], int]:
    nodes = [(node.op_type, node.domain) for node in onnx.load_from_string(encoded).graph.node]
    return {kind: nodes.count(kind) for kind in nodes}


def test_a_tower_becomes_layers_and_attention(tmp_path: Path) -> None:
    path = vision_graph(tmp_path / "v.onnx")
    changed = kernels.moved(path.read_bytes())
    assert changed is not None
    found, own = operators_of(changed.model), kernels.DOMAIN
    # The patch embedding; q, k, v, the output and two layers of an MLP in each of two blocks; one rounding for q, k, v.
    assert (found["QuantizedLinear", own], found["QuantizeRows", own], found["MultiHeadAttention", own]) == (13, 9, 2)
    assert not {"MatMulIntegerToFloat", "QuickGelu", "Div", "Max", "Abs"} & {operator for operator, _ in found}
    assert found["Add", ""] == 1  # positions; the residuals are part of layers
    without = kernels.moved(path.read_bytes(), ("QuantizedLinear",))
    assert without is not None
    assert ("MultiHeadAttention", MICROSOFT) in operators_of(without.model)
    assert kernels.moved(path.read_bytes(), ("MatMulNBits", "QMoE", "MultiHeadAttention")) is None
    for precision in ("fp32", "q8", "fp16"):
        assert kernels.moved(vision_graph(tmp_path / "w.onnx", precision).read_bytes(), kernels.OPERATORS) is None
    narrow = vision_graph(tmp_path / "n.onnx", mlp_dim=80)  # w1 is too narrow, and w2 takes its output
    changed = kernels.moved(narrow.read_bytes())
    assert changed is not None
    found = operators_of(changed.model)
    assert (found["QuantizedLinear", own], found["MatMulIntegerToFloat", MICROSOFT]) == (11, 2)


def test_values_that_others_read_stay(tmp_path: Path) -> None:
    path = vision_graph(tmp_path / "v.onnx")
    graph = onnx.load(path)
    nodes = {node.output[0]: node for node in graph.graph.node}
    (attention, _) = (node for node in graph.graph.node if node.op_type == "MultiHeadAttention")
    added = nodes[attention.input[0]]  # q: the sum of a product and its bias
    graph.graph.output.append(helper.make_tensor_value_info(added.input[0], TensorProto.FLOAT, None))  # without bias
    changed = kernels.moved(graph.SerializeToString())
    assert changed is not None
    written = {name: node for node in onnx.load_from_string(changed.model).graph.node for name in node.output}
    assert written[added.input[0]].op_type == "QuantizedLinear"
    assert written[attention.input[0]].op_type == "Add"
    assert written[attention.output[0]].domain == MICROSOFT  # q is not the output of a layer


def node_before(graph: onnx.GraphProto, name: str, operator: str) -> onnx.NodeProto:
    """The nearest node of this kind among those from which `name` is computed, by first inputs."""
    written = {output: node for node in graph.node for output in node.output}
    while (node := written[name]).op_type != operator:
        name = node.input[0]
    return node


def replace_tensor(graph: onnx.GraphProto, name: str, array: np.ndarray) -> None:
    (old,) = (tensor for tensor in graph.initializer if tensor.name == name)
    old.CopyFrom(numpy_helper.from_array(array, name))


def layer_of(graph: onnx.GraphProto) -> onnx.NodeProto:
    """The first product of the second block."""
    return [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"][7]


def reduce_over_columns(graph: onnx.GraphProto) -> None:
    reduce = node_before(graph, layer_of(graph).input[0], "Div")
    reduce = node_before(graph, reduce.input[1], "ReduceMax")
    graph.initializer.append(numpy_helper.from_array(np.array([-2]), "columns"))
    reduce.input[1] = "columns"


def drop_the_reduced_axis(graph: onnx.GraphProto) -> None:
    reduce = node_before(graph, layer_of(graph).input[0], "Div")
    reduce = node_before(graph, reduce.input[1], "ReduceMax")
    (keep,) = (attribute for attribute in reduce.attribute if attribute.name == "keepdims")
    keep.i = 0


def unsigned_weights(graph: onnx.GraphProto) -> None:
    replace_tensor(graph, layer_of(graph).input[1], np.zeros((64, 64), np.uint8))


def half_scales(graph: onnx.GraphProto) -> None:
    replace_tensor(graph, layer_of(graph).input[3], np.zeros(64, np.float16))


NEAR_MATCHES = {  # and the layers that stay
    reduce_over_columns: 3,  # q, k and v of a block
    drop_the_reduced_axis: 3,
    unsigned_weights: 3,
    half_scales: 3,
}


@pytest.mark.parametrize("change", NEAR_MATCHES)
def test_nodes_that_only_look_like_a_layer_stay(tmp_path: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    model = onnx.load(vision_graph(tmp_path / "v.onnx"))
    change(model.graph)
    changed = kernels.moved(model.SerializeToString())
    assert changed is not None
    found = operators_of(changed.model)
    assert found["MatMulIntegerToFloat", MICROSOFT] == NEAR_MATCHES[change]
    assert found["QuantizedLinear", kernels.DOMAIN] == 13 - NEAR_MATCHES[change]
    assert found["MultiHeadAttention", MICROSOFT] == found["MultiHeadAttention", kernels.DOMAIN] == 1


def test_a_sum_that_broadcasts_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, crops = vision_graph(tmp_path / "v.onnx"), {"crops": np.ones((2, 49, 588), np.float32)}
    model = onnx.load(path)
    last = [node for node in model.graph.node if node.op_type == "Add"][-1]  # of the second block
    at = list(model.graph.node).index(last)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "rows"))
    model.graph.node.insert(at, helper.make_node("Add", ["mean", "mean"], ["twice"]))  # [n, 1, d]
    model.graph.node.insert(at, helper.make_node("ReduceMean", [last.input[0], "rows"], ["mean"], keepdims=1))
    last.input[0] = "twice"
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
    changed = kernels.moved(path.read_bytes())
    assert changed is not None
    found = operators_of(changed.model)
    assert found["QuantizedLinear", kernels.DOMAIN] == 13
    assert found["Add", ""] == 3  # positions, and the two above
    if not VISION:
        return
    features = {}
    for switch in ("1", "0"):
        monkeypatch.setenv(kernels.SWITCH, switch)
        features[switch] = load_session(path, 2).run(None, crops)[0]
    assert norm_error(features["1"], features["0"]) < 0.02


def test_a_graph_with_subgraphs_stays(tmp_path: Path) -> None:
    model = onnx.load(vision_graph(tmp_path / "v.onnx"))
    hidden = layer_of(model.graph).output[0]  # which only the body reads, besides the next node
    body = helper.make_graph(
        [helper.make_node("Identity", [hidden], ["inner"])],
        "body",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    model.graph.node.append(helper.make_node("If", ["always"], ["outer"], then_branch=body, else_branch=body))
    model.graph.output.append(helper.make_tensor_value_info("outer", TensorProto.FLOAT, None))
    assert kernels.moved(model.SerializeToString()) is None


@needs_kernels
@pytest.mark.skipif("amx" not in KERNELS, reason="the kernels of vision towers are used with AMX")
def test_a_tower_that_the_kernels_cannot_load_runs_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, crops = vision_graph(tmp_path / "v.onnx"), {"crops": np.ones((1, 49, 588), np.float32)}
    real = kernels.moved

    def broken(model: bytes, operators: Collection[str] = kernels.OPERATORS) -> kernels.Moved | None:
        found = real(model, operators)
        return found and kernels.Moved(found.model.replace(b"QuantizeRows", b"QuantizeCols"), found.copies)

    monkeypatch.setattr(kernels, "moved", broken)
    ours = load_session(path, 2).run(None, crops)[0]
    assert "runs without the kernels" in caplog.text
    assert "QuantizeCols" in caplog.text
    monkeypatch.setenv(kernels.SWITCH, "0")
    np.testing.assert_array_equal(ours, load_session(path, 2).run(None, crops)[0])
    path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.delenv(kernels.SWITCH)
    with pytest.raises(EngineError, match=r"onnxruntime cannot load .*v\.onnx"):
        load_session(path, 2)


@needs_kernels
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("clip", {}),
        ("siglip", {"image_model_type": "siglip", "activation": "gelu_pytorch_tanh", "n_pos": 49, "width": 288}),
    ],
)
def test_a_tower_computes_the_same_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, changed: dict[str, Any]
) -> None:
    path, exact = (
        vision_graph(tmp_path / f"{name}.onnx", **changed),
        vision_graph(tmp_path / "fp32.onnx", "fp32", **changed),
    )
    crops = np.random.default_rng(5).standard_normal((3, 49, 588), np.float32)
    crops[1] = -1  # padding
    features = {}
    for switch in ("1", "0"):
        monkeypatch.setenv(kernels.SWITCH, switch)
        features[switch] = load_session(path, 2).run(None, {"crops": crops})[0]
    float32 = load_session(exact, 2).run(None, {"crops": crops})[0]
    rounding = norm_error(features["0"], float32)  # what eight bits cost
    assert 0.003 < rounding < 0.02
    assert norm_error(features["1"], features["0"]) < rounding
    assert norm_error(features["1"], float32) < 1.1 * rounding
    assert not features["1"][1].any()


@needs_kernels
@pytest.mark.skipif("amx" not in KERNELS, reason="the kernels of vision towers are used with AMX")
def test_a_large_tower_uses_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path, crop = vision_graph(tmp_path / "v.onnx"), {"crops": np.ones((1, 49, 588), np.float32)}
    outputs = [load_session(path, 2).run(None, crop)[0]]
    monkeypatch.setenv(kernels.SWITCH, "0")
    outputs.append(load_session(path, 2).run(None, crop)[0])
    assert outputs[0].any()
    assert (outputs[0] != outputs[1]).any()
    assert capfd.readouterr() == ("", "")
    monkeypatch.setitem(sys.modules, "molmo_edge_kernels", None)  # import raises ModuleNotFoundError
    monkeypatch.delenv(kernels.SWITCH)
    np.testing.assert_array_equal(load_session(path, 2).run(None, crop)[0], outputs[1])
    monkeypatch.undo()
    mapped = load_session(path, 2, mapped=True)  # weights stay in their file, so that the kernels cannot copy them
    np.testing.assert_allclose(mapped.run(None, crop)[0], outputs[1], rtol=1e-4, atol=1e-4)
