"""float16 weights in a graph, for GPUs: half the bytes, and products at twice the speed or more.

The products are float16: matrices, and q, k, v and the cache of attention. Norms, activations, softmax and the residual
stream stay float32, because they hold large values: the ViT's few huge channels, the sums over many layers. So only
inputs and outputs of a product can exceed float16's 65504. molmo_edge.export.activation_ranges finds those matrices;
they stay float32, as does the attention after them. Attention scores need no such test: queries are scaled before
they meet the keys.

On a CPU ONNX Runtime converts it back to float32 and does not round the inputs of products: it runs no faster, in more
memory than fp32, and does not show float16's error. onnx's reference evaluator does (tests/test_targets.py).
"""

from __future__ import annotations

import numpy as np

from molmo_edge.export.graph_builder import Graph, add_bias
from molmo_edge.export.graph_operators import from_half, to_half


def float16_linear(graph: Graph, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None = None) -> str:
    """Multiply x [..., in] by a weight [out, in] in float16, and return float32 [..., out]. The bias is float32."""
    half = weight.T.astype(np.float16)
    graph.rounded(name, weight, half.T.astype(np.float32))
    y = graph.node("MatMul", to_half(graph, x), graph.weight(f"{name}.weight", half))
    return add_bias(graph, from_half(graph, y), name, bias)


def float16_table(graph: Graph, ids: str, name: str, table: np.ndarray) -> str:
    """Look up rows of a table [rows, d], stored in float16, and return float32 [n, d]."""
    half = table.astype(np.float16)
    graph.rounded(name, table, half.astype(np.float32))
    return from_half(graph, graph.node("Gather", graph.weight(name, half), ids))
