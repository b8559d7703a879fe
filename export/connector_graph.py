"""The connector as an ONNX graph: padding embedding, attention pooling, SwiGLU projector."""

from __future__ import annotations

import numpy as np

from molmo_edge.checkpoints.tensor_names import BACKBONE, connector_name
from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.export.graph_builder import FLOAT, Graph, Precision
from molmo_edge.export.graph_operators import silu


def connector(graph: Graph, config: MolmoConfig, tensors: TensorSource, precision: Precision) -> None:
    """features float32 [n, patches^2, feature_dim], masks [n, patches^2] -> image_features [n, cells^2, d_model].

    A model that pools across crops has the further input pooling int64 [m, pool^2], the patches of each cell among
    those of all n crops, -1 for none, and gives image_features [m, d_model]. A model without padding embedding has no
    input masks. Reference: MolmoVisionBackbone.forward, "pad_and_partial_pad" and "attention-meanq".
    """
    i, d_model = config.image, config.decoder.d_model
    x = graph.input("features", np.float32, ["n", i.patches**2, config.feature_dim])
    if config.pad_embed:
        masks = graph.input("masks", np.float32, ["n", i.patches**2])
        x = graph.node("Add", x, _padding(graph, tensors, masks))
    if i.pools_across_crops:
        pooling = graph.input("pooling", np.int64, ["m", "slots"])
        x, there = _gather(graph, config, x, pooling)  # [m, pool^2, feature_dim]
    else:
        x, there = _group(graph, config, x), None  # [n * cells^2, pool^2, feature_dim]
    x = _pool(graph, config, tensors, precision, x, there)  # [n * cells^2, vision d_model]
    x = _project(graph, config, tensors, precision, x)  # [n * cells^2, d_model]
    shape: list[int | str] = ["m", d_model] if i.pools_across_crops else ["n", i.cells**2, d_model]
    shape_of = graph.ints(-1, *(size for size in shape[1:] if isinstance(size, int)))
    graph.output(graph.node("Reshape", x, shape_of, name="image_features"), np.float32, shape)


def _padding(graph: Graph, tensors: TensorSource, masks: str) -> str:
    """The vector added to each patch: pad_embed[0] if its mask is 0, pad_embed[1] if it is partial, else zeros.

    -1 counts as partial: the reference appends such a row after the masks, which shifts them by one crop, and the
    released weights were trained with that.
    """
    embed = tensors.get(f"{BACKBONE}.pad_embed")  # [2, feature_dim]
    full, partial = (graph.weight(f"{BACKBONE}.pad_embed.{k}", embed[k]) for k in (0, 1))
    masks = graph.node("Unsqueeze", masks, graph.ints(-1))  # [n, patches^2, 1]
    below_one = graph.node("Less", masks, graph.constant(1.0))
    added = graph.node("Where", below_one, partial, graph.constant(0.0))
    return graph.node("Where", graph.node("Equal", masks, graph.constant(0.0)), full, added)


def _group(graph: Graph, config: MolmoConfig, x: str) -> str:
    i, width = config.image, config.feature_dim
    x = graph.node("Reshape", x, graph.ints(-1, i.cells, i.pool, i.cells, i.pool, width))
    x = graph.node("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
    return graph.node("Reshape", x, graph.ints(-1, i.pool**2, width))


def _gather(graph: Graph, config: MolmoConfig, x: str, pooling: str) -> tuple[str, str]:
    """The patches of each cell [m, slots, feature_dim], zeros where there is none, and 1 where there is one, else 0."""
    patches = graph.node("Reshape", x, graph.ints(-1, config.feature_dim))  # [n * patches^2, feature_dim]
    there = graph.node("Cast", graph.node("GreaterOrEqual", pooling, graph.constant(0, np.int64)), to=FLOAT)
    there = graph.node("Unsqueeze", there, graph.ints(-1))  # [m, slots, 1]
    index = graph.node("Max", pooling, graph.constant(0, np.int64))
    return graph.node("Mul", graph.node("Gather", patches, index), there), there


def _pool(
    graph: Graph, config: MolmoConfig, tensors: TensorSource, precision: Precision, x: str, there: str | None
) -> str:
    """Attention with one query, the mean, over the few patches of a cell: products and sums, not matrix products."""
    v = config.vision
    name, n_heads = f"{connector_name(config)}.image_pooling_2d", config.pooling_heads or v.n_heads
    head_dim = v.d_model // n_heads

    def linear(y: str, part: str) -> str:
        weight, bias = tensors.get(f"{name}.{part}.weight"), tensors.get(f"{name}.{part}.bias")
        return precision.linear(graph, y, f"{name}.{part}", weight, bias)

    heads = graph.ints(0, -1, n_heads, head_dim)
    if there is None:
        query = graph.node("ReduceMean", x, graph.ints(1), keepdims=1)
    else:  # absent patches are zeros
        total = graph.node("ReduceSum", x, graph.ints(1), keepdims=1)
        query = graph.node("Div", total, graph.node("ReduceSum", there, graph.ints(1), keepdims=1))
    q = graph.node("Reshape", linear(query, "wq"), heads)  # [m, 1, n_heads, head_dim]
    q = graph.node("Mul", q, graph.constant(head_dim**-0.5))
    k, value = (graph.node("Reshape", linear(x, w), heads) for w in ("wk", "wv"))  # [m, pool^2, n_heads, head_dim]
    scores = graph.node("ReduceSum", graph.node("Mul", q, k), graph.ints(3), keepdims=1)  # [m, pool^2, n_heads, 1]
    if there is not None:  # weights of absent patches underflow to 0
        absent = graph.node("Mul", graph.node("Sub", there, graph.constant(1.0)), graph.constant(1e9))
        scores = graph.node("Add", scores, graph.node("Unsqueeze", absent, graph.ints(-1)))
    weights = graph.node("Softmax", scores, axis=1)
    pooled = graph.node("ReduceSum", graph.node("Mul", weights, value), graph.ints(1), keepdims=0)
    pooled = graph.node("Reshape", pooled, graph.ints(-1, v.d_model))
    return linear(pooled, "wo") if config.pooling_output else pooled


def _project(graph: Graph, config: MolmoConfig, tensors: TensorSource, precision: Precision, x: str) -> str:
    def linear(y: str, part: str) -> str:
        name = f"{connector_name(config)}.image_projector.{part}"
        return precision.linear(graph, y, name, tensors.get(f"{name}.weight"), None)

    return linear(graph.node("Mul", silu(graph, linear(x, "w1")), linear(x, "w3")), "w2")
