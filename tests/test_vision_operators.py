"""The compiled kernels' attention and eight-bit layers, each alone, against what they compute in float64.

Attention rounds q, k, v and its weights to bfloat16 (8 bits): 4e-3 of each, half a percent of the result. Eight-bit
layers round as onnxruntime's nodes do, except that a value halfway between two integers may round the other way.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from kernel_graphs import ATTENTION, MICROSOFT, VISION, needs_kernels
from onnx import TensorProto, helper, numpy_helper
from test_quantize import norm_error

import molmo_edge.cli.doctor  # noqa: F401 - before onnxruntime, whose usage reports it switches off
from molmo_edge.runtimes import kernels
from molmo_edge.runtimes.onnx_sessions import session_options

# isort: split
import onnxruntime

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


@needs_kernels
@pytest.mark.parametrize("kernel", VISION)
def test_a_row_has_the_same_result_alone_and_beside_others(tmp_path: Path, kernel: str) -> None:
    most, rng = 41, np.random.default_rng(8)
    x = rng.standard_normal((1, most, 1100), np.float32)
    weights = {
        "w": rng.integers(-127, 128, (1100, 96)).astype(np.int8),
        "s": rng.uniform(0, 1e-3, 96).astype(np.float32),
    }
    nodes = [
        helper.make_node("QuantizeRows", ["x"], ["rows", "scales"], domain=kernels.DOMAIN),
        helper.make_node("QuantizedLinear", ["rows", "scales", *weights], ["y"], domain=kernels.DOMAIN, activation=0),
    ]
    for n in range(1, most + 1):  # a kernel computes some rows of a tile at a time
        onnx.save(model(nodes, {"x": x[:, :n]}, weights), tmp_path / f"layer{n}.onnx")
        np.savez(tmp_path / f"layer{n}.npz", x=x[:, :n])
    environment = {**os.environ, kernels.FORCE: kernel}
    subprocess.run([sys.executable, "-c", RUN_ALL, str(tmp_path)], check=True, env=environment, timeout=120)
    together = np.load(tmp_path / f"layer{most}.npy")
    assert norm_error(together, exact_layer({"x": x}, weights, 0)) < 1e-3
    for n in range(1, most):
        np.testing.assert_array_equal(np.load(tmp_path / f"layer{n}.npy"), together[:, :n])


@needs_kernels
@pytest.mark.skipif(not VISION, reason="no kernel has layers on this processor")
def test_a_bias_must_be_constant(tmp_path: Path) -> None:
    given = {name: np.ones((1, 4, 32), np.float32) for name in "xr"} | {"b": np.ones(32, np.float32)}
    weights = {"w": np.ones((32, 32), np.int8), "s": np.ones(32, np.float32)}

    def run(bias: str, weights: dict[str, np.ndarray]) -> np.ndarray:
        nodes = [
            helper.make_node("QuantizeRows", ["x"], ["rows", "scales"], domain=kernels.DOMAIN),
            helper.make_node(
                "QuantizedLinear", ["rows", "scales", "w", "s", bias, "r"], ["y"], domain=kernels.DOMAIN, activation=0
            ),
        ]
        inputs = {name: x for name, x in given.items() if name not in weights and name in ("x", "r", bias)}
        onnx.save(model(nodes, inputs, weights), tmp_path / "layer.onnx")
        options, package = session_options(1), kernels.installed()
        assert package is not None
        options.register_custom_ops_library(str(package.library))
        session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", options, providers=["CPUExecutionProvider"])
        found: np.ndarray = session.run(None, inputs)[0]
        return found

    np.testing.assert_allclose(run("", weights), 33, rtol=1e-6)
    np.testing.assert_allclose(run("b", {**weights, "b": given["b"]}), 34, rtol=1e-6)
    with pytest.raises(Exception, match="the bias is not constant: make it an initializer"):
        run("b", weights)
