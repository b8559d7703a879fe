"""The decoder and its embedding as ONNX graphs: dense (Qwen2 and OLMo style) and OLMoE.

Keys and values live in buffers of a fixed capacity that the caller binds as input and as output at once, so a
token costs no copy: GroupQueryAttention writes at `total_length - n` and reads up to `total_length`.
"""

from __future__ import annotations

import numpy as np

from molmo_edge.config import DecoderConfig, MolmoConfig
from molmo_edge.export.graph import FP32, MICROSOFT, Graph, Precision
from molmo_edge.modeling.checkpoint import TensorSource

HUB = "model.transformer"
_HEAD_UNIT = 16  # GroupQueryAttention takes heads of a multiple of this


def embed_tokens(graph: Graph, config: MolmoConfig, tensors: TensorSource, precision: Precision) -> None:
    """ids int64 [n] -> embeddings float32 [n, d_model], looked up in concat(embedding, new_embedding).

    Special ids below `embedding_size` hit rows of the first table that no token uses; that is how the released
    weights were trained (reference: Embedding.forward).
    """
    d = config.decoder
    ids = graph.input("ids", np.int64, ["n"])
    parts = ["embedding", "new_embedding"] if d.additional_vocab_size else ["embedding"]
    table = np.concatenate([tensors.get(f"{HUB}.wte.{part}") for part in parts])
    rows = precision.table(graph, ids, f"{HUB}.wte", table)
    graph.output(graph.node("Identity", rows, name="embeddings"), np.float32, ["n", d.d_model])


def decoder(graph: Graph, config: MolmoConfig, tensors: TensorSource, precision: Precision) -> None:
    """embeddings float32 [1, n, d_model], total_length int32 [1], keys, values -> logits [1, embedding_size].

    `total_length` counts the positions after these n; the logits are those of the last one. For each layer i,
    past_key.i and past_value.i are float32 [1, n_kv_heads, capacity, head_dim] (rounded up to a multiple of 16),
    and so are present_key.i and present_value.i, to be bound to the same memory.
    """
    d = config.decoder
    x = graph.input("embeddings", np.float32, [1, "n", d.d_model])
    total = graph.input("total_length", np.int32, [1])
    seqlens = graph.node("Sub", total, graph.constant([1], np.int32))  # as GroupQueryAttention counts
    rope = _rope(graph, d)
    for layer in range(d.n_layers):
        x = _block(graph, d, tensors, precision, x, layer, (seqlens, total, *rope))
    x = graph.node("Gather", x, graph.constant(-1, np.int64), axis=1)  # [1, d_model]
    x = rms_norm(graph, x, f"{HUB}.ln_f", tensors, d.norm_eps)
    name = head_name(d)
    logits = precision.linear(graph, x, name.removesuffix(".weight"), tensors.get(name), None)
    graph.output(graph.node("Identity", logits, name="logits"), np.float32, [1, d.embedding_size])


def head_name(d: DecoderConfig) -> str:
    """The hub's name of the matrix that makes logits; the remote code of MolmoE moved it to the top level."""
    if d.weight_tying:
        return f"{HUB}.wte.embedding"
    return "lm_head.weight" if d.n_experts else f"{HUB}.ff_out.weight"


