"""Compiled kernels for four-bit products: the optional package molmo-edge-kernels (folder kernels/).

Its operators have the names, inputs and attributes of ONNX Runtime's MatMulNBits and QMoE, in a domain of their own. A
large graph on the CPU is changed while it loads: the nodes that they can compute move to that domain and read the same
weights. All other nodes, and all nodes without the package, stay with ONNX Runtime. The file does not change.

The nodes are changed in the encoded graph, because `onnx` is not a dependency of a runtime.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SWITCH = "MOLMO_EDGE_KERNELS"  # environment variable: 0 switches them off
FORCE = "MOLMO_EDGE_KERNEL"  # environment variable of the package: the kernel to use, even if it is not faster
DOMAIN = "molmo_edge"
ONNXRUNTIME = (1, 22)  # the oldest version that finds the weights beside a graph given in memory

_BLOCKS = (32, 64, 128)
_COLUMNS = 16  # a matrix has a multiple of so many
_INT8_ACTIVATIONS = 4  # accuracy_level


@dataclass(frozen=True)
class Kernels:
    """The installed package."""

    version: str
    kernel: str  # "amx"; the instructions that it uses on this processor
    library: Path
    reason: str | None = None  # why it is not used


def installed() -> Kernels | None:
    """The installed package; None without it. Raises OSError if its library does not load."""
    try:
        import molmo_edge_kernels as package
    except ModuleNotFoundError as error:
        if error.name != "molmo_edge_kernels":
            raise
        return None
    kernel = package.kernel()
    reason = None
    if os.environ.get(SWITCH) == "0":
        reason = f"switched off by {SWITCH}=0"
    elif kernel not in package.FASTER and os.environ.get(FORCE) != kernel:
        reason = "ONNX Runtime's own operators are as fast on this processor"
    return Kernels(package.__version__, kernel, package.library(), reason)


def usable() -> Kernels | None:
    """The installed package if it is used. A library that does not load counts as not installed; see `doctor`."""
    try:
        found = installed()
    except OSError:
        return None
    return None if found is None or found.reason is not None else found


def use_kernels(path: Path, options: Any) -> bytes | None:
    """Register the kernels in onnxruntime's `options` and return the graph that uses them.

    None if they are not installed, not faster or switched off, or if they compute none of the graph's nodes.
    """
    if (found := usable()) is None:
        return None
    try:
        changed = moved(path.read_bytes())
    except (OSError, LookupError, ValueError):  # a damaged file: onnxruntime reports it
        return None
    if changed is not None:
        options.register_custom_ops_library(str(found.library))
    return changed


def moved(model: bytes) -> bytes | None:
    """An encoded ONNX model with all nodes that the kernels compute in their domain; None if there are none."""
    data, result, count = memoryview(model), bytearray(), 0
    for number, value, whole in _fields(data):
        if number != _MODEL_GRAPH or not isinstance(value, memoryview):
            result += whole
            continue
        shapes = dict(map(_initializer, _all(value, _GRAPH_INITIALIZER)))
        graph = bytearray()
        for part, content, encoded in _fields(value):
            if part == _GRAPH_NODE and isinstance(content, memoryview) and _computable(content, shapes):
                count += 1  # of a field that occurs twice, the last one counts
                graph += _message(_GRAPH_NODE, bytes(content) + _message(_NODE_DOMAIN, DOMAIN.encode()))
            else:
                graph += encoded
        result += _message(_MODEL_GRAPH, bytes(graph))
    if count == 0:
        return None
    opset = _message(_OPSET_DOMAIN, DOMAIN.encode()) + _varint(_OPSET_VERSION << 3) + _varint(1)
    return bytes(result + _message(_MODEL_OPSET, opset))


def mapped_bytes(path: Path) -> int:
    """The bytes of the weights of a large graph that the kernels read where they lie in the file beside it."""
    try:
        model = memoryview(path.read_bytes())
        return sum(map(_mapped_bytes, _all(model, _MODEL_GRAPH)))
    except (OSError, LookupError, ValueError):  # a damaged file: onnxruntime reports it
        return 0


def _mapped_bytes(graph: memoryview) -> int:
    tensors = list(_all(graph, _GRAPH_INITIALIZER))
    shapes, sizes = dict(map(_initializer, tensors)), dict(map(_external_bytes, tensors))
    read = {bytes(name).decode() for node in _all(graph, _GRAPH_NODE) if _computable(node, shapes)
            for name in _all(node, _NODE_INPUT)}  # fmt: skip
    return sum(sizes.get(name, 0) for name in read)


def _computable(node: memoryview, shapes: dict[str, tuple[int, ...]]) -> bool:
    operator, domain = _text(node, _NODE_OPERATOR), _text(node, _NODE_DOMAIN)
    if domain != "com.microsoft" or operator not in ("MatMulNBits", "QMoE"):
        return False
    inputs = [bytes(value).decode() for value in _all(node, _NODE_INPUT)]
    has = dict(map(_attribute, _all(node, _NODE_ATTRIBUTE)))
    block = has.get("block_size", 0)
    if block not in _BLOCKS or has.get("accuracy_level") != _INT8_ACTIVATIONS:
        return False
    if operator == "MatMulNBits":
        inner, columns = has.get("K", 0), has.get("N", 0)
        return has.get("bits", 4) == 4 and len(inputs) <= 4 and _fits(columns, inner, block)
    if len(inputs) != 15 or has.get("expert_weight_bits", 4) != 4 or has.get("normalize_routing_weights", 0):
        return False
    if (has.get("activation_type"), has.get("swiglu_fusion"), has.get("activation_alpha")) != ("swiglu", 1, 1.0):
        return False
    used = {0, 1, 2, 3, 5, 6, 11, 12, 14}  # without biases, a third matrix and what only GPUs read
    if has.get("activation_beta", 0.0) != 0.0 or any(name for i, name in enumerate(inputs) if i not in used):
        return False
    first, second = shapes.get(inputs[2], ()), shapes.get(inputs[5], ())
    if len(first) != 3 or len(second) != 3:
        return False
    inner, hidden = 2 * first[2], 2 * second[2]
    return first[1] == 2 * hidden and _fits(first[1], inner, block) and _fits(second[1], hidden, block)


def _fits(columns: int, inner: int, block: int) -> bool:
    return columns > 0 and columns % _COLUMNS == 0 and inner > 0 and inner % block == 0


# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_OPSET = 7, 8
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_FLOAT, _ATTRIBUTE_INT, _ATTRIBUTE_STRING = 1, 2, 3, 4
_TENSOR_DIMENSIONS, _TENSOR_NAME, _TENSOR_EXTERNAL = 1, 8, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview, memoryview]]:
    """Each field of an encoded message: its number, its integer or its bytes, and the whole field."""
    at = 0
    while at < len(data):
        start = at
        key, at = _read_varint(data, at)
        value: int | memoryview
        match key & 7:
            case 0:
                value, at = _read_varint(data, at)
            case 2:
                size, at = _read_varint(data, at)
                value, at = data[at : at + size], at + size
            case wire:  # 1: eight bytes, 5: four
                size = {1: 8, 5: 4}[wire]
                value, at = data[at : at + size], at + size
        yield key >> 3, value, data[start:at]


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def _message(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _all(data: memoryview, number: int) -> Iterator[memoryview]:
    return (value for n, value, _ in _fields(data) if n == number and isinstance(value, memoryview))


def _text(data: memoryview, number: int) -> str:
    return bytes(next(_all(data, number), b"")).decode()


def _attribute(data: memoryview) -> tuple[str, Any]:
    """The name of an attribute and its integer, float or text; None for other types."""
    value: Any = None
    for number, content, _ in _fields(data):
        if number == _ATTRIBUTE_INT:
            value = content
        elif number == _ATTRIBUTE_FLOAT and isinstance(content, memoryview):
            value = content.cast("f")[0]  # little-endian, as every processor that ONNX Runtime supports
        elif number == _ATTRIBUTE_STRING and isinstance(content, memoryview):
            value = bytes(content).decode(errors="replace")
    return _text(data, _ATTRIBUTE_NAME), value


def _initializer(data: memoryview) -> tuple[str, tuple[int, ...]]:
    """The name and the shape of a tensor."""
    shape: list[int] = []
    for number, value, _ in _fields(data):
        if number != _TENSOR_DIMENSIONS:
            continue
        if isinstance(value, int):
            shape.append(value)
        else:  # packed
            at = 0
            while at < len(value):
                size, at = _read_varint(value, at)
                shape.append(size)
    return _text(data, _TENSOR_NAME), tuple(shape)


def _external_bytes(data: memoryview) -> tuple[str, int]:
    """The name of a tensor and how much of it is in another file."""
    where = {_text(entry, _ENTRY_KEY): _text(entry, _ENTRY_VALUE) for entry in _all(data, _TENSOR_EXTERNAL)}
    return _text(data, _TENSOR_NAME), int(where.get("length", 0))
