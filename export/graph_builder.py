"""A small builder for ONNX graphs, which streams weights to the file one tensor at a time.

Graphs are written node by node instead of traced: every operator is chosen here, PyTorch is not needed, and a weight
keeps its hub name, such as `model.transformer.blocks.0.attn.att_proj.weight`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from molmo_edge.config import DecoderConfig
from molmo_edge.export.errors import ExportError

MICROSOFT = "com.microsoft"  # domain of ONNX Runtime's operators
OPSET = 20  # the first with Gelu
IR_VERSION = 9  # that of opset 20; for versions of ONNX Runtime see molmo_edge.export.int8_graph
FLOAT, FLOAT16, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
INLINE_BELOW = 65_536  # bytes; smaller weights stay in the graph even if it has a sidecar
_PAGE = 4096  # bytes; ONNX Runtime can map sidecar tensors that start on a page boundary

_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.bool_): TensorProto.BOOL,
}


@dataclass(frozen=True)
class WeightError:
    """The error of rounding one or several matrices."""

    largest: float  # absolute difference
    squared: float  # sum of squared differences
    squared_weight: float  # sum of squared weights

    @property
    def relative(self) -> float:
        """Norm of the difference over norm of the weights."""
        return math.sqrt(self.squared / self.squared_weight) if self.squared_weight else 0.0


class Graph:
    """One ONNX graph under construction. A value is the name of a tensor in it.

    `sidecar`: a file to which large weights are written at once (an .onnx file cannot exceed 2 GB), so that memory
    holds one of them. Without it weights are stored in the graph. `plain`: use standard ONNX operators only
    (molmo_edge.export.graph_operators). `drafts`: of a decoder, see molmo_edge.export.decoder_graph.
    """

    def __init__(self, name: str, sidecar: Path | None = None, *, plain: bool = False, drafts: bool = False) -> None:
        self.name = name
        self.sidecar = sidecar
        self.plain = plain
        self.drafts = drafts
        self.memo: dict[tuple[str, ...], str] = {}  # values with several consumers, such as quantised inputs
        self.errors: dict[str, WeightError] = {}  # by rounded matrix
        self.needs: tuple[int, int] = (1, 20)  # the oldest ONNX Runtime with all its operators
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        if sidecar is not None:
            sidecar.write_bytes(b"")

    def input(self, name: str, dtype: type, shape: Sequence[int | str]) -> str:
        """Add an input and return its name. Strings in `shape` name axes of free size."""
        self._inputs.append(helper.make_tensor_value_info(name, _TYPES[np.dtype(dtype)], shape))
        return name

    def output(self, value: str, dtype: type, shape: Sequence[int | str]) -> None:
        """Make `value`, a tensor of the graph, an output. Strings in `shape` name axes of free size."""
        self._outputs.append(helper.make_tensor_value_info(value, _TYPES[np.dtype(dtype)], shape))

    def weight(self, name: str, array: np.ndarray) -> str:
        """Add a tensor under `name`, unless the graph already has it."""
        if name not in self._weights:
            array = np.asarray(array, order="C")
            proto = TensorProto(name=name, data_type=_TYPES[array.dtype], dims=array.shape)
            if self.sidecar is None or array.nbytes < INLINE_BELOW:
                proto.raw_data = array.tobytes()
            else:
                _append(self.sidecar, array, proto)
            self._weights[name] = proto
        return name

    def constant(self, value: float | Sequence[float], dtype: type = np.float32) -> str:
        """A small constant. Equal constants are stored once."""
        array: np.ndarray = np.asarray(value, dtype=dtype)
        return self.weight(f"constant/{array.dtype}/{array.tolist()}", array)

    def ints(self, *values: int) -> str:
        """A one-dimensional int64 constant: a shape, axes, bounds."""
        return self.constant(values, np.int64)

    def node(self, op: str, *inputs: str, domain: str = "", name: str | None = None, **attributes: Any) -> str:
        """Add a node with one output and return it; `name` names both."""
        return self.nodes(op, *inputs, outputs=(name or f"{op}_{len(self._nodes)}",), domain=domain, **attributes)[0]

    def nodes(
        self, op: str, *inputs: str, outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> tuple[str, ...]:
        """Add a node with the named outputs."""
        attributes = {key: value for key, value in attributes.items() if value is not None}
        name = f"{outputs[0]}/node"
        self._nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))
        return tuple(outputs)

    def need(self, *version: int) -> None:
        """Record that an operator needs this version of ONNX Runtime."""
        self.needs = max(self.needs, (version[0], version[1]))

    def rounded(self, name: str, weight: np.ndarray, restored: np.ndarray) -> None:
        """Record the error of rounding `weight` to `restored`; errors under one name add up.

        Raises ExportError for weights that are NaN or Inf, which rounding would hide.
        """
        before = self.errors.get(name, WeightError(0.0, 0.0, 0.0))
        difference = restored.reshape(weight.shape) - weight
        largest = float(np.abs(difference).max(initial=0))
        if not math.isfinite(largest):
            raise ExportError(
                f"{name} holds NaN or Inf, or values beyond the range of this precision: check the checkpoint"
            )
        self.errors[name] = WeightError(
            max(before.largest, largest),
            before.squared + float(np.vdot(difference, difference)),
            before.squared_weight + float(np.vdot(weight, weight)),
        )

    def save(self, path: Path) -> None:
        """Write the graph to `path`; its sidecar must stay in the same directory under the same name."""
        opsets = [helper.make_opsetid("", OPSET)] + ([] if self.plain else [helper.make_opsetid(MICROSOFT, 1)])
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, list(self._weights.values()))
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="molmo-edge")
        path.write_bytes(model.SerializeToString())


def _append(sidecar: Path, array: np.ndarray, proto: onnx.TensorProto) -> None:
    with sidecar.open("ab") as file:
        offset = math.ceil(file.tell() / _PAGE) * _PAGE
        file.write(bytes(offset - file.tell()))
        array.tofile(file)
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", sidecar.name), ("offset", offset), ("length", array.nbytes)):
        proto.external_data.add(key=key, value=str(value))


# Precisions differ in how they write matrices and tables into a graph.
Linear = Callable[[Graph, str, str, np.ndarray, "np.ndarray | None"], str]
"""(graph, x [..., in], hub name without ".weight", weight [out, in], bias [out] or None) -> [..., out]"""
Table = Callable[[Graph, str, str, np.ndarray], str]
"""(graph, ids int64 [n], name, table [rows, d]) -> [n, d]"""

ExpertPart = Callable[[str, int], np.ndarray]
"""("gate", "up" or "down", expert) -> its matrix [out, in]"""
Experts = Callable[[Graph, DecoderConfig, str, str, str, ExpertPart], "str | None"]
"""(graph, config, x [1, n, d], router's probabilities [1, n, n_experts], hub name, part) -> [1, n, d], or None if
these sizes are not supported and the experts must be written as separate matrices"""


def fp32_linear(graph: Graph, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None = None) -> str:
    """Multiply x [..., in] by a weight [out, in] in float32; see `Linear`."""
    # Stored transposed, [in, out], as MatMul needs it.
    y = graph.node("MatMul", x, graph.weight(f"{name}.weight", weight.T))
    return add_bias(graph, y, name, bias)


def fp32_table(graph: Graph, ids: str, name: str, table: np.ndarray) -> str:
    """Look up rows of a float32 table; see `Table`."""
    return graph.node("Gather", graph.weight(name, table), ids)


def add_bias(graph: Graph, y: str, name: str, bias: np.ndarray | None) -> str:
    """Add a bias [out] to y [..., out]; None returns y unchanged."""
    return y if bias is None else graph.node("Add", y, graph.weight(f"{name}.bias", bias))


@dataclass(frozen=True)
class Precision:
    """How the matrices and the lookup table of a component are stored and multiplied."""

    name: str  # in the manifest: one of ONNX_PRECISIONS, for a decoder followed by ",part=precision"
    suffix: str  # of the component's file: "" for fp32, else "_" and the name, or "_parts"
    bytes_per_weight: float
    linear: Linear
    table: Table
    experts: Experts | None = None  # None: experts are written as separate matrices
    router: Linear = fp32_linear  # it is small, and its errors choose other experts
    half: bool = False  # products in float16, including attention and its cache
    keep: Collection[str] = ()  # matrices (hub names without ".weight") that stay float32, as float16 would overflow

    def half_after(self, *matrices: str) -> bool:
        """Whether the outputs of these matrices may be multiplied in float16."""
        return self.half and not any(name in self.keep for name in matrices)


FP32 = Precision("fp32", "", 4, fp32_linear, fp32_table)
