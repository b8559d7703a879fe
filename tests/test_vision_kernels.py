"""Attention and eight-bit layers of the compiled kernels, and the change of a vision tower that uses them.

Attention rounds q, k, v and its weights to bfloat16 (8 bits): 4e-3 of each, half a percent of the result. Eight-bit
layers round as onnxruntime's nodes do, except that a value halfway between two integers may round the other way; a
tower rounds in every layer again, so that its features differ by less than its own rounding costs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_kernels import KERNELS, MICROSOFT, needs_kernels
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
from molmo_edge.system.memory import forget_mapped

VISION = tuple(name for name in KERNELS if name in ("amx", "avx512-bf16", "avx512-vnni"))
ATTENTION = tuple(name for name in VISION if name != "avx512-vnni")
SHAPES = [
    (1, 577, 16, 64),
    (2, 1, 3, 64),
    (1, 16, 2, 64),
    (3, 33, 4, 32),
    (1, 31, 3, 80),
    (2, 100, 2, 72),
    (1, 65, 2, 16),
]
LAYERS = [  # rows, inner, columns, activation, residual
    (577, 64, 128, 1, False),
    (1, 64, 32, 0, False),
    (17, 100, 96, 2, False),
    (33, 588, 64, 0, True),
    (130, 256, 32, 1, True),
    (65, 128, 64, 2, True),
    (49, 2112, 64, 0, True),  # sums in several passes
]

RUN_WITHOUT_MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
import molmo_edge_kernels
import onnxruntime
from molmo_edge.runtimes.onnx_sessions import session_options

def load(path):
    options = session_options(2)
    options.register_custom_ops_library(str(molmo_edge_kernels.library()))
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

def fails(megabytes, run):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), limits[1]))
    try:
        for _ in range(20):  # until another thread takes a task
            run()
    except Exception as error:
        print("bad_alloc" in str(error), flush=True)
    resource.setrlimit(resource.RLIMIT_AS, limits)

session, one = load(sys.argv[1]), np.ones((1, 1, 4), np.float32)
keys = np.ones((1, 1_000_000, 4), np.float32)
given = {"q": one, "k": keys, "v": keys}
load(sys.argv[3]).run(None, given)  # a single head: now this thread has its 320 MB, and another thread does not
fails(100, lambda: session.run(None, given))
np.testing.assert_allclose(session.run(None, {"q": one, "k": keys[:, :9], "v": keys[:, :9]})[0], one)
fails(200, lambda: load(sys.argv[2]))  # weights are padded to 256 MB
"""

RUN_ALL = """
import os, sys
from pathlib import Path
import numpy as np
import molmo_edge_kernels
from molmo_edge.runtimes.onnx_sessions import session_options
import onnxruntime
assert molmo_edge_kernels.kernel() == os.environ["MOLMO_EDGE_KERNEL"]
for path in sorted(Path(sys.argv[1]).glob("*.onnx")):
    options = session_options(2)
    options.register_custom_ops_library(str(molmo_edge_kernels.library()))
    if "MultiHeadAttention" in molmo_edge_kernels.operators() or path.stem.startswith("layer"):
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        np.save(path.with_suffix(".npy"), session.run(None, dict(np.load(path.with_suffix(".npz"))))[0])
"""


def model(
    nodes: list[onnx.NodeProto], inputs: dict[str, np.ndarray], weights: dict[str, np.ndarray]
) -> onnx.ModelProto:
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * x.ndim) for name, x in inputs.items()]
    last = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    domains = {"": 20, MICROSOFT: 1, kernels.DOMAIN: 1}
    opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
    graph = helper.make_graph(nodes, "graph", infos, [last], tensors)
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def exact_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int) -> np.ndarray:
    q, k, v = (x.astype(np.float64).reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    found: np.ndarray = (weights / weights.sum(axis=-1, keepdims=True)) @ v
    return found.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1)


