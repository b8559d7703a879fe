"""Compiled kernels for the CPU: the optional package molmo-edge-kernels (folder kernels/).

Its four-bit products have the names, inputs and attributes of ONNX Runtime's MatMulNBits and QMoE, in a domain of their
own. A large graph on the CPU is changed while it loads: the nodes that they can compute move to that domain and read
the same weights. Beside such products, attention (GroupQueryAttention) moves, too. Layers with eight-bit weights get
the operators of `eight_bit_graph`. All other nodes, and all nodes without the package, stay with ONNX Runtime. The file
does not change.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo_edge.runtimes.eight_bit_graph import eight_bit_nodes
from molmo_edge.runtimes.onnx_encoding import (
    FLOAT,
    GRAPH_NODE,
    MODEL_GRAPH,
    MODEL_OPSET,
    OPSET_DOMAIN,
    OPSET_VERSION,
    Node,
    Tensor,
    fields,
    initializers,
    message,
    outputs,
    values,
    varint,
)

SWITCH = "MOLMO_EDGE_KERNELS"  # environment variable: 0 switches them off
FORCE = "MOLMO_EDGE_KERNEL"  # environment variable of the package: the kernel to use, even if it is not faster
DOMAIN = "molmo_edge"
_ATTENTION = "GroupQueryAttention"  # of decoders
OPERATORS = ("MatMulNBits", "QMoE", _ATTENTION, "MultiHeadAttention", "QuantizedLinear")
ONNXRUNTIME = (1, 22)  # the oldest version that finds the weights beside a graph given in memory

_COPYING = "QuantizedLinear"
_BLOCKS = (32, 64, 128)
_COLUMNS = 16  # the columns of a matrix are a multiple of this
_WIDTH = 16  # the width of a head, too
_INT8_ACTIVATIONS = 4  # accuracy_level


@dataclass(frozen=True)
class Kernels:
    """The installed package."""

    version: str
    kernel: str  # "amx"; the instructions that it uses on this processor
    library: Path
    operators: tuple[str, ...]  # those of OPERATORS that it is used for
    reason: str | None = None  # why it is not used


def installed() -> Kernels | None:
    """The installed package; None without it. Raises OSError if its library does not load."""
    try:
        import molmo_edge_kernels as package
    except ModuleNotFoundError as error:
        if error.name != "molmo_edge_kernels":
            raise
        return None
    kernel, reason = package.kernel(), None
    if not hasattr(package, "operators"):  # before 0.2.0
        reason = "this version of molmo-edge needs version 0.2.0 or later: pip install --upgrade ./kernels"
        return Kernels(package.__version__, kernel, package.library(), (), reason)
    operators = package.operators(faster=os.environ.get(FORCE) != kernel)
    if os.environ.get(SWITCH) == "0":
        reason = f"switched off by {SWITCH}=0"
    elif not operators:
        reason = "ONNX Runtime's own operators are as fast on this processor, or it has not been measured"
    return Kernels(package.__version__, kernel, package.library(), operators, reason)


def usable() -> Kernels | None:
    """The installed package if it is used. A library that does not load counts as not installed; see `doctor`."""
    try:
        found = installed()
    except OSError:
        return None
    return None if found is None or found.reason is not None else found


def map_weights() -> bool:
    """Whether the kernels compute four-bit weights, which they read from the mapped file."""
    found = usable()
    return found is not None and "QMoE" in found.operators


@dataclass(frozen=True)
class Moved:
    """An encoded ONNX model that uses the kernels."""

    model: bytes
    copies: bool  # whether they copy weights when a session loads, and do not read the file again


def use_kernels(path: Path, options: Any, *, copies: bool = True) -> Moved | None:
    """Register the kernels in onnxruntime's `options` and return the graph that uses them.

    `copies`: whether the kernels may copy weights. None if they are not installed, not faster or switched off, or if
    they compute none of the graph's nodes.
    """
    if (found := usable()) is None:
        return None
    try:
        operators = found.operators if copies else set(found.operators) - {_COPYING}
        changed = moved(path.read_bytes(), operators)
    except (OSError, LookupError, ValueError):  # a damaged file: onnxruntime reports it
        return None
    if changed is not None:
        options.register_custom_ops_library(str(found.library))
    return changed


def moved(model: bytes, operators: Collection[str] = OPERATORS) -> Moved | None:
    """An encoded ONNX model in which the kernels compute what they can; None if that is nothing.

    `operators`: those of OPERATORS to use.
    """
    data, result, changed, copies = memoryview(model), bytearray(), False, False
    for number, value, whole in fields(data):
        graph = _moved_graph(value, operators) if number == MODEL_GRAPH and isinstance(value, memoryview) else None
        result += whole if graph is None else message(MODEL_GRAPH, graph[0])
        if graph is not None:
            changed, copies = True, copies or graph[1]
    if not changed:
        return None
    opset = message(OPSET_DOMAIN, DOMAIN.encode()) + varint(OPSET_VERSION << 3) + varint(1)
    return Moved(bytes(result + message(MODEL_OPSET, opset)), copies)


def _moved_graph(graph: memoryview, operators: Collection[str]) -> tuple[bytes, bool] | None:
    """The changed graph, and whether the kernels copy weights."""
    tensors = initializers(graph)
    nodes = [Node(node) for node in values(graph, GRAPH_NODE)]
    changed = {
        i: node.in_domain(DOMAIN)
        for i, node in enumerate(nodes)
        if node.operator in operators and _computable(node, tensors)
    }
    if changed and _ATTENTION in operators:  # in bfloat16, so not in a decoder whose precision is float32
        changed |= {i: node.in_domain(DOMAIN) for i, node in enumerate(nodes) if _computable_attention(node, tensors)}
    layers: dict[int, bytes] = {}
    if _COPYING in operators:
        attention = "MultiHeadAttention" in operators
        layers = eight_bit_nodes(nodes, tensors, outputs(graph), DOMAIN, attention=attention)
    changed |= layers
    if not changed:
        return None
    numbered, result = iter(range(len(nodes))), bytearray()
    for part, _, encoded in fields(graph):
        result += changed.get(next(numbered), encoded) if part == GRAPH_NODE else encoded
    return bytes(result), bool(layers)


def mapped_bytes(path: Path) -> int:
    """The bytes of the weights of a large graph that the kernels read where they lie in the file beside it."""
    try:
        model = memoryview(path.read_bytes())
        return sum(map(_mapped_bytes, values(model, MODEL_GRAPH)))
    except (OSError, LookupError, ValueError):  # a damaged file: onnxruntime reports it
        return 0


def _mapped_bytes(graph: memoryview) -> int:
    tensors, nodes = initializers(graph), map(Node, values(graph, GRAPH_NODE))
    read = {name for node in nodes if _computable(node, tensors) for name in node.inputs}
    return sum(tensors[name].external for name in read if name in tensors)


def _computable(node: Node, tensors: Mapping[str, Tensor]) -> bool:
    if node.domain != "com.microsoft" or node.operator not in ("MatMulNBits", "QMoE"):
        return False
    inputs, has = node.inputs, node.attributes
    block = has.get("block_size", 0)
    if block not in _BLOCKS or has.get("accuracy_level") != _INT8_ACTIVATIONS:
        return False
    if node.operator == "MatMulNBits":
        inner, columns = has.get("K", 0), has.get("N", 0)
        return has.get("bits", 4) == 4 and len(inputs) <= 4 and _fits(columns, inner, block)
    if len(inputs) != 15 or has.get("expert_weight_bits", 4) != 4 or has.get("normalize_routing_weights", 0):
        return False
    if (has.get("activation_type"), has.get("swiglu_fusion"), has.get("activation_alpha")) != ("swiglu", 1, 1.0):
        return False
    used = {0, 1, 2, 3, 5, 6, 11, 12, 14}  # without biases, a third matrix and what only GPUs read
    if has.get("activation_beta", 0.0) != 0.0 or any(name for i, name in enumerate(inputs) if i not in used):
        return False
    first, second = (tensors[inputs[i]].shape if inputs[i] in tensors else () for i in (2, 5))
    if len(first) != 3 or len(second) != 3:
        return False
    inner, hidden = 2 * first[2], 2 * second[2]
    return first[1] == 2 * hidden and _fits(first[1], inner, block) and _fits(second[1], hidden, block)


def _computable_attention(node: Node, tensors: Mapping[str, Tensor]) -> bool:
    """Whether it is attention as `molmo_edge.export` writes it: in float32, rotated, causal or with a bias."""
    if (node.domain, node.operator) != ("com.microsoft", _ATTENTION):
        return False
    if not 9 <= len(node.inputs) <= 11 or not all(node.inputs[:9]) or any(node.inputs[9:10]):
        return False
    cos, sin = (tensors.get(name) for name in node.inputs[7:9])
    if cos is None or sin is None or cos.kind != FLOAT or (sin.kind, sin.shape) != (FLOAT, cos.shape):
        return False  # of float16 attention the tables are no constants
    if len(cos.shape) != 2 or cos.shape[1] % (_WIDTH // 2) or len(node.outputs) != 3 or not all(node.outputs):
        return False
    options = dict(node.attributes)
    causal = options.pop("causal", 1)
    if causal != (0 if len(node.inputs) == 11 and node.inputs[10] else 1):
        return False
    scale = options.pop("scale", 0.0)  # 0: by the width
    heads = options.pop("num_heads", 0), options.pop("kv_num_heads", 0)
    return scale > 0 and all(heads) and options == {"do_rotary": 1, "rotary_interleaved": 0}


def _fits(columns: int, inner: int, block: int) -> bool:
    return columns > 0 and columns % _COLUMNS == 0 and inner > 0 and inner % block == 0
