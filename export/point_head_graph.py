"""MolmoPoint's grounding head as an ONNX graph: its projections. molmo_edge.runtimes.grounding implements the rest."""

from __future__ import annotations

import numpy as np

from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.export.graph_builder import Graph, Precision
from molmo_edge.export.graph_operators import rms_norm

HUB = "model.point_predictor"


def point_head(graph: Graph, config: MolmoConfig, tensors: TensorSource, precision: Precision) -> None:
    """states float32 [n, d_model], features float32 [m, feature_dim] -> the projections of `PointHead`.

    Outputs: patch_query, patch_key, slot_query [n, dim], location [n, n_locations]; slot_key [m, dim], embedding
    [m, d_model]; no_more [dim]; of a head with votes, vote_query [n, votes * vote_dim + 1] and vote_key of m rows.
    """
    point, d = config.point_head, config.decoder
    assert point is not None
    states = graph.input("states", np.float32, ["n", d.d_model])
    features = graph.input("features", np.float32, ["m", config.feature_dim])
    normed = rms_norm(graph, states, f"{HUB}.x_norm", tensors.get(f"{HUB}.x_norm.weight"), d.norm_eps)

    def project(x: str, rows: str, width: int, name: str, output: str) -> None:
        weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
        y = precision.linear(graph, x, name, weight, bias)
        graph.output(graph.node("Identity", y, name=output), np.float32, [rows, width])

    project(normed, "n", point.dim, f"{HUB}.patch_q", "patch_query")
    project(normed, "n", point.dim, f"{HUB}.patch_k", "patch_key")
    project(normed, "n", point.dim, f"{HUB}.subpatch_q", "slot_query")
    project(states, "n", point.n_locations, f"{HUB}.subpatch_loc_k", "location")
    project(features, "m", point.dim, f"{HUB}.subpatch_k", "slot_key")
    project(features, "m", d.d_model, "model.build_vit_embedding", "embedding")
    if point.votes:
        project(normed, "n", point.votes * point.vote_dim + 1, f"{HUB}.vote_q", "vote_query")
        project(features, "m", point.votes * point.vote_dim, f"{HUB}.vote_k", "vote_key")
    name = f"{HUB}.add_no_point_class_embed.vector"
    graph.output(graph.node("Identity", graph.weight(name, tensors.get(name)), name="no_more"), np.float32, [point.dim])
