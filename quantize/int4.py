"""Four-bit weights: "q4" for matrices (MatMulNBits) and for experts (QMoE), symmetric, in blocks along the input.

Round to nearest with a signed scale: the value of a block that is largest in size becomes exactly -8, so that all
sixteen levels are used. Against max|w| / 7 that is a seventh finer; llama.cpp's Q4_0 has the same rule.

Inputs are rounded to int8 in blocks as well (accuracy_level 4), which is what makes it fast on a CPU. The embedding
keeps eight bits, a scale a row, and so does the head: both are used once a token and show every error.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from molmo_edge.config import DecoderConfig
from molmo_edge.export.graph import MICROSOFT, Graph, Precision, add_bias
from molmo_edge.quantize.int8 import int8_table, q8_linear

BLOCK = 64  # weights that share a scale: with float32 scales half a bit each
_INT8_ACTIVATIONS = 4  # accuracy_level
_TINY = 1e-30


def quantize_int4(weight: np.ndarray, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """[..., in] float -> codes uint8 [..., in] of 0..15 and float32 scales [..., in / block]; w ~= (code - 8) * scale.

    `in` must be a multiple of `block`. |error| <= |scale| / 2, but for values that lie opposite to the largest one,
    at most |scale|.
    """
    blocks = weight.reshape(*weight.shape[:-1], -1, block)
    at = np.abs(blocks).argmax(axis=-1, keepdims=True)
    largest = np.take_along_axis(blocks, at, axis=-1)  # [..., in / block, 1], with its sign
    scale = (largest / np.float32(-8)).astype(np.float32)
    scale = np.where(np.abs(scale) < _TINY, np.float32(_TINY), scale)
    codes = np.clip(np.rint(blocks / scale) + 8, 0, 15).astype(np.uint8)
    return codes.reshape(weight.shape), scale[..., 0]


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 [..., n] of 0..15 -> uint8 [..., n / 2], the first of a pair in the low half."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def q4_linear(graph: Graph, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None) -> str:
    n_out, n_in = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -n_in % BLOCK)))
    codes, scale = quantize_int4(padded)
    matrix = graph.weight(f"{name}.weight", pack_nibbles(codes).reshape(n_out, -1, BLOCK // 2))
    y = graph.node(
        "MatMulNBits",
        *(x, matrix, graph.weight(f"{name}.scale", scale)),
        domain=MICROSOFT,
        K=n_in,
        N=n_out,
        bits=4,
        block_size=BLOCK,
        accuracy_level=_INT8_ACTIVATIONS,
    )
    return add_bias(graph, y, name, bias)
