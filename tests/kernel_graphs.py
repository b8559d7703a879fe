"""Graphs of four-bit products and experts, and which of the compiled kernels this processor has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from molmo_edge.quantize.rounding import nearest, pack_nibbles

try:
    import molmo_edge_kernels
except ModuleNotFoundError:
    molmo_edge_kernels = None

needs_kernels = pytest.mark.skipif(molmo_edge_kernels is None, reason="molmo-edge-kernels is not installed")
KERNELS = molmo_edge_kernels.supported() if molmo_edge_kernels else ()
MICROSOFT = "com.microsoft"
VISION = tuple(name for name in KERNELS if name in ("amx", "avx512-bf16", "avx512-vnni"))
ATTENTION = tuple(name for name in VISION if name != "avx512-vnni")
MATMUL = {"bits": 4, "accuracy_level": 4}
MOE: dict[str, Any] = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "expert_weight_bits": 4,
    "normalize_routing_weights": 0,
    "accuracy_level": 4,
}


def save(path: Path, nodes: list[onnx.NodeProto], widths: dict[str, int], weights: dict[str, np.ndarray]) -> Path:
    """A graph with its weights in a file beside it, as those of large models."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name, width in widths.items()]
    outputs = [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None) for node in nodes]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    return path


def matrices(
    rng: np.random.Generator, experts: int, columns: int, inner: int, block: int, asymmetric: bool, prefix: str
) -> dict[str, np.ndarray]:
    shape = (experts, columns) if experts else (columns,)
    rounded = nearest("", rng.normal(0, 0.05, (max(experts, 1) * columns, inner)).astype(np.float32), block, asymmetric)
    codes = pack_nibbles(rounded.codes)
    scale = rounded.scale.astype(np.float16 if experts else np.float32)
    found = {
        f"{prefix}codes": codes.reshape(*shape, inner // 2) if experts else codes.reshape(columns, -1, block // 2),
        f"{prefix}scales": scale.reshape(*shape, -1),
    }
    if rounded.zero_point is not None:
        found[f"{prefix}zeros"] = pack_nibbles(rounded.zero_point).reshape(*shape, -1)
    return found


def dense(path: Path, inner: int, columns: int, block: int, asymmetric: bool, **changed: Any) -> Path:
    weights = matrices(np.random.default_rng(1), 0, columns, inner, block, asymmetric, "")
    options = {"K": inner, "N": columns, "block_size": block, **MATMUL, **changed}
    node = helper.make_node("MatMulNBits", ["x", *weights], ["y"], domain=MICROSOFT, **options)
    return save(path, [node], {"x": inner}, weights)


def experts(path: Path, d: int, f: int, n: int, k: int, block: int, asymmetric: bool, **changed: Any) -> Path:
    node, weights = experts_node(d, f, n, k, block, asymmetric, **changed)
    return save(path, [node], {"x": d, "p": n}, weights)


def experts_node(
    d: int, f: int, n: int, k: int, block: int, asymmetric: bool, **changed: Any
) -> tuple[onnx.NodeProto, dict[str, np.ndarray]]:
    """Experts of x [m, d] with probabilities p [m, n], and their weights."""
    rng = np.random.default_rng(2)
    first, second = (
        matrices(rng, n, columns, inner, block, asymmetric, which)
        for columns, inner, which in ((2 * f, d, "first_"), (d, f, "second_"))
    )
    inputs = ["x", "p", "first_codes", "first_scales", "", "second_codes", "second_scales", *[""] * 7, "p"]
    if asymmetric:
        inputs[11:13] = "first_zeros", "second_zeros"
    node = helper.make_node("QMoE", inputs, ["y"], domain=MICROSOFT, k=k, block_size=block, **{**MOE, **changed})
    return node, first | second
