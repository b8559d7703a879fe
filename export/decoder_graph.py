"""The decoder and its embedding as ONNX graphs, determined by DecoderConfig alone.

Keys and values live in buffers of a fixed capacity that the caller binds both as input and as output, so that a token
costs no copy: GroupQueryAttention writes at `total_length - n` and reads up to `total_length`.
"""

from __future__ import annotations

import numpy as np

from molmo_edge.checkpoints.tensor_names import TRANSFORMER, block_names, head_name
from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import DecoderConfig, MolmoConfig
from molmo_edge.export.experts_graph import experts_ffn
from molmo_edge.export.graph_builder import Graph, Precision
from molmo_edge.export.graph_operators import Positions, cached_attention, positions, rms_norm, silu

_END = 2**31 - 1  # of a Slice that takes all


def embed_tokens(graph: Graph, config: MolmoConfig, tensors: TensorSource, precision: Precision) -> None:
    """ids int64 [n] -> embeddings float32 [n, d_model], looked up in concat(embedding, new_embedding).

    Special ids below `embedding_size` select padding rows of the first table; the released weights were trained this
    way (reference: Embedding.forward).
    """
    d = config.decoder
    ids = graph.input("ids", np.int64, ["n"])
    parts = ["embedding", "new_embedding"] if d.additional_vocab_size else ["embedding"]
    table = np.concatenate([tensors.get(f"{TRANSFORMER}.wte.{part}") for part in parts])
    rows = precision.table(graph, ids, f"{TRANSFORMER}.wte", table)
    graph.output(graph.node("Identity", rows, name="embeddings"), np.float32, ["n", d.d_model])


def decoder(graph: Graph, config: MolmoConfig, tensors: TensorSource, precision: Precision) -> None:
    """embeddings float32 [1, n, d_model], total_length int32 [1], keys, values -> logits [1, embedding_size].

    `total_length` is the number of positions in the cache after these n; the logits are those of the last position.
    For each layer i, past_key.i, past_value.i, present_key.i and present_value.i are [1, n_kv_heads, capacity,
    head_dim], present and past to be bound to the same memory: float32, or float16 in "fp16" and "q4f16"
    (molmo_edge.export.graph_operators). A decoder with `bidirectional_images` has the further input image bool [n],
    True for image tokens: they attend to each other in both directions.

    With `Graph.drafts` the further input n_last int64 [1] says of how many positions, the last ones, the logits are:
    [n_last, embedding_size]. Each of them has the same bits in a run of its own, if the kernels of matrix products
    compute rows independently (molmo_edge.runtimes.drafting). A run then writes one position after its own into the
    caches, which the next run overwrites: `capacity` has to be one larger.
    """
    d = config.decoder
    x = graph.input("embeddings", np.float32, [1, "n", d.d_model])
    total = graph.input("total_length", np.int32, [1])
    image = graph.input("image", np.bool_, ["n"]) if d.bidirectional_images else ""
    where = positions(graph, d, x, total, image, spare=graph.drafts)
    for layer in range(d.n_layers):
        x = _block(graph, config, tensors, precision, x, layer, where)
    if config.point_head:
        graph.output(graph.node("Identity", x, name="states"), np.float32, [1, "n", d.d_model])
    if graph.drafts:
        first = graph.node("Neg", graph.input("n_last", np.int64, [1]))
        x = graph.node("Squeeze", _rows(graph, x, first, graph.ints(_END)), graph.ints(0))  # [n_last, d_model]
    else:
        x = graph.node("Gather", x, graph.constant(-1, np.int64), axis=1)  # [1, d_model]
    x = rms_norm(graph, x, f"{TRANSFORMER}.ln_f", tensors.get(f"{TRANSFORMER}.ln_f.weight"), d.norm_eps)
    name = head_name(config)
    logits = precision.linear(graph, x, name.removesuffix(".weight"), tensors.get(name), None)
    if d.additional_head:
        name = "lm_head.new_output_embeddings"
        more = precision.linear(graph, x, name, tensors.get(name), None)
        logits = graph.node("Concat", logits, more, axis=-1)
    rows = "n_last" if graph.drafts else 1
    graph.output(graph.node("Identity", logits, name="logits"), np.float32, [rows, d.n_logits])


