"""The operators of the towers and the decoder, each in two forms: fused for ONNX Runtime, or only standard ONNX.

The fused operators ("com.microsoft", and SimplifiedLayerNormalization, which is not standard either) are fast on ONNX
Runtime. The plain form (`Graph.plain`) runs on every reader of ONNX: TensorRT, CoreML, onnx's reference evaluator.
Inputs, outputs and caches of a graph are the same in both forms, except for the padding of narrow heads.

In a decoder with `bidirectional_images`, GroupQueryAttention is not causal, and its attention_bias has the whole mask.

With `half` the products of attention, and so the caches, are float16; softmax, norms and sums stay float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from molmo_edge.config import DecoderConfig
from molmo_edge.export.graph_builder import FLOAT, FLOAT16, INT64, MICROSOFT, Graph
from molmo_edge.modeling.rotary import rotary_frequencies

_HEAD_UNIT = 16  # GroupQueryAttention needs heads of a multiple of this width


def rms_norm(graph: Graph, x: str, name: str, weight: np.ndarray, eps: float) -> str:
    """Normalise x [..., d] by its root mean square and multiply it by `weight` [d]; same shape."""
    scale = graph.weight(f"{name}.weight", weight)
    if not graph.plain:
        return graph.node("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=eps, stash_type=1)
    mean = graph.node("ReduceMean", graph.node("Mul", x, x), graph.ints(-1), keepdims=1)
    root = graph.node("Sqrt", graph.node("Add", mean, graph.constant(eps)))
    return graph.node("Mul", graph.node("Div", x, root), scale)


def silu(graph: Graph, x: str) -> str:
    """x * sigmoid(x), elementwise."""
    return graph.node("Mul", x, graph.node("Sigmoid", x))


def quick_gelu(graph: Graph, x: str) -> str:
    """x * sigmoid(1.702 x), elementwise: CLIP's approximation of GELU."""
    if not graph.plain:
        return graph.node("QuickGelu", x, domain=MICROSOFT, alpha=1.702)
    return graph.node("Mul", x, graph.node("Sigmoid", graph.node("Mul", x, graph.constant(1.702))))


def gelu(graph: Graph, x: str, activation: str) -> str:
    """`activation`: of VisionConfig."""
    if activation == "quick_gelu":
        return quick_gelu(graph, x)
    return graph.node("Gelu", x, approximate="tanh" if activation == "gelu_pytorch_tanh" else None)


def attention(graph: Graph, q: str, k: str, v: str, n_heads: int, head_dim: int, *, half: bool) -> str:
    """Attention without a mask: q, k, v [batch, n, n_heads * head_dim] -> the same shape."""
    q, k, v = (to_half(graph, part) if half else part for part in (q, k, v))
    if not graph.plain:
        return from_half(graph, graph.node("MultiHeadAttention", q, k, v, domain=MICROSOFT, num_heads=n_heads), half)
    heads = graph.ints(0, 0, n_heads, head_dim)
    q, k, v = (graph.node("Reshape", part, heads) for part in (q, k, v))
    q, v = (graph.node("Transpose", part, perm=[0, 2, 1, 3]) for part in (q, v))  # [batch, n_heads, n, head_dim]
    # Scaled before the product, so that the product is small enough for float16.
    q = graph.node("Mul", q, graph.constant(head_dim**-0.5, np.float16 if half else np.float32))
    scores = from_half(graph, graph.node("MatMul", q, graph.node("Transpose", k, perm=[0, 2, 3, 1])), half)
    h = graph.node("MatMul", _softmax(graph, scores, half), v)
    h = graph.node("Reshape", graph.node("Transpose", h, perm=[0, 2, 1, 3]), graph.ints(0, 0, n_heads * head_dim))
    return from_half(graph, h, half)


def to_half(graph: Graph, x: str) -> str:
    """x as float16; one Cast for all consumers."""
    if ("float16", x) not in graph.memo:
        graph.memo["float16", x] = graph.node("Cast", x, to=FLOAT16)
    return graph.memo["float16", x]


