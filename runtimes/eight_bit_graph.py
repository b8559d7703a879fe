"""Layers with eight-bit weights on the compiled kernels: what to put in the place of their nodes.

Vision towers have such layers in `int8`, `q4` and `mixed` bundles, decoders have them in `int8` and `mixed` ones.
`molmo_edge.export` writes a layer as a dozen nodes: seven that round the input to eight bits, an integer product for
each of the matrices that share it, its scales, bias, activation and residual. The kernels have two operators for them:

- QuantizeRows: x [..., inner] -> its rounded rows and their scales;
- QuantizedLinear: these, weights, scales, bias and residual -> activation(rows x weights + bias) + residual.

In a vision tower, MultiHeadAttention between such layers moves to the domain of the kernels, where its products are
bfloat16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from molmo_edge.runtimes.onnx_encoding import FLOAT, INT8, INT64, UINT8, Node, Tensor, new_node

_PAIR = 32  # columns that the kernels compute at a time
_TINY, _LEVELS, _SHIFT, _ZERO_POINT = 1e-30, 127, 128.5, 128  # see molmo_edge.export.int8_graph
_NO_ACTIVATION, _QUICK_GELU, _GELU_TANH = 0, 1, 2


def eight_bit_nodes(
    nodes: Sequence[Node], tensors: Mapping[str, Tensor], kept: Collection[str], domain: str, *, attention: bool
) -> dict[int, bytes]:
    """Return the encoded fields that replace nodes, by their index; an empty field removes one.

    `kept`: outputs of the graph. `attention`: also move MultiHeadAttention.
    """
    if any(node.has_subgraph for node in nodes):  # it may read any of the values that would be removed
        return {}
    graph = _Graph(nodes, tensors, kept)
    changed: dict[int, bytes] = {}
    for start, node in enumerate(nodes):
        rounding = _rounding(graph, start)
        if rounding is None:
            continue
        layers = [_layer(graph, i, rounding) for i in graph.readers.get(node.outputs[0], ())]
        found = [layer for layer in layers if layer is not None]
        if not found or len(found) < len(layers):
            continue
        rows = (f"{node.outputs[0]}/rows", f"{node.outputs[0]}/scales")
        changed[start] = new_node("QuantizeRows", domain, [rounding.x], rows, {})
        for layer in found:
            changed |= dict.fromkeys(layer.nodes, b"")
            options = {"activation": layer.activation}
            changed[layer.nodes[-1]] = new_node(
                "QuantizedLinear", domain, [*rows, *layer.inputs], [layer.output], options
            )
            graph.layers[layer.output] = rounding.x
        _remove_unread(graph, rounding.nodes, changed)
    for i, node in enumerate(nodes):
        if attention and _plain_attention(node) and graph.layers.keys() >= set(node.inputs):
            changed[i] = node.in_domain(domain)
    return changed


class _Graph:
    """Who writes and who reads each value."""

    def __init__(self, nodes: Sequence[Node], tensors: Mapping[str, Tensor], kept: Collection[str]) -> None:
        self.nodes, self.tensors, self.kept = nodes, tensors, kept
        self.added: set[int] = set()  # sums that a layer computes; the sum of two layers is left to one of them
        self.layers: dict[str, str] = {}  # outputs of the layers that were found, and their inputs
        self.writer = {name: i for i, node in enumerate(nodes) for name in node.outputs if name}
        self.readers: dict[str, list[int]] = {}
        for i, node in enumerate(nodes):
            for name in dict.fromkeys(node.inputs):
                self.readers.setdefault(name, []).append(i)

    def is_constant(self, name: str, value: float) -> bool:
        """Whether it is this number, up to rounding to float32."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.value is None or len(tensor.shape) > 1:
            return False
        return abs(tensor.value - value) <= 1e-6 * abs(value)

    def is_tensor(self, name: str, kind: int, shape: tuple[int, ...]) -> bool:
        """Whether it is an initializer of this type and shape."""
        tensor = self.tensors.get(name)
        return tensor is not None and (tensor.kind, tensor.shape) == (kind, shape)

    def written_by(self, name: str, operator: str, constant: float | None = None) -> int | None:
        """The node that writes `name`, if it is of this kind, with this number as its second input."""
        i = self.writer.get(name)
        if i is None or self.nodes[i].operator != operator or self.nodes[i].domain:
            return None
        inputs = self.nodes[i].inputs
        return i if constant is None or (len(inputs) == 2 and self.is_constant(inputs[1], constant)) else None

    def only_reader(self, name: str) -> int | None:
        """The node that reads `name`, if no other does."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.kept else None

    def other_input(self, i: int, name: str) -> str | None:
        """The second input of a node that reads `name` once."""
        counts = Counter(self.nodes[i].inputs)
        others = [other for other in counts if other != name]
        return others[0] if counts[name] == 1 and len(self.nodes[i].inputs) == 2 else None


@dataclass(frozen=True)
class _Rounding:
    x: str
    scale: str  # of its rows [..., 1]
    nodes: tuple[int, ...]  # from the last to the first, without the last


@dataclass(frozen=True)
class _Layer:
    inputs: tuple[str, ...]  # weights, scales, bias and residual; "": absent
    activation: int
    output: str
    nodes: tuple[int, ...]


def _rounding(graph: _Graph, end: int) -> _Rounding | None:
    """Cast(x / scale + 128.5) with scale = max(max |x|, tiny) / 127."""
    nodes = graph.nodes
    if nodes[end].operator != "Cast" or nodes[end].attributes.get("to") != UINT8:
        return None
    if (shift := graph.written_by(nodes[end].inputs[0], "Add", _SHIFT)) is None:
        return None
    if (divide := graph.written_by(nodes[shift].inputs[0], "Div")) is None:
        return None
    x, scale = nodes[divide].inputs
    if (levels := graph.written_by(scale, "Mul", 1 / _LEVELS)) is None:
        return None
    if (largest := graph.written_by(nodes[levels].inputs[0], "Max", _TINY)) is None:
        return None
    if (reduce := graph.written_by(nodes[largest].inputs[0], "ReduceMax")) is None:
        return None
    if not _of_last_axis(graph, nodes[reduce]):
        return None
    if (size := graph.written_by(nodes[reduce].inputs[0], "Abs")) is None or nodes[size].inputs != (x,):
        return None
    return _Rounding(x, scale, (shift, divide, levels, largest, reduce, size))


def _of_last_axis(graph: _Graph, reduce: Node) -> bool:
    """Whether it has one result per row, [..., 1]."""
    if len(reduce.inputs) != 2 or reduce.attributes.get("keepdims", 1) != 1:
        return False
    axes = graph.tensors.get(reduce.inputs[1])
    return axes is not None and axes.kind == INT64 and graph.is_constant(reduce.inputs[1], -1)


def _layer(graph: _Graph, first: int, rounding: _Rounding) -> _Layer | None:
    """An integer product of the rounded rows, and what follows it as far as the kernels compute it."""
    node = graph.nodes[first]
    if (node.operator, node.domain, len(node.inputs)) != ("MatMulIntegerToFloat", "com.microsoft", 5):
        return None
    _, weights, one, scales, zero_point = node.inputs
    matrix = graph.tensors.get(weights)
    if matrix is None or matrix.kind != INT8 or len(matrix.shape) != 2 or matrix.shape[1] % _PAIR:
        return None
    columns = matrix.shape[1:]
    if not graph.is_tensor(scales, FLOAT, columns):
        return None
    if not graph.is_constant(one, 1) or not graph.is_constant(zero_point, _ZERO_POINT):
        return None
    scaled = graph.only_reader(node.outputs[0])
    if scaled is None or graph.nodes[scaled].operator != "Mul":
        return None
    if graph.other_input(scaled, node.outputs[0]) != rounding.scale:
        return None
    chain, bias, activation, residual = [first, scaled], "", _NO_ACTIVATION, ""
    while (i := graph.only_reader(output := graph.nodes[chain[-1]].outputs[0])) is not None:
        after, other = graph.nodes[i], graph.other_input(i, output)
        adds = (after.operator, after.domain) == ("Add", "")
        if adds and other and len(chain) == 2 and graph.is_tensor(other, FLOAT, columns):
            bias = other
        elif not activation and (which := _activation(after)):
            activation = which
        elif adds and other and i not in graph.added and _is_residual(graph, other, rounding.x, columns):
            residual = other
            graph.added.add(i)
            chain.append(i)
            break
        else:
            break
        chain.append(i)
    inputs: tuple[str, ...] = (weights, scales, bias, residual)
    while not inputs[-1]:
        inputs = inputs[:-1]
    return _Layer(inputs, activation, graph.nodes[chain[-1]].outputs[0], tuple(chain))


def _activation(node: Node) -> int:
    if (node.operator, node.domain) == ("QuickGelu", "com.microsoft"):
        return _QUICK_GELU if abs(node.attributes.get("alpha", 1.702) - 1.702) < 1e-6 else _NO_ACTIVATION
    tanh = (node.operator, node.domain) == ("Gelu", "") and node.attributes.get("approximate") == "tanh"
    return _GELU_TANH if tanh else _NO_ACTIVATION


def _is_residual(graph: _Graph, name: str, x: str, columns: tuple[int, ...]) -> bool:
    """Whether it has the shape [..., columns] of the output of a layer with the input `x`.

    It does if it is the input of the norm from which `x` was computed row by row. A sum may also broadcast, which the
    kernels do not.
    """
    while (i := graph.writer.get(x)) is not None:
        node = graph.nodes[i]
        if (node.operator, node.domain) == ("LayerNormalization", ""):
            return node.inputs[0] == name and graph.is_tensor(node.inputs[1], FLOAT, columns)
        if x in graph.layers:
            x = graph.layers[x]
        elif node.operator in ("Gelu", "QuickGelu") or _plain_attention(node):
            x = node.inputs[0]
        else:
            return False
    return False


def _plain_attention(node: Node) -> bool:
    kind = (node.operator, node.domain) == ("MultiHeadAttention", "com.microsoft")
    return kind and len(node.inputs) == 3 and len(node.outputs) == 1 and set(node.attributes) == {"num_heads"}


def _remove_unread(graph: _Graph, chain: Sequence[int], changed: dict[int, bytes]) -> None:
    for i in chain:  # a node comes after those that read it
        written = graph.nodes[i].outputs[0]
        if written not in graph.kept and all(reader in changed for reader in graph.readers.get(written, ())):
            changed[i] = b""
