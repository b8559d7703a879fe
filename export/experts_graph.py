"""OLMoE's experts in a graph, in one of three forms.

The router is float32 unless the precision sets another type for it, and the selected probabilities are not renormalised
(OLMoE: norm_topk_prob false).
"""

from __future__ import annotations

import numpy as np

from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import DecoderConfig
from molmo_edge.export.graph_builder import ExpertPart, Graph, Precision
from molmo_edge.export.graph_operators import silu

# Weights of a layer's experts. With fewer, computing all is faster than selecting some; nano has 2.7 million.
WIDE_BELOW = 8_000_000


def experts_ffn(graph: Graph, d: DecoderConfig, tensors: TensorSource, precision: Precision, x: str, name: str) -> str:
    """x [1, n, d_model] -> the sum of its top_k experts, each weighted by its probability.

    The precision's own operator is used if it has one; otherwise small experts become one wide SwiGLU that the router
    scales, and large ones run one after the other on the positions that chose them.
    """

    def part(which: str, e: int) -> np.ndarray:
        return tensors.get(f"{name}.experts.{e}.{which}_proj.weight")

    logits = precision.router(graph, x, f"{name}.gate", tensors.get(f"{name}.gate.weight"), None)
    probabilities = graph.node("Softmax", logits, axis=-1)  # [1, n, n_experts]
    if precision.experts is not None and not graph.plain:
        picked = precision.experts(graph, d, x, probabilities, f"{name}.experts", part)
        if picked is not None:
            return picked
    chosen = _chosen(graph, d, probabilities, name)
    if 3 * d.n_experts * d.ffn_dim * d.d_model <= WIDE_BELOW:
        return _wide(graph, d, precision, x, chosen, f"{name}.experts", part)
    return _one_by_one(graph, d, precision, x, chosen, f"{name}.experts", part)


def _chosen(graph: Graph, d: DecoderConfig, probabilities: str, name: str) -> str:
    """The probabilities with all but the top_k set to 0: [1, n, n_experts]."""
    outputs = (f"{name}.top_probabilities", f"{name}.top_experts")
    values, experts = graph.nodes("TopK", probabilities, graph.ints(d.top_k), outputs=outputs, axis=-1)
    nothing = graph.node("Mul", probabilities, graph.constant(0.0))
    return graph.node("ScatterElements", nothing, experts, values, axis=-1)


def _wide(
    graph: Graph, d: DecoderConfig, precision: Precision, x: str, chosen: str, name: str, part: ExpertPart
) -> str:
    """All experts as one SwiGLU; those that were not chosen are scaled by 0, so the result is exact."""

    def stacked(which: str, axis: int = 0) -> np.ndarray:
        return np.concatenate([part(which, e) for e in range(d.n_experts)], axis=axis)

    gate = precision.linear(graph, x, f"{name}.gate_proj", stacked("gate"), None)
    up = precision.linear(graph, x, f"{name}.up_proj", stacked("up"), None)
    h = graph.node("Mul", silu(graph, gate), up)  # [1, n, n_experts * ffn_dim]
    h = graph.node("Reshape", h, graph.ints(0, -1, d.n_experts, d.ffn_dim))
    chosen = graph.node("Unsqueeze", chosen, graph.ints(-1))  # [1, n, n_experts, 1]
    h = graph.node("Reshape", graph.node("Mul", h, chosen), graph.ints(0, -1, d.n_experts * d.ffn_dim))
    return precision.linear(graph, h, f"{name}.down_proj", stacked("down", axis=1), None)


def _one_by_one(
    graph: Graph, d: DecoderConfig, precision: Precision, x: str, chosen: str, name: str, part: ExpertPart
) -> str:
    """For each expert: gather the positions that chose it, run it, and add the result to the sum."""
    rows = graph.node("Reshape", x, graph.ints(-1, d.d_model))  # [n, d_model]
    columns = graph.nodes(
        "Split",
        graph.node("Reshape", chosen, graph.ints(-1, d.n_experts)),
        outputs=[f"{name}.{e}.weights" for e in range(d.n_experts)],
        axis=-1,
        num_outputs=d.n_experts,
    )
    total = graph.node("Mul", rows, graph.constant(0.0))
    for e, column in enumerate(columns):  # [n, 1]

        def linear(y: str, which: str, e: int = e) -> str:
            return precision.linear(graph, y, f"{name}.{e}.{which}_proj", part(which, e), None)

        at = graph.node("Transpose", graph.node("NonZero", column), perm=[1, 0])  # [m, 2] of (position, 0)
        at = graph.node("Slice", at, graph.ints(0), graph.ints(1), graph.ints(1))  # [m, 1]
        mine = graph.node("GatherND", rows, at)  # [m, d_model]
        h = linear(graph.node("Mul", silu(graph, linear(mine, "gate")), linear(mine, "up")), "down")
        h = graph.node("Mul", h, graph.node("GatherND", column, at))
        total = graph.node("ScatterND", total, at, h, reduction="add")
    return graph.node("Unsqueeze", total, graph.ints(0))
