"""Eight-bit weights in a graph: "int8", the fast format, and "q8", the accurate one.

"int8" has one scale per output channel of the weights and one per row of the input (a token, a patch), found at run
time. One scale for the whole input, the usual dynamic quantisation, loses precision in all rows as soon as one is an
outlier, and both the ViT and the decoder have such tokens (with one row 50 times larger: error 0.33 against 0.011, at
the same speed). Scales per row also make a result independent of the rest of the batch.

"q8" has one scale per 32 weights and per 32 inputs (MatMulNBits, like Q8_0 of GGUF). Its error is a half to a fifth of
int8's. It is as fast as int8 for a single token, but no faster than fp32 for a whole prompt or a crop. The head of an
int8 decoder is q8: it sees one position at a time, and int8 cost more accuracy there than it saved time.

ONNX Runtime 1.20 runs "fp32", and "int8" in standard ONNX operators; "q8" needs 1.22, the first whose MatMulNBits has 8
bits (tested with 1.20.1, 1.21.1, 1.22.1 and 1.32.0). A graph records what it needs, and a bundle is refused by an older
one.
"""

from __future__ import annotations

import numpy as np

from molmo_edge.export.graph_builder import FLOAT, MICROSOFT, Graph, add_bias

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

    There the products of two neighbouring inputs are added in 16 bits, which saturate silently. Inputs are at most 255,
    so two neighbours of one sign must not sum to more than 128. Scaling a channel by its largest pair instead of its
    largest weight ensures that; it costs a third of a bit, where 7-bit weights would cost a whole one.
    """
    pairs = np.pad(weight, ((0, 0), (0, weight.shape[1] % 2))).reshape(len(weight), -1, 2)
    positive, negative = (np.maximum(sign * pairs, 0).sum(axis=-1).max(axis=-1) for sign in (1, -1))
    return _round(weight, np.maximum(positive, negative))  # with half a step of rounding each: at most 127 + 1


def _round(rows: np.ndarray, largest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.maximum(largest, _TINY).astype(np.float32) / np.float32(LEVELS)
    return np.clip(np.rint(rows / scale[..., None]), -LEVELS, LEVELS).astype(np.int8), scale


def int8_linear(graph: Graph, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None = None) -> str:
    """Integer product with one scale per row of the input and one per output channel."""
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
    """uint8 [..., in] and the scale of each row [..., 1], shared by all matrices with the same input."""
    if ("int8", x) not in graph.memo:
        largest = graph.node("ReduceMax", graph.node("Abs", x), graph.ints(-1), keepdims=1)
        largest = graph.node("Max", largest, graph.constant(_TINY))
        scale = graph.node("Mul", largest, graph.constant(1.0 / LEVELS))
        # Cast truncates, so adding one half rounds. QuantizeLinear with one scale per row is 14 times slower.
        shifted = graph.node("Add", graph.node("Div", x, scale), graph.constant(ZERO_POINT + 0.5))
        graph.memo["int8", x] = graph.node("Cast", shifted, to=_UINT8)
        graph.memo["int8 scale", x] = scale
    return graph.memo["int8", x], graph.memo["int8 scale", x]


def q8_linear(graph: Graph, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None = None) -> str:
    """Integer product with one scale per block of inputs and of weights."""
    n_out, n_in = weight.shape
    blocks = np.pad(weight, ((0, 0), (0, -n_in % BLOCK))).reshape(n_out, -1, BLOCK)
    q, scale = quantize_rows(blocks)  # int8 [out, blocks, 32], float32 [out, blocks]
    graph.rounded(name, blocks, q * scale[..., None])
    graph.need(1, 22)  # earlier versions of MatMulNBits have four bits only
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
    """One scale per row; only the rows that are looked up are converted to float32."""
    q, scale = quantize_rows(table)
    graph.rounded(name, table, q * scale[:, None])
    rows = graph.node("Cast", graph.node("Gather", graph.weight(name, q), ids), to=FLOAT)
    return graph.node("Mul", rows, graph.node("Gather", graph.weight(f"{name}.scale", scale[:, None]), ids))