def from_half(graph: Graph, x: str, half: bool = True) -> str:
    """x cast from float16 to float32; unchanged unless `half`."""
    return graph.node("Cast", x, to=FLOAT) if half else x


def _softmax(graph: Graph, scores: str, half: bool) -> str:
    weights = graph.node("Softmax", scores, axis=-1)
    return graph.node("Cast", weights, to=FLOAT16) if half else weights


@dataclass(frozen=True)
class Positions:
    """The positions of a run's n tokens: values that the attention of every layer shares."""

    total: str  # int32 [1]: positions in the cache after these n
    tables: tuple[tuple[str, str], ...]  # cos and sin [max_position_embeddings, head_dim / 2]: plain, stretched (YaRN)
    fused: str = ""  # total - 1, as GroupQueryAttention counts
    rows: str = ""  # plain: their positions, int64 [n]
    mask: str = ""  # 0 for the keys that a position attends to, -inf for the others [n, total]; "": causal
    spare: bool = False  # n and total count a spare row, see `positions`


def positions(
    graph: Graph, d: DecoderConfig, embeddings: str, total: str, image: str = "", *, spare: bool = False
) -> Positions:
    """`image`: bool [n], for a decoder with `bidirectional_images`. Rotary tables are float32, as in the reference.

    `spare`: attention gets one row more, which is cut off again. GroupQueryAttention computes a single row in another
    order than several, so that it would round differently.
    """
    tables = [_rotary_tables(graph, d, "rope", stretched=False, spare=spare)]
    if d.yarn is not None:
        tables.append(_rotary_tables(graph, d, "rope.stretched", stretched=True, spare=spare))
    if spare:
        total = graph.node("Add", total, graph.constant([1], np.int32))
    fused = "" if graph.plain else graph.node("Sub", total, graph.constant([1], np.int32))
    if fused and not image:
        return Positions(total, tuple(tables), fused, spare=spare)
    end = graph.node("Squeeze", graph.node("Cast", total, to=INT64), graph.ints(0))
    n = graph.node("Squeeze", graph.node("Shape", embeddings, start=1, end=2), graph.ints(0))
    one, zero = graph.constant(1, np.int64), graph.constant(0, np.int64)
    if spare:
        n = graph.node("Add", n, one)
        image = graph.node("Concat", image, graph.constant([False], np.bool_), axis=0)
    rows = graph.node("Range", graph.node("Sub", end, n), end, one)
    keys = graph.node("Range", zero, end, one)
    visible = graph.node("LessOrEqual", keys, graph.node("Unsqueeze", rows, graph.ints(1)))  # [n, total]
    if image:  # image tokens of this run also see later ones; what is in the cache already is visible anyway
        start = graph.node("Unsqueeze", graph.node("Sub", end, n), graph.ints(0))
        cached = graph.node("Expand", graph.constant(False, np.bool_), start)
        images = graph.node("Concat", cached, image, axis=0)  # [total]
        pairs = graph.node("And", graph.node("Unsqueeze", image, graph.ints(1)), images)
        visible = graph.node("Or", visible, pairs)
    mask = graph.node("Where", visible, graph.constant(0.0), graph.constant(float("-inf")))
    return Positions(total, tuple(tables), fused, rows, mask, spare)