def rms_norm(graph: Graph, x: str, name: str, tensors: TensorSource, eps: float) -> str:
    weight = graph.weight(f"{name}.weight", tensors.get(f"{name}.weight"))
    return graph.node("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=eps, stash_type=1)


def kernel_head_dim(d: DecoderConfig) -> int:
    """Width of a head in the attention operator and in the cache."""
    return -(-d.head_dim // _HEAD_UNIT) * _HEAD_UNIT


def _widen(graph: Graph, d: DecoderConfig, x: str) -> str:
    """Heads of x [1, n, heads * head_dim] padded with zeros, each half of a head for itself, as rotation pairs them."""
    pad = (kernel_head_dim(d) - d.head_dim) // 2
    if not pad:
        return x
    halves = graph.node("Reshape", x, graph.ints(1, -1, 2, d.head_dim // 2))  # [1, n * heads, 2, head_dim / 2]
    halves = graph.node("Pad", halves, graph.ints(0, 0, 0, 0, 0, 0, 0, pad))
    # Shape of x but for the last axis, which the heads have outgrown.
    length = graph.node("Shape", x, start=0, end=2)
    return graph.node("Reshape", halves, graph.node("Concat", length, graph.ints(-1), axis=0))


def _narrow(graph: Graph, d: DecoderConfig, x: str) -> str:
    """The inverse of `_widen` for [1, n, n_heads * kernel_head_dim]."""
    half = d.head_dim // 2
    if kernel_head_dim(d) == d.head_dim:
        return x
    halves = graph.node("Reshape", x, graph.ints(0, -1, 2 * d.n_heads, kernel_head_dim(d) // 2))
    halves = graph.node("Slice", halves, graph.ints(0), graph.ints(half), graph.ints(3))
    return graph.node("Reshape", halves, graph.ints(0, -1, d.d_model))


def _rope(graph: Graph, d: DecoderConfig) -> tuple[str, str]:
    """cos and sin [max_position_embeddings, head_dim / 2], in float32 throughout, as the reference makes them."""
    exponent = np.arange(0, d.head_dim, 2, dtype=np.float32) / np.float32(d.head_dim)
    frequency = np.float32(1.0) / np.float32(d.rope_theta) ** exponent
    angles = np.arange(d.max_position_embeddings, dtype=np.float32)[:, None] * frequency
    angles = np.pad(angles, ((0, 0), (0, (kernel_head_dim(d) - d.head_dim) // 2)))
    return graph.weight("rope.cos", np.cos(angles)), graph.weight("rope.sin", np.sin(angles))


def _block(
    graph: Graph,
    d: DecoderConfig,
    tensors: TensorSource,
    precision: Precision,
    x: str,
    layer: int,
    positions: tuple[str, ...],
) -> str:
    block = f"{HUB}.blocks.{layer}"
    # The remote code of MolmoE nests what the dense checkpoints keep flat.
    attention, ffn = (f"{block}.attn", f"{block}.mlp") if d.n_experts else (block, block)

    def norm(y: str, name: str) -> str:
        return rms_norm(graph, y, name, tensors, d.norm_eps)

    h = x if d.norm_after else norm(x, f"{attention}.attn_norm")
    h = _attention(graph, d, tensors, precision, h, attention, layer, positions)
    h = norm(h, f"{attention}.attn_norm") if d.norm_after else h
    x = graph.node("Add", x, h)

    h = x if d.norm_after else norm(x, f"{ffn}.ff_norm")
    feed_forward = experts_ffn if d.n_experts else dense_ffn
    h = feed_forward(graph, d, tensors, precision, h, ffn)
    h = norm(h, f"{ffn}.ff_norm") if d.norm_after else h
    return graph.node("Add", x, h, name=block)


def _attention(
    graph: Graph,
    d: DecoderConfig,
    tensors: TensorSource,
    precision: Precision,
    x: str,
    name: str,
    layer: int,
    positions: tuple[str, ...],
) -> str:
    bias = tensors.get(f"{name}.att_proj.bias") if d.qkv_bias else None
    qkv = precision.linear(graph, x, f"{name}.att_proj", tensors.get(f"{name}.att_proj.weight"), bias)
    kv_dim = d.n_kv_heads * d.head_dim
    parts = [f"{name}.{part}" for part in ("q", "k", "v")]
    q, k, v = graph.nodes("Split", qkv, graph.ints(d.d_model, kv_dim, kv_dim), outputs=parts, axis=-1)
    if d.qk_norm:  # over the full width, before the heads are split
        q = rms_norm(graph, q, f"{name}.q_norm", tensors, d.norm_eps)
        k = rms_norm(graph, k, f"{name}.k_norm", tensors, d.norm_eps)
    q, k, v = (_widen(graph, d, part) for part in (q, k, v))
    buffer: list[int | str] = [1, d.n_kv_heads, "capacity", kernel_head_dim(d)]
    past = [graph.input(f"past_{part}.{layer}", np.float32, buffer) for part in ("key", "value")]
    present = [f"present_{part}.{layer}" for part in ("key", "value")]
    h, *present = graph.nodes(
        "GroupQueryAttention",
        *(q, k, v, *past, *positions),
        outputs=(f"{name}.attention", *present),
        domain=MICROSOFT,
        num_heads=d.n_heads,
        kv_num_heads=d.n_kv_heads,
        scale=d.head_dim**-0.5,
        do_rotary=1,
        rotary_interleaved=0,
    )
    for value in present:
        graph.output(value, np.float32, buffer)
    h = _narrow(graph, d, h)
    return precision.linear(graph, h, f"{name}.attn_out", tensors.get(f"{name}.attn_out.weight"), None)


def dense_ffn(graph: Graph, d: DecoderConfig, tensors: TensorSource, precision: Precision, x: str, name: str) -> str:
    """SwiGLU; the fused matrix of the checkpoint is [up; gate], in this order."""
    fused = precision.linear(graph, x, f"{name}.ff_proj", tensors.get(f"{name}.ff_proj.weight"), None)
    parts = [f"{name}.up", f"{name}.gate"]
    up, gate = graph.nodes("Split", fused, graph.ints(d.ffn_dim, d.ffn_dim), outputs=parts, axis=-1)
    h = graph.node("Mul", up, _silu(graph, gate))
    return precision.linear(graph, h, f"{name}.ff_out", tensors.get(f"{name}.ff_out.weight"), None)


def experts_ffn(graph: Graph, d: DecoderConfig, tensors: TensorSource, precision: Precision, x: str, name: str) -> str:
    """OLMoE's experts, by the precision's own operator, or all of them as one wide SwiGLU that the router scales.

    The wide form is exact, and for a model as small as nano faster than picking experts: an expert not chosen is
    scaled by 0. The chosen probabilities are not renormalised (OLMoE: norm_topk_prob false).
    """

    def part(which: str, e: int) -> np.ndarray:
        return tensors.get(f"{name}.experts.{e}.{which}_proj.weight")

    def stacked(which: str) -> list[np.ndarray]:
        return [part(which, e) for e in range(d.n_experts)]

    if precision.experts is not None:
        probabilities = _probabilities(graph, tensors, x, name)
        picked = precision.experts(graph, d, x, probabilities, f"{name}.experts", part)
        if picked is not None:
            return picked

    wide = f"{name}.experts"  # matrices of all experts side by side
    gate = precision.linear(graph, x, f"{wide}.gate_proj", np.concatenate(stacked("gate")), None)
    up = precision.linear(graph, x, f"{wide}.up_proj", np.concatenate(stacked("up")), None)
    h = graph.node("Mul", _silu(graph, gate), up)  # [1, n, n_experts * ffn_dim]
    h = graph.node("Reshape", h, graph.ints(0, -1, d.n_experts, d.ffn_dim))
    chosen = graph.node("Unsqueeze", _route(graph, d, tensors, x, name), graph.ints(-1))  # [1, n, n_experts, 1]
    h = graph.node("Reshape", graph.node("Mul", h, chosen), graph.ints(0, -1, d.n_experts * d.ffn_dim))
    return precision.linear(graph, h, f"{wide}.down_proj", np.concatenate(stacked("down"), axis=1), None)


def _route(graph: Graph, d: DecoderConfig, tensors: TensorSource, x: str, name: str) -> str:
    """Softmax over all experts, with all but the top_k set to 0: [1, n, n_experts]. Always in fp32."""
    probabilities = _probabilities(graph, tensors, x, name)
    outputs = (f"{name}.top_probabilities", f"{name}.top_experts")
    values, experts = graph.nodes("TopK", probabilities, graph.ints(d.top_k), outputs=outputs, axis=-1)
    nothing = graph.node("Mul", probabilities, graph.constant(0.0))
    return graph.node("ScatterElements", nothing, experts, values, axis=-1)


def _probabilities(graph: Graph, tensors: TensorSource, x: str, name: str) -> str:
    """The router's softmax over all experts, always in fp32: [1, n, n_experts]."""
    logits = FP32.linear(graph, x, f"{name}.gate", tensors.get(f"{name}.gate.weight"), None)
    return graph.node("Softmax", logits, axis=-1)


def _silu(graph: Graph, x: str) -> str:
    return graph.node("Mul", x, graph.node("Sigmoid", x))
