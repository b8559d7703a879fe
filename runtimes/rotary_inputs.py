"""Rotary tables of an exported decoder as inputs, so that the slots of a cache can have positions with gaps.

The graphs look up row `slot` of their tables `rope.cos` and `rope.sin`. ONNX lets a run replace an initializer that is
also declared as an input of the graph: with the tables' rows in the order of the slots, every exported decoder, fused
or plain, rotates by the positions of its cache. The declarations are appended to the bytes of the graph, because
Protocol Buffers merge concatenated messages: the package onnx, which is not installed everywhere, is not needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from molmo_edge.config import DecoderConfig
from molmo_edge.modeling.rotary import rotary_frequencies
from molmo_edge.runtimes.slot_positions import slot_positions

_FLOAT = 1  # TensorProto.FLOAT


def table_names(config: DecoderConfig) -> tuple[str, ...]:
    """The initializers of a decoder's graph that depend on positions."""
    kinds = ("rope",) if config.yarn is None else ("rope", "rope.stretched")
    return tuple(f"{kind}.{part}" for kind in kinds for part in ("cos", "sin"))


def declared_inputs(names: tuple[str, ...]) -> bytes:
    """What to append to a serialized ModelProto so that its float32 initializers `names` can be replaced in a run."""
    return b"".join(_model(_graph_input(_name(name) + _type(_tensor_type(_FLOAT)))) for name in names)


def rotary_tables(config: DecoderConfig, positions: np.ndarray, width: int, *, spare: bool = False) -> dict[str, Any]:
    """The tables of `table_names` for a cache with `positions`, as OrtValues [max_position_embeddings, width].

    `spare`: of a decoder exported for drafting, whose tables have one row more.

    Rows for slots that no position of the context is left for are never read.
    """
    from onnxruntime import OrtValue

    most = config.max_position_embeddings
    rows = np.minimum(slot_positions(positions, 0, most + spare), most - 1).astype(np.float32)
    tables = {}
    for kind, stretched in (("rope", False), ("rope.stretched", True)):
        if stretched and config.yarn is None:
            continue
        angles = rows[:, None] * rotary_frequencies(config, stretched=stretched)
        angles = np.pad(angles, ((0, 0), (0, width - angles.shape[1])))  # heads that the operator needs wider
        scale = np.float32(config.yarn.attention_factor if stretched and config.yarn else 1.0)
        tables[f"{kind}.cos"], tables[f"{kind}.sin"] = scale * np.cos(angles), scale * np.sin(angles)
    return {name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(table)) for name, table in tables.items()}


def _model(graph: bytes) -> bytes:
    return _field(7, graph)  # ModelProto.graph


def _graph_input(value_info: bytes) -> bytes:
    return _field(11, value_info)  # GraphProto.input


def _name(name: str) -> bytes:
    return _field(1, name.encode("ascii"))  # ValueInfoProto.name


def _type(tensor: bytes) -> bytes:
    return _field(2, _field(1, tensor))  # ValueInfoProto.type, TypeProto.tensor_type


def _tensor_type(element: int) -> bytes:
    return bytes([1 << 3, element])  # TypeProto.Tensor.elem_type; without a shape, the initializer's applies


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field; contents are shorter than 128 bytes, so that a length takes one byte."""
    assert number < 16
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content
