"""Eight-bit weights in two ways: "int8", the fast one, and "q8", the exact one.

"int8": a scale for each output channel, and one for each row of the input (a token, a patch) when it arrives.
One scale for the whole input, which is what dynamic quantisation usually means, costs all rows dearly as soon as
one is an outlier, and both the ViT and the decoder have such tokens (one row 50 times larger: error 0.33 against
0.011, at the same speed). It also makes a result independent of what else is in the batch or in the chunk.

"q8": a scale for each 32 weights and each 32 inputs (MatMulNBits, like Q8_0 of GGUF). A half to a fifth of the
error, as fast as "int8" for a single token, but no faster than fp32 for a whole prompt or a crop.

ONNX Runtime 1.20 runs "fp32" and "int8" in ONNX's own operators; "q8", and the head of an "int8" decoder, which is in
"q8" too, need 1.22, since MatMulNBits knew four bits only (tried with 1.20.1,
1.21.1, 1.22.1 and 1.32.0). A graph says what it needs, and a bundle refuses what is older.
"""

from __future__ import annotations

import numpy as np

from molmo_edge.export.graph_builder import FLOAT, MICROSOFT, Graph, Precision, add_bias

LEVELS = 127  # symmetric: -127..127
ZERO_POINT = 128  # of unsigned inputs (int8), which is what the x86 instructions take, and of unsigned weights (q8)
BLOCK = 32  # weights that share a scale (q8)
_INT8_ACTIVATIONS = 4  # accuracy_level of MatMulNBits
_UINT8 = 2  # onnx.TensorProto
_TINY = 1e-30  # keeps the scale of zeros from being 0


def quantize_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[..., d] float -> int8 [..., d] and float32 scales [...]; rows ~= q * scale, |error| <= scale / 2."""
    return _round(rows, np.abs(rows).max(axis=-1))


def quantize_channels(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[out, in] float -> int8 [out, in] and float32 scales [out], safe on x86 without VNNI.

    There the products of two neighbouring inputs are added in 16 bits, which saturate without a word. Inputs go
    up to 255, so two neighbours of one sign must not sum to more than 128. Scaling a channel by its largest pair
    instead of its largest weight sees to that; it costs a third of a bit, where 7-bit weights cost a whole one.
    """
    pairs = np.pad(weight, ((0, 0), (0, weight.shape[1] % 2))).reshape(len(weight), -1, 2)
    positive, negative = (np.maximum(sign * pairs, 0).sum(axis=-1).max(axis=-1) for sign in (1, -1))
    return _round(weight, np.maximum(positive, negative))  # half a step of rounding each: at most 127 + 1


def _round(rows: np.ndarray, largest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.maximum(largest, _TINY).astype(np.float32) / np.float32(LEVELS)
    return np.clip(np.rint(rows / scale[..., None]), -LEVELS, LEVELS).astype(np.int8), scale


def int8_linear(graph: Graph, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None = None) -> str:
    """Integer product with a scale for each row of the input and for each output channel."""
    inputs, row_scale = _quantize_input(graph, x)
    q, scale = quantize_channels(weight)
    graph.rounded(name, weight, q * scale[:, None])
    matrix, scales = graph.weight(f"{name}.weight", q.T), graph.weight(f"{name}.scale", scale)
    zero_point = graph.constant(ZERO_POINT, np.uint8)
    if graph.plain:
        product = graph.node("MatMulInteger", inputs, matrix, zero_point)
        y = graph.node("Mul", graph.node("Cast", product, to=FLOAT), scales)
    else:
        one = graph.constant(1.0)
        y = graph.node("MatMulIntegerToFloat", inputs, matrix, one, scales, zero_point, domain=MICROSOFT)
    return add_bias(graph, graph.node("Mul", y, row_scale), name, bias)


def _quantize_input(graph: Graph, x: str) -> tuple[str, str]:
    """uint8 [..., in] and the scale of each row [..., 1]; once for all matrices that take the same input."""
    if ("int8", x) not in graph.memo:
        largest = graph.node("ReduceMax", graph.node("Abs", x), graph.ints(-1), keepdims=1)
        largest = graph.node("Max", largest, graph.constant(_TINY))
        scale = graph.node("Mul", largest, graph.constant(1.0 / LEVELS))
        # Cast cuts the fraction off, so one more half rounds. QuantizeLinear with a scale a row is 14 times slower.
        shifted = graph.node("Add", graph.node("Div", x, scale), graph.constant(ZERO_POINT + 0.5))
        graph.memo["int8", x] = graph.node("Cast", shifted, to=_UINT8)
        graph.memo["int8 scale", x] = scale
    return graph.memo["int8", x], graph.memo["int8 scale", x]


def q8_linear(graph: Graph, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None = None) -> str:
    """Integer product with a scale for each block of inputs and of weights."""
    n_out, n_in = weight.shape
    blocks = np.pad(weight, ((0, 0), (0, -n_in % BLOCK))).reshape(n_out, -1, BLOCK)
    q, scale = quantize_rows(blocks)  # int8 [out, blocks, 32], float32 [out, blocks]
    graph.rounded(name, blocks, q * scale[..., None])
    graph.need(1, 22)  # before, MatMulNBits had four bits only
    matrix = graph.weight(f"{name}.weight", (q.astype(np.int16) + ZERO_POINT).astype(np.uint8))
    y = graph.node(
        "MatMulNBits",
        *(x, matrix, graph.weight(f"{name}.scale", scale)),
        domain=MICROSOFT,
        K=n_in,
        N=n_out,
        bits=8,
        block_size=BLOCK,
        accuracy_level=_INT8_ACTIVATIONS,
    )
    return add_bias(graph, y, name, bias)


def int8_table(graph: Graph, ids: str, name: str, table: np.ndarray) -> str:
    """A scale a row; only the rows that are looked up are widened."""
    q, scale = quantize_rows(table)
    graph.rounded(name, table, q * scale[:, None])
    rows = graph.node("Cast", graph.node("Gather", graph.weight(name, q), ids), to=FLOAT)
    return graph.node("Mul", rows, graph.node("Gather", graph.weight(f"{name}.scale", scale[:, None]), ids))


def is_head(name: str) -> bool:
    """Whether a matrix, by its hub name without ".weight", makes the decoder's logits."""
    return name.endswith(("lm_head", "transformer.ff_out", "wte.embedding"))


def _int8_but_the_head(graph: Graph, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None = None) -> str:
    """The head sees one position at a time, where blocks cost no time; rounded to "int8" it lost more than it saved."""
    return (q8_linear if is_head(name) and not graph.plain else int8_linear)(graph, x, name, weight, bias)


INT8 = Precision("int8", "_int8", 1, _int8_but_the_head, int8_table)
Q8 = Precision("q8", "_q8", 1, q8_linear, int8_table)
