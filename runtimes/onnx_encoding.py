"""Read and change an encoded ONNX model without the package onnx, which is not a dependency of a runtime."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from molmo_edge.system.lazy import cached_property

# Field numbers of onnx.proto.
MODEL_GRAPH, MODEL_OPSET = 7, 8
OPSET_DOMAIN, OPSET_VERSION = 1, 2
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_OUTPUT = 1, 5, 12
NODE_DOMAIN = 7
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OPERATOR, _NODE_ATTRIBUTE = 1, 2, 3, 4, 5
_VALUE_NAME = 1
_ATTRIBUTE_NAME, _ATTRIBUTE_FLOAT, _ATTRIBUTE_INT, _ATTRIBUTE_STRING, _ATTRIBUTE_TYPE = 1, 2, 3, 4, 20
_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS = 6, 11
_INT = 2  # AttributeProto.INT
_TENSOR_DIMENSIONS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL = 1, 2, 8, 9, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
# TensorProto.DataType
FLOAT, UINT8, INT8, INT64 = 1, 2, 3, 7
# Of the constants that are compared.
_TYPES: dict[int, type[np.generic]] = {FLOAT: np.float32, UINT8: np.uint8, INT64: np.int64}


@dataclass(frozen=True)
class Tensor:
    """An initializer."""

    kind: int  # TensorProto.DataType
    shape: tuple[int, ...]
    value: float | None  # of a constant with one number in the graph itself, else None
    external: int  # bytes in the file beside the graph


class Node:
    """A node of a graph."""

    def __init__(self, encoded: memoryview) -> None:
        """`encoded`: the content of the field."""
        self.encoded = encoded
        inputs, outputs, self._attributes = [], [], []
        self.operator = self.domain = ""
        for number, value, _ in fields(encoded):
            if not isinstance(value, memoryview):
                continue
            if number == _NODE_INPUT:
                inputs.append(bytes(value).decode())
            elif number == _NODE_OUTPUT:
                outputs.append(bytes(value).decode())
            elif number == _NODE_OPERATOR:
                self.operator = bytes(value).decode()
            elif number == NODE_DOMAIN:
                self.domain = bytes(value).decode()
            elif number == _NODE_ATTRIBUTE:
                self._attributes.append(value)
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """Integers, floats and texts; None for attributes of other types."""
        return dict(map(_attribute, self._attributes))

    @property
    def has_subgraph(self) -> bool:
        """Whether it is an If, Loop or Scan, whose body can read all values of the graph around it."""
        kinds = (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS)
        return any(number in kinds for attribute in self._attributes for number, _, _ in fields(attribute))

    def in_domain(self, domain: str) -> bytes:
        """Return its field with another domain: of a field that occurs twice, the last one counts."""
        return message(GRAPH_NODE, bytes(self.encoded) + message(NODE_DOMAIN, domain.encode()))


def new_node(
    operator: str, domain: str, inputs: Iterable[str], outputs: Iterable[str], attributes: Mapping[str, int]
) -> bytes:
    """Return the field of a node with integer attributes."""
    names = list(outputs)
    content = b"".join(message(_NODE_INPUT, name.encode()) for name in inputs)
    content += b"".join(message(_NODE_OUTPUT, name.encode()) for name in names)
    content += message(_NODE_NAME, names[0].encode()) + message(_NODE_OPERATOR, operator.encode())
    for name, value in attributes.items():
        number = varint(_ATTRIBUTE_INT << 3) + varint(value) + varint(_ATTRIBUTE_TYPE << 3) + varint(_INT)
        content += message(_NODE_ATTRIBUTE, message(_ATTRIBUTE_NAME, name.encode()) + number)
    return message(GRAPH_NODE, content + message(NODE_DOMAIN, domain.encode()))


def outputs(graph: memoryview) -> set[str]:
    """Return the names of a graph's outputs."""
    return {text(value, _VALUE_NAME) for value in values(graph, GRAPH_OUTPUT)}


def initializers(graph: memoryview) -> dict[str, Tensor]:
    """Return the tensors of a graph by their names."""
    return dict(map(_initializer, values(graph, GRAPH_INITIALIZER)))


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview, memoryview]]:
    """Yield each field of an encoded message: its number, its integer or its bytes, and the whole field."""
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


def varint(value: int) -> bytes:
    """Encode an integer."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def message(number: int, content: bytes) -> bytes:
    """Encode a field of bytes, text or another message."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def values(data: memoryview, number: int) -> Iterator[memoryview]:
    """Yield the bytes of all fields with this number."""
    return (value for n, value, _ in fields(data) if n == number and isinstance(value, memoryview))


def text(data: memoryview, number: int) -> str:
    """Return the first field with this number as text; "" without one."""
    return bytes(next(values(data, number), b"")).decode()


def _attribute(data: memoryview) -> tuple[str, Any]:
    """The name of an attribute and its integer, float or text; None for other types."""
    value: Any = None
    for number, content, _ in fields(data):
        if number == _ATTRIBUTE_INT:
            value = content
        elif number == _ATTRIBUTE_FLOAT and isinstance(content, memoryview):
            value = content.cast("f")[0]  # little-endian, as every processor that ONNX Runtime supports
        elif number == _ATTRIBUTE_STRING and isinstance(content, memoryview):
            value = bytes(content).decode(errors="replace")
    return text(data, _ATTRIBUTE_NAME), value


def _initializer(data: memoryview) -> tuple[str, Tensor]:
    shape: list[int] = []
    name, kind, raw, external = "", 0, None, 0
    for number, content, _ in fields(data):
        if number == _TENSOR_DIMENSIONS and isinstance(content, int):
            shape.append(content)
        elif number == _TENSOR_DIMENSIONS and isinstance(content, memoryview):  # packed
            at = 0
            while at < len(content):
                size, at = _read_varint(content, at)
                shape.append(size)
        elif number == _TENSOR_TYPE and isinstance(content, int):
            kind = content
        elif number == _TENSOR_NAME and isinstance(content, memoryview):
            name = bytes(content).decode()
        elif number == _TENSOR_RAW and isinstance(content, memoryview):
            raw = content
        elif number == _TENSOR_EXTERNAL and isinstance(content, memoryview) and text(content, _ENTRY_KEY) == "length":
            external = int(text(content, _ENTRY_VALUE))
    value: float | None = None
    if raw is not None and kind in _TYPES and len(raw) == np.dtype(_TYPES[kind]).itemsize:
        value = float(np.frombuffer(raw, _TYPES[kind])[0])
    return name, Tensor(kind, tuple(shape), value, external)