def _rotary_tables(graph: Graph, d: DecoderConfig, name: str, *, stretched: bool, spare: bool) -> tuple[str, str]:
    frequencies = rotary_frequencies(d, stretched=stretched)
    angles = np.arange(d.max_position_embeddings + spare, dtype=np.float32)[:, None] * frequencies
    scale = np.float32(d.yarn.attention_factor if stretched and d.yarn else 1.0)
    if not graph.plain:
        angles = np.pad(angles, ((0, 0), (0, (kernel_head_dim(d) - d.head_dim) // 2)))
    cos, sin = (graph.weight(f"{name}.{part}", scale * of(angles)) for part, of in (("cos", np.cos), ("sin", np.sin)))
    return cos, sin


def kernel_head_dim(d: DecoderConfig) -> int:
    """Width of a head in GroupQueryAttention and in its cache."""
    return -(-d.head_dim // _HEAD_UNIT) * _HEAD_UNIT


def cached_attention(
    graph: Graph, d: DecoderConfig, qkv: tuple[str, str, str], name: str, layer: int, where: Positions, *, half: bool
) -> str:
    """Rotate q and k, append k and v to the layer's cache, attend: -> [1, n, q_dim].

    The cache is `past_key.<layer>` and `past_value.<layer>` [1, n_kv_heads, capacity, head_dim] (head_dim rounded up
    to a multiple of 16 if the operator is fused). The outputs are `present_*`, to be bound to the same memory.
    """
    number, width = (np.float16, FLOAT16) if half else (np.float32, FLOAT)
    fused = not graph.plain
    table = where.tables[d.yarn is not None and layer in d.yarn.layers]
    buffer: list[int | str] = [1, d.n_kv_heads, "capacity", kernel_head_dim(d) if fused else d.head_dim]
    past = [graph.input(f"past_{part}.{layer}", number, buffer) for part in ("key", "value")]
    present = [f"present_{part}.{layer}" for part in ("key", "value")]
    if not fused:
        h = _plain_cached(graph, d, qkv, past, present, where, table, width)
    else:
        q, k, v = (_widen(graph, d, part) for part in qkv)
        q, k, v = (to_half(graph, part) if half else part for part in (q, k, v))
        tables = [to_half(graph, part) if half else part for part in table]
        masked: tuple[str, ...] = ()
        if where.mask:  # after an input that is left out: position_ids
            graph.need(1, 32)
            masked = ("", _attention_bias(graph, where, half))
        h, *present = graph.nodes(
            "GroupQueryAttention",
            *(q, k, v, *past, where.fused, where.total, *tables, *masked),
            outputs=(f"{name}.attention", *present),
            domain=MICROSOFT,
            num_heads=d.n_heads,
            kv_num_heads=d.n_kv_heads,
            scale=d.head_dim**-0.5,
            causal=0 if where.mask else None,
            do_rotary=1,
            rotary_interleaved=0,
        )
        h = _narrow(graph, d, from_half(graph, h, half))
    for value in present:
        graph.output(value, number, buffer)
    return h


def _attention_bias(graph: Graph, where: Positions, half: bool) -> str:
    """[1, 1, n, total], one for all layers."""
    if ("bias", where.mask) not in graph.memo:
        graph.memo["bias", where.mask] = graph.node("Unsqueeze", where.mask, graph.ints(0, 1))
    bias = graph.memo["bias", where.mask]
    return to_half(graph, bias) if half else bias


def _plain_cached(
    graph: Graph,
    d: DecoderConfig,
    qkv: tuple[str, str, str],
    past: list[str],
    present: list[str],
    where: Positions,
    table: tuple[str, str],
    width: int,
) -> str:
    half, group = width == FLOAT16, d.n_heads // d.n_kv_heads
    q, k, v = (
        graph.node("Reshape", part, graph.ints(0, 0, heads, d.head_dim))
        for part, heads in zip(qkv, (d.n_heads, d.n_kv_heads, d.n_kv_heads), strict=True)
    )
    q = graph.node("Mul", _rotate(graph, q, where, table), graph.constant(d.head_dim**-0.5))
    # [1, n, n_kv_heads, group, head_dim] -> [1, n_kv_heads, group, n, head_dim]
    q = graph.node("Reshape", q, graph.ints(0, 0, d.n_kv_heads, group, d.head_dim))
    q = graph.node("Transpose", q, perm=[0, 2, 3, 1, 4])
    seen = []
    for part, old, new in ((_rotate(graph, k, where, table), past[0], present[0]), (v, past[1], present[1])):
        part = graph.node("Transpose", part, perm=[0, 2, 1, 3])  # [1, n_kv_heads, n, head_dim]
        part = graph.node("Cast", part, to=width) if half else part
        whole = graph.node("ScatterND", old, _slots(graph, d, where), part, name=new)
        end = graph.node("Cast", where.total, to=INT64)
        valid = graph.node("Slice", whole, graph.ints(0), end, graph.ints(2))  # later positions are not written yet
        seen.append(graph.node("Unsqueeze", valid, graph.ints(2)))  # [1, n_kv_heads, 1, total, head_dim]
    keys = graph.node("Transpose", seen[0], perm=[0, 1, 2, 4, 3])
    q = graph.node("Cast", q, to=width) if half else q
    scores = graph.node("Add", from_half(graph, graph.node("MatMul", q, keys), half), where.mask)
    h = graph.node("MatMul", _softmax(graph, scores, half), seen[1])
    h = graph.node("Transpose", from_half(graph, h, half), perm=[0, 3, 1, 2, 4])
    return graph.node("Reshape", h, graph.ints(0, 0, d.q_dim))


def _slots(graph: Graph, d: DecoderConfig, where: Positions) -> str:
    """The indices of k and v in a cache: [1, n_kv_heads, n, 3] of (0, head, position)."""
    if ("slots", where.rows) not in graph.memo:
        heads = graph.weight("kv_heads", np.arange(d.n_kv_heads, dtype=np.int64)[None, :, None, None])
        rows = graph.node("Unsqueeze", where.rows, graph.ints(0, 1, 3))  # [1, 1, n, 1]
        zero = graph.constant(0, np.int64)
        heads = graph.node("Add", heads, graph.node("Mul", rows, zero))  # [1, n_kv_heads, n, 1]
        rows = graph.node("Add", rows, graph.node("Mul", heads, zero))
        slots = graph.node("Concat", graph.node("Mul", rows, zero), heads, rows, axis=-1)
        graph.memo["slots", where.rows] = slots
    return graph.memo["slots", where.rows]


def _rotate(graph: Graph, x: str, where: Positions, table: tuple[str, str]) -> str:
    """x [1, n, heads, head_dim] rotated by its positions, in the rotate-half layout."""
    for part in table:
        if ("rows of", part) not in graph.memo:
            picked = graph.node("Gather", part, where.rows)  # [n, head_dim / 2]
            graph.memo["rows of", part] = graph.node("Unsqueeze", picked, graph.ints(1))
    cos, sin = (graph.memo["rows of", part] for part in table)
    a, b = graph.nodes("Split", x, outputs=(f"{x}.first", f"{x}.second"), axis=-1, num_outputs=2)
    first = graph.node("Sub", graph.node("Mul", a, cos), graph.node("Mul", b, sin))
    second = graph.node("Add", graph.node("Mul", b, cos), graph.node("Mul", a, sin))
    return graph.node("Concat", first, second, axis=-1)


def _widen(graph: Graph, d: DecoderConfig, x: str) -> str:
    """Pad the heads of x [1, n, heads * head_dim] with zeros, each half by itself, because rotation pairs halves."""
    pad = (kernel_head_dim(d) - d.head_dim) // 2
    if not pad:
        return x
    halves = graph.node("Reshape", x, graph.ints(1, -1, 2, d.head_dim // 2))  # [1, n * heads, 2, head_dim / 2]
    halves = graph.node("Pad", halves, graph.ints(0, 0, 0, 0, 0, 0, 0, pad))
    # The shape of x except for the last axis.
    length = graph.node("Shape", x, start=0, end=2)
    return graph.node("Reshape", halves, graph.node("Concat", length, graph.ints(-1), axis=0))


def _narrow(graph: Graph, d: DecoderConfig, x: str) -> str:
    """The inverse of `_widen` for [1, n, n_heads * kernel_head_dim]."""
    half = d.head_dim // 2
    if kernel_head_dim(d) == d.head_dim:
        return x
    halves = graph.node("Reshape", x, graph.ints(0, -1, 2 * d.n_heads, kernel_head_dim(d) // 2))
    halves = graph.node("Slice", halves, graph.ints(0), graph.ints(half), graph.ints(3))
    return graph.node("Reshape", halves, graph.ints(0, -1, d.q_dim))
