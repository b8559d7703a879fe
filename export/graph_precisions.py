"""Turn a precision name into the functions that write a component's matrices and tables into its graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import numpy as np

from molmo_edge.config import DecoderConfig
from molmo_edge.export.float16_graph import float16_linear, float16_table
from molmo_edge.export.graph_builder import ExpertPart, Graph, Linear, Precision, fp32_linear, fp32_table
from molmo_edge.export.int4_graph import Int4
from molmo_edge.export.int8_graph import int8_linear, int8_table, q8_linear
from molmo_edge.export.precisions import BYTES_PER_WEIGHT, ONNX_PRECISIONS, PARTS, decoder_part

_TABLES = {"fp32": fp32_table, "fp16": float16_table, "int8": int8_table}


def graph_precision(
    name: str, parts: Mapping[str, str] | None = None, int4: Int4 | None = None, keep_fp32: Collection[str] = ()
) -> Precision:
    """The precision `name`, one of ONNX_PRECISIONS.

    `parts`: parts of a decoder that differ from it, {part: one of PART_PRECISIONS}; not in a float16 precision.
    `int4`: how four-bit weights are made. `keep_fp32`: matrices (hub names without ".weight") that float16 overflows.
    """
    precision, parts, int4 = ONNX_PRECISIONS[name], parts or {}, int4 or Int4()
    half = precision.half
    formats = {**precision.formats, **parts}
    linears: dict[str, Linear] = {
        "fp32": fp32_linear,
        "fp16": float16_linear,
        "int8": int8_linear,
        "q8": q8_linear,
        "q4": partial(int4.linear, half=half),
    }

    def linear(graph: Graph, x: str, matrix: str, weight: np.ndarray, bias: np.ndarray | None) -> str:
        matrix_format = "fp32" if matrix in keep_fp32 else formats[decoder_part(matrix)]
        if matrix_format == "q8" and graph.plain:  # the head of an int8 decoder; standard ONNX has no blocks
            matrix_format = "int8"
        return linears[matrix_format](graph, x, matrix, weight, bias)

    def experts(graph: Graph, d: DecoderConfig, x: str, probabilities: str, name: str, part: ExpertPart) -> str | None:
        return int4.experts(graph, d, x, probabilities, name, part, half=half)

    return Precision(
        ",".join([name, *(f"{part}={parts[part]}" for part in PARTS if part in parts)]),
        "_parts" if parts else "" if name == "fp32" else f"_{name}",
        max([precision.bytes_per_weight, *(BYTES_PER_WEIGHT[part] for part in parts.values())]),
        linear,
        _TABLES[precision.table],
        experts if formats["experts"] == "q4" else None,
        router=linears[formats["router"]],
        half=half,
        keep=frozenset(keep_fp32),
    )
