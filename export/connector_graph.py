"""The connector as an ONNX graph: padding embedding, 2x2 attention pooling, SwiGLU projector."""

from __future__ import annotations

import numpy as np

from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.export.graph_builder import Graph, Precision
from molmo_edge.export.graph_operators import silu

HUB = "model.vision_backbone"


def connector(graph: Graph, config: MolmoConfig, tensors: TensorSource, precision: Precision) -> None:
    """features float32 [n, patches^2, feature_dim], masks [n, patches^2] -> image_features [n, cells^2, d_model].

    Reference: MolmoVisionBackbone.forward, "pad_and_partial_pad" and "attention-meanq".
    """
    i, width = config.image, config.feature_dim
    features = graph.input("features", np.float32, ["n", i.patches**2, width])
    masks = graph.input("masks", np.float32, ["n", i.patches**2])
    x = graph.node("Add", features, _padding(graph, tensors, masks))
    x = _group(graph, config, x)  # [n * cells^2, pool^2, feature_dim]
    x = _pool(graph, config, tensors, precision, x)  # [n * cells^2, vision d_model]
    x = _project(graph, tensors, precision, x)  # [n * cells^2, d_model]
    shape = graph.ints(-1, i.cells**2, config.decoder.d_model)
    image_features = graph.node("Reshape", x, shape, name="image_features")
    graph.output(image_features, np.float32, ["n", i.cells**2, config.decoder.d_model])


def _padding(graph: Graph, tensors: TensorSource, masks: str) -> str:
    """What is added to a patch: pad_embed[0] where its mask is 0, pad_embed[1] where it is partial, else nothing.

    -1 counts as partial. The reference appends such a row behind the masks that it made, one crop late, and the
    released weights were trained with that.
    """
    embed = tensors.get(f"{HUB}.pad_embed")  # [2, feature_dim]
    full, partial = (graph.weight(f"{HUB}.pad_embed.{k}", embed[k]) for k in (0, 1))
    masks = graph.node("Unsqueeze", masks, graph.ints(-1))  # [n, patches^2, 1]
    below_one = graph.node("Less", masks, graph.constant(1.0))
    added = graph.node("Where", below_one, partial, graph.constant(0.0))
    return graph.node("Where", graph.node("Equal", masks, graph.constant(0.0)), full, added)


def _group(graph: Graph, config: MolmoConfig, x: str) -> str:
    i, width = config.image, config.feature_dim
    x = graph.node("Reshape", x, graph.ints(-1, i.cells, i.pool, i.cells, i.pool, width))
    x = graph.node("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
    return graph.node("Reshape", x, graph.ints(-1, i.pool**2, width))


def _pool(graph: Graph, config: MolmoConfig, tensors: TensorSource, precision: Precision, x: str) -> str:
    """Attention with one query, the mean, over the few patches of a cell: products and sums, not matrix products."""
    v = config.vision
    name = f"{HUB}.image_pooling_2d"

    def linear(y: str, part: str) -> str:
        weight, bias = tensors.get(f"{name}.{part}.weight"), tensors.get(f"{name}.{part}.bias")
        return precision.linear(graph, y, f"{name}.{part}", weight, bias)

    heads = graph.ints(0, -1, v.n_heads, v.head_dim)
    query = graph.node("ReduceMean", x, graph.ints(1), keepdims=1)
    q = graph.node("Reshape", linear(query, "wq"), heads)  # [m, 1, n_heads, head_dim]
    q = graph.node("Mul", q, graph.constant(v.head_dim**-0.5))
    k, value = (graph.node("Reshape", linear(x, w), heads) for w in ("wk", "wv"))  # [m, pool^2, n_heads, head_dim]
    scores = graph.node("ReduceSum", graph.node("Mul", q, k), graph.ints(3), keepdims=1)  # [m, pool^2, n_heads, 1]
    weights = graph.node("Softmax", scores, axis=1)
    pooled = graph.node("ReduceSum", graph.node("Mul", weights, value), graph.ints(1), keepdims=0)
    pooled = graph.node("Reshape", pooled, graph.ints(-1, v.d_model))
    return linear(pooled, "wo")


def _project(graph: Graph, tensors: TensorSource, precision: Precision, x: str) -> str:
    def linear(y: str, part: str) -> str:
        name = f"{HUB}.image_projector.{part}"
        return precision.linear(graph, y, name, tensors.get(f"{name}.weight"), None)

    return linear(graph.node("Mul", silu(graph, linear(x, "w1")), linear(x, "w3")), "w2")
