"""Four-bit weights, "q4": matrices through MatMulNBits, OLMoE's experts through QMoE; symmetric, in blocks.

Round to nearest with a signed scale: the value of a block that is largest in size becomes exactly -8, so that all
sixteen levels are used. Against max|w| / 7 that is a seventh finer; llama.cpp's Q4_0 has the same rule.

Inputs are rounded to int8 in blocks as well (accuracy_level 4), which is what makes it fast on a CPU. The router stays
float32; the head and the embedding keep eight bits, since both are used once a token and show every error.

Experts, nearly all of MolmoE, have a float16 scale for 64 weights. For 32, a full-size bundle was 0.2 GB larger, took
1.2 GB more memory (ONNX Runtime widens scales and adds a sum for each block) and a quarter more time for a prompt, and
the error of its weights was 0.9 of this one's.

"mixed" keeps attention in int8 (molmo_edge.quantize.int8): at MolmoE's full size 0.1 GB more, an eighth of the error of
those matrices, a prompt a seventh faster and a token a fourteenth slower.

QMoE picks the experts by itself, and mixes them by its last input. Without that it renormalises over the chosen ones,
which OLMoE does not: a relative error of 0.48.
"""

from __future__ import annotations

import numpy as np

from molmo_edge.config import DecoderConfig
from molmo_edge.export.graph import MICROSOFT, ExpertPart, Graph, Precision, add_bias
from molmo_edge.quantize.int8 import int8_linear, int8_table, q8_linear

BLOCK = 32  # weights that share a scale
_EXPERT_BLOCKS = (64, 32, 16)  # the same for experts: the first that divides their sides
_INT8_ACTIVATIONS = 4  # accuracy_level
ZERO_POINT = 8


def quantize_int4(weight: np.ndarray, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """[..., in] float -> codes uint8 [..., in] of 0..15 and float32 scales [..., in / block]; w ~= (code - 8) * scale.

    `in` must be a multiple of `block`. |error| <= |scale| / 2, but for values near the opposite of the largest one,
    which have no level of their own: at most |scale|.
    """
    blocks = weight.reshape(*weight.shape[:-1], -1, block)
    at = np.abs(blocks).argmax(axis=-1, keepdims=True)
    largest = np.take_along_axis(blocks, at, axis=-1)  # [..., in / block, 1], with its sign
    scale = largest / np.float32(-ZERO_POINT)
    steps = blocks / np.where(scale == 0, np.float32(1), scale)  # of zeros alone: no step
    codes = np.clip(np.rint(steps) + ZERO_POINT, 0, 15).astype(np.uint8)
    return codes.reshape(weight.shape), scale[..., 0]


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 [..., n] of 0..15 -> uint8 [..., n / 2], the first of a pair in the low half."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack_nibbles`."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def q4_linear(graph: Graph, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None) -> str:
    """MatMulNBits; a head keeps eight bits."""
    if name.endswith(("lm_head", "transformer.ff_out", "wte.embedding")):
        return q8_linear(graph, x, name, weight, bias)
    n_out, n_in = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -n_in % BLOCK)))
    codes, scale = quantize_int4(padded)
    graph.rounded(name, padded, _restored(codes, scale))
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


def q4_experts(graph: Graph, d: DecoderConfig, x: str, probabilities: str, name: str, part: ExpertPart) -> str | None:
    """QMoE over x [1, n, d_model] and the router's probabilities [1, n, n_experts]; None for sizes it cannot take."""
    block = next((b for b in _EXPERT_BLOCKS if not d.d_model % b and not d.ffn_dim % b), None)
    if block is None:
        return None
    n, f, w = d.n_experts, d.ffn_dim, d.d_model
    first, first_scale = np.empty((n, 2 * f, w // 2), np.uint8), np.empty((n, 2 * f, w // block), np.float16)
    second, second_scale = np.empty((n, w, f // 2), np.uint8), np.empty((n, w, f // block), np.float16)
    for e in range(n):  # an expert at a time: all of a layer in float32 would be 1.6 GB
        for which in ("gate", "up", "down"):
            weight = part(which, e)
            codes, scale = quantize_int4(weight, block)
            scale = scale.astype(np.float16)
            graph.rounded(f"{name}.{which}_proj", weight, _restored(codes, scale))
            if which == "down":
                second[e], second_scale[e] = pack_nibbles(codes), scale
            else:  # rows of the two take turns, the only layout of the CPU kernel
                rows = slice(("gate", "up").index(which), None, 2)
                first[e, rows], first_scale[e, rows] = pack_nibbles(codes), scale
    weights = [graph.weight(f"{name}.gate_up.weight", first), graph.weight(f"{name}.gate_up.scale", first_scale), ""]
    weights += [graph.weight(f"{name}.down.weight", second), graph.weight(f"{name}.down.scale", second_scale), ""]
    graph.need(1, 31)  # the first whose QMoE has accuracy_level; router_weights came with 1.26
    mix = graph.node("Reshape", probabilities, graph.ints(-1, n))  # [n, n_experts]
    return graph.node(
        "QMoE",
        *(x, mix, *weights, "", "", "", "", "", "", mix),
        domain=MICROSOFT,
        k=d.top_k,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=0,
        expert_weight_bits=4,
        block_size=block,
        accuracy_level=_INT8_ACTIVATIONS,
    )


def _restored(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """What codes [..., in] with scales [..., in / block] stand for, float32 [..., in / block, block]."""
    return (codes.reshape(*scale.shape, -1).astype(np.float32) - ZERO_POINT) * scale[..., None].astype(np.float32)


def mixed_linear(graph: Graph, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None) -> str:
    if name.endswith((".att_proj", ".attn_out")):
        return int8_linear(graph, x, name, weight, bias)
    return q4_linear(graph, x, name, weight, bias)


Q4 = Precision("q4", "_q4", 0.6, q4_linear, int8_table, q4_experts)
MIXED = Precision("mixed", "_mixed", 0.6, mixed_linear, int8_table, q4_experts)
