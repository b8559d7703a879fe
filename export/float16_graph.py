"""float16, "fp16": half the bytes, for GPUs, which multiply it twice as fast or more.

The products are float16: matrices, and q, k, v and the cache of attention. What lies between them, norms, activations,
softmax and the residual stream, stays float32, where large values are: the ViT's few huge channels, the sums of many
layers. So only what enters or leaves a product can pass float16's 65504; molmo_edge.export.activation_ranges finds
those matrices, and they stay float32, as does the attention behind them. Attention's scores are not watched: queries
are scaled before they meet the keys.

On a CPU ONNX Runtime widens it again, and leaves out the rounding of what enters a product: it runs, no faster and in
more memory than fp32, and shows nothing of what float16 costs. onnx's own evaluator does (tests/test_targets.py).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from molmo_edge.export.graph_builder import Graph, Precision, add_bias, fp32_linear
from molmo_edge.export.graph_operators import from_half, to_half


def float16_linear(graph: Graph, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None = None) -> str:
    half = weight.T.astype(np.float16)
    graph.rounded(name, weight, half.T.astype(np.float32))
    y = graph.node("MatMul", to_half(graph, x), graph.weight(f"{name}.weight", half))
    return add_bias(graph, from_half(graph, y), name, bias)


def float16_table(graph: Graph, ids: str, name: str, table: np.ndarray) -> str:
    half = table.astype(np.float16)
    graph.rounded(name, table, half.astype(np.float32))
    return from_half(graph, graph.node("Gather", graph.weight(name, half), ids))


def float16(keep: Collection[str] = ()) -> Precision:
    """The precision "fp16"; matrices in `keep` (hub names without ".weight") stay float32."""

    def linear(graph: Graph, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None) -> str:
        return (fp32_linear if name in keep else float16_linear)(graph, x, name, weight, bias)

    return Precision("fp16", "_fp16", 2, linear, float16_table, half=True, keep=frozenset(keep))