def _block(
    graph: Graph,
    config: MolmoConfig,
    tensors: TensorSource,
    precision: Precision,
    x: str,
    layer: int,
    where: Positions,
) -> str:
    d, names = config.decoder, block_names(config, layer)

    def norm(y: str, name: str) -> str:
        return rms_norm(graph, y, name, tensors.get(f"{name}.weight"), d.norm_eps)

    h = x if d.norm_after else norm(x, names.attention_norm)
    h = _attention(graph, d, tensors, precision, h, names.attention, layer, where)
    h = norm(h, names.attention_norm) if d.norm_after else h
    x = graph.node("Add", x, h)

    h = x if d.norm_after else norm(x, names.ffn_norm)
    feed_forward = experts_ffn if d.n_experts else dense_ffn
    h = feed_forward(graph, d, tensors, precision, h, names.ffn)
    h = norm(h, names.ffn_norm) if d.norm_after else h
    return graph.node("Add", x, h, name=f"{TRANSFORMER}.blocks.{layer}")


def _attention(
    graph: Graph,
    d: DecoderConfig,
    tensors: TensorSource,
    precision: Precision,
    x: str,
    name: str,
    layer: int,
    where: Positions,
) -> str:
    bias = tensors.get(f"{name}.att_proj.bias") if d.qkv_bias else None
    qkv = precision.linear(graph, x, f"{name}.att_proj", tensors.get(f"{name}.att_proj.weight"), bias)
    if where.spare:
        spare = _rows(graph, qkv, graph.ints(-1), graph.ints(_END))
        qkv = graph.node("Concat", qkv, spare, axis=1)  # [1, n + 1, q_dim + 2 kv_dim]
    parts = [f"{name}.{part}" for part in ("q", "k", "v")]
    q, k, v = graph.nodes("Split", qkv, graph.ints(d.q_dim, d.kv_dim, d.kv_dim), outputs=parts, axis=-1)

    def norm(part: str, which: str) -> str:
        if d.qk_norm_per_head:
            part = graph.node("Reshape", part, graph.ints(0, 0, -1, d.head_dim))
        part = rms_norm(graph, part, f"{name}.{which}", tensors.get(f"{name}.{which}.weight"), d.norm_eps)
        return graph.node("Reshape", part, graph.ints(0, 0, -1)) if d.qk_norm_per_head else part

    if d.qk_norm:
        q, k = norm(q, "q_norm"), norm(k, "k_norm")
    half = precision.half_after(f"{name}.att_proj")
    h = cached_attention(graph, d, (q, k, v), name, layer, where, half=half)
    if where.spare:
        h = _rows(graph, h, graph.ints(0), graph.ints(-1))
    return precision.linear(graph, h, f"{name}.attn_out", tensors.get(f"{name}.attn_out.weight"), None)


def _rows(graph: Graph, x: str, start: str, end: str) -> str:
    """x [1, n, width] -> its rows from `start` to `end`."""
    return graph.node("Slice", x, start, end, graph.ints(1))


def dense_ffn(graph: Graph, d: DecoderConfig, tensors: TensorSource, precision: Precision, x: str, name: str) -> str:
    """SwiGLU; the fused matrix of the checkpoint is [up; gate], in this order."""
    fused = precision.linear(graph, x, f"{name}.ff_proj", tensors.get(f"{name}.ff_proj.weight"), None)
    parts = [f"{name}.up", f"{name}.gate"]
    up, gate = graph.nodes("Split", fused, graph.ints(d.ffn_dim, d.ffn_dim), outputs=parts, axis=-1)
    h = graph.node("Mul", up, silu(graph, gate))
    return precision.linear(graph, h, f"{name}.ff_out", tensors.get(f"{name}.ff_out.weight"), None)
