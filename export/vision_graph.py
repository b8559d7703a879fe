"""The vision towers as one ONNX graph; a ViT (CLIP, DINOv2, SigLIP) up to the last block whose output is used."""

from __future__ import annotations

import numpy as np

from molmo_edge.checkpoints.tensor_names import vit_names
from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import MolmoConfig, VisionConfig
from molmo_edge.export.conv_tower_graph import conv_features
from molmo_edge.export.graph_builder import Graph, Precision
from molmo_edge.export.graph_operators import attention, gelu


def vision_encoder(graph: Graph, config: MolmoConfig, tensors: TensorSource, precision: Precision) -> None:
    """crops float32 [n, patches^2, patch_size^2 * 3] -> features float32 [n, patches^2, feature_dim].

    The outputs of the `layers` of each ViT are concatenated in that order, without the class token, then the features
    of a convolutional tower, which adds the inputs of `conv_features`. A crop whose pixels are ALL -1 (batch padding)
    gives zeros; the remote code of MolmoE does so where ANY pixel is -1, which is a bug (reference:
    MolmoVisionBackbone.encode_image).
    """
    v = config.vision
    crops = graph.input("crops", np.float32, ["n", v.n_patches, v.patch_size**2 * 3])
    vits = [_vit(graph, vit, tensors, precision, crops, hub) for vit, _, hub in vit_names(config)]
    features = vits[0] if len(vits) == 1 else graph.node("Concat", *vits, axis=-1)

    padding = graph.node("Cast", graph.node("Equal", crops, graph.constant(-1.0)), to=1)  # float
    all_padding = graph.node("ReduceMin", padding, graph.ints(1, 2), keepdims=1)  # [n, 1, 1]
    keep = graph.node("Sub", graph.constant(1.0), all_padding)
    tower = config.conv_tower is not None
    features = graph.node("Mul", features, keep, name=None if tower else "features")
    if tower:
        features = graph.node("Concat", features, conv_features(graph, config, tensors), axis=-1, name="features")
    graph.output(features, np.float32, ["n", v.n_patches, config.feature_dim])


def _vit(graph: Graph, v: VisionConfig, tensors: TensorSource, precision: Precision, crops: str, hub: str) -> str:
    """[n, patches^2, v.feature_dim]"""
    x = _embed(graph, v, tensors, precision, crops, hub)
    outputs = {}
    for layer in range(v.last_layer + 1):
        x = _block(graph, v, tensors, precision, x, f"{hub}.transformer.resblocks.{layer}")
        outputs[layer] = x
    chosen = [outputs[layer % v.n_layers] for layer in v.layers]
    features = chosen[0] if len(chosen) == 1 else graph.node("Concat", *chosen, axis=-1)
    if not v.parts.class_token:
        return features
    return graph.node("Slice", features, graph.ints(1), graph.ints(v.n_pos), graph.ints(1))


def layer_norm(graph: Graph, x: str, name: str, tensors: TensorSource, eps: float) -> str:
    """Normalise x [..., d] over its last axis with the tensors NAME.weight and NAME.bias; same shape."""
    weight, bias = (graph.weight(f"{name}.{leaf}", tensors.get(f"{name}.{leaf}")) for leaf in ("weight", "bias"))
    return graph.node("LayerNormalization", x, weight, bias, axis=-1, epsilon=eps)


def _embed(graph: Graph, v: VisionConfig, tensors: TensorSource, precision: Precision, crops: str, hub: str) -> str:
    name = f"{hub}.patch_embedding"
    bias = tensors.get(f"{name}.bias") if v.parts.patch_bias else None
    x = precision.linear(graph, crops, name, tensors.get(f"{name}.weight"), bias)  # [n, patches^2, d]
    if v.parts.class_token:
        token = graph.weight(f"{hub}.class_embedding", tensors.get(f"{hub}.class_embedding").reshape(1, 1, -1))
        batch = graph.node("Shape", crops, start=0, end=1)
        token = graph.node("Expand", token, graph.node("Concat", batch, graph.ints(1, 1), axis=0))  # [n, 1, d]
        x = graph.node("Concat", token, x, axis=1)  # [n, n_pos, d]
    positions = graph.weight(f"{hub}.positional_embedding", tensors.get(f"{hub}.positional_embedding"))
    x = graph.node("Add", x, positions)
    return layer_norm(graph, x, f"{hub}.pre_ln", tensors, v.norm_eps) if v.parts.pre_ln else x


def _block(graph: Graph, v: VisionConfig, tensors: TensorSource, precision: Precision, x: str, block: str) -> str:
    """Pre-norm block; LayerScale is folded into the last matrix of each branch."""

    def linear(y: str, part: str, scale: str = "") -> str:
        weight, bias = tensors.get(f"{block}.{part}.weight"), tensors.get(f"{block}.{part}.bias")
        if scale and v.parts.layer_scale:
            factor = tensors.get(f"{block}.{scale}")
            weight, bias = weight * factor[:, None], bias * factor
        return precision.linear(graph, y, f"{block}.{part}", weight, bias)

    h = layer_norm(graph, x, f"{block}.attention_norm", tensors, v.norm_eps)
    q, k, value = (linear(h, f"attention.{w}") for w in ("wq", "wk", "wv"))
    half = precision.half_after(*(f"{block}.attention.{w}" for w in ("wq", "wk", "wv")))
    h = attention(graph, q, k, value, v.n_heads, v.head_dim, half=half)
    x = graph.node("Add", x, linear(h, "attention.wo", "lambda1"))

    h = layer_norm(graph, x, f"{block}.ffn_norm", tensors, v.norm_eps)
    h = gelu(graph, linear(h, "feed_forward.w1"), v.activation)
    return graph.node("Add", x, linear(h, "feed_forward.w2", "lambda2"), name=block)