def exact_layer(given: dict[str, np.ndarray], weights: dict[str, np.ndarray], activation: int) -> np.ndarray:
    x = given["x"].astype(np.float64)
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    rows = np.rint(np.divide(x, scale, where=scale > 0, out=np.zeros_like(x)))
    y = rows @ weights["w"].astype(np.float64) * weights["s"] * scale + weights.get("b", 0)
    if activation == 1:
        y = y / (1 + np.exp(-1.702 * y))
    elif activation == 2:
        y = y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))) / 2
    return y + given.get("r", 0)


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Graphs of one operator each, and what they compute."""
    folder, exact, rng = tmp_path_factory.mktemp("operators"), {}, np.random.default_rng(0)

    def add(name: str, nodes: Any, given: dict[str, np.ndarray], weights: dict[str, np.ndarray], y: np.ndarray) -> None:
        onnx.save(model(nodes, given, weights), folder / f"{name}.onnx")
        np.savez(folder / f"{name}.npz", **given)
        exact[name] = y

    for batch, n, heads, width in SHAPES:
        given = {name: rng.standard_normal((batch, n, heads * width), np.float32) for name in ("q", "k", "v")}
        given["q"][0, 0] *= 8  # attends to few keys
        node = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["y"], domain=kernels.DOMAIN, num_heads=heads)
        add(f"attention{n}x{width}", [node], given, {}, exact_attention(*given.values(), heads))
    for n, inner, columns, activation, residual in LAYERS:
        given = {"x": rng.standard_normal((1, n, inner), np.float32)}
        given["x"][0, 1:2] = 0
        given["x"][:, :, 3] *= 20
        weights = {
            "w": rng.integers(-127, 128, (inner, columns)).astype(np.int8),
            "s": rng.uniform(0, 1e-3, columns).astype(np.float32),
        }
        names = ["rows", "scales", "w", "s"]
        if activation or residual:
            weights["b"] = rng.standard_normal(columns, np.float32)
            names.append("b")
        if residual:
            given["r"] = rng.standard_normal((1, n, columns), np.float32)
            names.append("r")
        nodes = [
            helper.make_node("QuantizeRows", ["x"], ["rows", "scales"], domain=kernels.DOMAIN),
            helper.make_node("QuantizedLinear", names, ["y"], domain=kernels.DOMAIN, activation=activation),
        ]
        add(f"layer{n}x{inner}x{columns}", nodes, given, weights, exact_layer(given, weights, activation))
    return SimpleNamespace(folder=folder, exact=exact)


@needs_kernels
@pytest.mark.parametrize("kernel", VISION)
def test_an_operator_computes_what_it_says(operators: SimpleNamespace, kernel: str) -> None:
    environment = {**os.environ, kernels.FORCE: kernel}
    subprocess.run([sys.executable, "-c", RUN_ALL, str(operators.folder)], check=True, env=environment, timeout=120)
    for name, exact in operators.exact.items():
        if name.startswith("attention") and kernel not in ATTENTION:
            continue
        found = operators.folder / f"{name}.npy"
        ours = np.load(found)
        found.unlink()
        assert ours.shape == exact.shape
        if name.startswith("layer"):
            assert norm_error(ours, exact) < 1e-3, name
            continue
        assert norm_error(ours, exact) < 6e-3, name
        rows = np.abs(ours - exact).max(axis=-1) / np.abs(exact).max(axis=-1)
        assert rows.max() < 0.03, name  # none is wrong, not even one of a thousand


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux" or not ATTENTION, reason="needs attention, and a limit of memory")
def test_no_memory_is_an_error(tmp_path: Path) -> None:
    one = {name: np.ones((1, 1, 4), np.float32) for name in "qkv"}
    node = helper.make_node("MultiHeadAttention", list(one), ["y"], domain=kernels.DOMAIN, num_heads=4)
    onnx.save(model([node], one, {}), tmp_path / "attention.onnx")
    node.attribute[0].i = 1
    onnx.save(model([node], one, {}), tmp_path / "head.onnx")
    columns = 1 << 22
    weights = {"w": np.ones((1, columns), np.int8), "s": np.ones(columns, np.float32)}
    nodes = [
        helper.make_node("QuantizeRows", ["x"], ["rows", "scales"], domain=kernels.DOMAIN),
        helper.make_node("QuantizedLinear", ["rows", "scales", "w", "s"], ["y"], domain=kernels.DOMAIN, activation=0),
    ]
    onnx.save(model(nodes, {"x": np.ones((1, 1), np.float32)}, weights), tmp_path / "layer.onnx")
    command = [
        sys.executable,
        "-c",
        RUN_WITHOUT_MEMORY,
        *(str(tmp_path / f"{n}.onnx") for n in ("attention", "layer", "head")),
    ]
    environment = {**os.environ, kernels.FORCE: ATTENTION[0]}
    shown = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert (shown.returncode, shown.stdout) == (0, "True\nTrue\n"), shown.stderr


@needs_kernels
@pytest.mark.parametrize("kernel", VISION)
def test_numbers_that_are_not_finite_stay_in_their_row(tmp_path: Path, kernel: str) -> None:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((1, 20, 100), np.float32)
    changed = x.copy()
    changed[0, 3, 5], changed[0, 17, 99], changed[0, 18, 0] = np.nan, np.inf, -np.inf
    weights = {
        "w": rng.integers(-127, 128, (100, 64)).astype(np.int8),
        "s": np.full(64, 1e-3, np.float32),
        "b": rng.standard_normal(64, np.float32),
    }
    names = ["rows", "scales", *weights]
    for activation in range(3):
        nodes = [
            helper.make_node("QuantizeRows", ["x"], ["rows", "scales"], domain=kernels.DOMAIN),
            helper.make_node("QuantizedLinear", names, ["y"], domain=kernels.DOMAIN, activation=activation),
        ]
        for name, given in (("finite", x), ("not", changed)):
            onnx.save(model(nodes, {"x": given}, weights), tmp_path / f"layer-{name}{activation}.onnx")
            np.savez(tmp_path / f"layer-{name}{activation}.npz", x=given)
    environment = {**os.environ, kernels.FORCE: kernel}
    subprocess.run([sys.executable, "-c", RUN_ALL, str(tmp_path)], check=True, env=environment, timeout=120)
    others = np.delete(np.arange(20), [3, 17, 18])
    for activation in range(3):
        finite, found = (np.load(tmp_path / f"layer-{name}{activation}.npy")[0] for name in ("finite", "not"))
        assert np.isnan(found[3]).all()
        assert not np.isfinite(found[[17, 18]]).any()
        np.testing.assert_array_equal(found[others], finite[others])


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_that_were_copied_are_freed(tmp_path: Path) -> None:
    path = tmp_path / "weights of a model.data"
    path.write_bytes(bytes(range(256)) * 4096)

    def resident(mapping: np.ndarray) -> int:
        begin, inside = f"{mapping.ctypes.data:x}-", False
        for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
            if "-" in line.split()[0]:
                inside = line.startswith(begin)
            elif inside and line.startswith("Rss:"):
                return int(line.split()[1])
        raise AssertionError("not mapped")

    mapping = np.memmap(path, np.uint8, "c")
    assert mapping.astype(np.int64).sum() == 4096 * 255 * 128
    before = resident(mapping)
    forget_mapped(path)
    assert resident(mapping) < before / 2
    assert mapping[-1] == 255
