"""Four-bit weights in a graph: matrices through MatMulNBits, OLMoE's experts through QMoE, in blocks.

"q4": the matrices of a decoder, rounded to nearest or with calibration (molmo_edge.quantize.gptq). Inputs are rounded
to int8 in blocks as well (accuracy_level 4), which is what makes it fast on a CPU. The router stays float32; the head
and the embedding keep eight bits, since both are used once a token and show every error.

"mixed": attention in int8 (molmo_edge.export.int8_graph). At MolmoE's full size 0.1 GB more, an eighth of the error of
those matrices, a prompt a seventh faster and a token a fourteenth slower.

"q4f16": as q4, with float16 inputs, for GPUs.

Experts, nearly all of MolmoE, share a scale among 128 weights. At its full size that is a quarter more tokens of a
prompt a second than 64, and 0.2 GB less; the error of the weights is 3 % larger (normal weights: 0.098 against 0.095,
where 32 have 0.084). A calibration gains several times what the larger blocks lose.

QMoE picks the experts by itself, and mixes them by its last input. Without that it renormalises over the chosen ones,
which OLMoE does not: a relative error of 0.48.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from molmo_edge.config import DecoderConfig
from molmo_edge.export.errors import ExportError
from molmo_edge.export.float16_graph import float16_linear, float16_table
from molmo_edge.export.graph_builder import MICROSOFT, ExpertPart, Graph, Precision, add_bias, fp32_linear
from molmo_edge.export.graph_operators import from_half, to_half
from molmo_edge.export.int8_graph import int8_linear, int8_table, is_head, q8_linear
from molmo_edge.quantize.rounding import Blocks, Round, nearest, pack_nibbles

BLOCKS = (32, 64, 128)  # weights that may share a scale
_BLOCK = 32
_EXPERT_BLOCK = 128  # of experts, where 128 divides their sides
_INT8_ACTIVATIONS = 4  # accuracy_level


@dataclass(frozen=True)
class Int4:
    """How four-bit weights are made."""

    block: int | None = None  # weights that share a scale; None: 32, and 128 of experts
    asymmetric: bool = False  # a zero point for each block
    round: Round = nearest

    def __post_init__(self) -> None:
        if self.block is not None and self.block not in BLOCKS:
            raise ExportError(f"a block has {', '.join(map(str, BLOCKS))} weights, not {self.block}")

    def linear(
        self, graph: Graph, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None, *, half: bool = False
    ) -> str:
        n_out, n_in = weight.shape
        block = self.block or _BLOCK
        padded = np.pad(weight, ((0, 0), (0, -n_in % block)))
        rounded = self.round(name, padded, block, self.asymmetric)
        graph.rounded(name, padded, rounded.restored())
        codes, scale, zero_point = _packed(rounded, np.float16 if half else np.float32)
        inputs = [graph.weight(f"{name}.weight", codes.reshape(n_out, -1, block // 2))]
        inputs.append(graph.weight(f"{name}.scale", scale))
        if zero_point is not None:
            inputs.append(graph.weight(f"{name}.zero_point", zero_point))
        y = graph.node(
            "MatMulNBits",
            *(to_half(graph, x) if half else x, *inputs),
            domain=MICROSOFT,
            K=n_in,
            N=n_out,
            bits=4,
            block_size=block,
            accuracy_level=None if half else _INT8_ACTIVATIONS,
        )
        return add_bias(graph, from_half(graph, y, half), name, bias)

    def experts(
        self,
        graph: Graph,
        d: DecoderConfig,
        x: str,
        probabilities: str,
        name: str,
        part: ExpertPart,
        *,
        half: bool = False,
    ) -> str | None:
        """QMoE over x [1, n, d_model] and the router's probabilities [1, n, n_experts]; None for sizes it cannot take.

        Scales are float16 on disk and in float32 beside float32 inputs in memory.
        """
        sizes = (self.block or _EXPERT_BLOCK, 64, 32, 16)
        block = next((b for b in sizes if not d.d_model % b and not d.ffn_dim % b), None)
        if block is None:
            return None
        n, f, w = d.n_experts, d.ffn_dim, d.d_model
        first, second = _Stack.empty(n, 2 * f, w, block), _Stack.empty(n, w, f, block)
        for e in range(n):  # an expert at a time: all of a layer in float32 would be 1.6 GB
            for which in ("gate", "up", "down"):
                weight = part(which, e)
                rounded = self.round(f"{name}.{e}.{which}_proj", weight, block, self.asymmetric)
                rounded = Blocks(rounded.codes, rounded.scale.astype(np.float16), rounded.zero_point)
                graph.rounded(f"{name}.{which}_proj", weight, rounded.restored())
                # Rows of gate and up take turns, the only layout of the CPU kernel.
                rows = slice(None) if which == "down" else slice(("gate", "up").index(which), None, 2)
                (second if which == "down" else first).put(e, rows, rounded)
        codes_1, scale_1, zero_1 = first.add(graph, f"{name}.gate_up", self.asymmetric)
        codes_2, scale_2, zero_2 = second.add(graph, f"{name}.down", self.asymmetric)
        graph.need(1, 31)  # the first whose QMoE has accuracy_level; router_weights came with 1.26
        mix = graph.node("Reshape", probabilities, graph.ints(-1, n))  # [n, n_experts]
        weights = (codes_1, scale_1, "", codes_2, scale_2, "", "", "", "", zero_1, zero_2, "")
        options: dict[str, Any] = {
            "k": d.top_k,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "expert_weight_bits": 4,
            "block_size": block,
        }
        if not half:
            options |= {"normalize_routing_weights": 0, "accuracy_level": _INT8_ACTIVATIONS}
            return graph.node("QMoE", x, mix, *weights, mix, domain=MICROSOFT, **options)
        # CUDA's kernel does not look at the last input. It mixes by the softmax of the chosen logits, so its output
        # lacks one factor: how much the chosen ones had of all probability. Raw weights are what CPUs take, too.
        options |= {"normalize_routing_weights": 1, "weights_prepacked": 0}
        logits = graph.node("Log", graph.node("Max", mix, graph.constant(1e-30)))
        y = graph.node("QMoE", to_half(graph, x), to_half(graph, logits), *weights, domain=MICROSOFT, **options)
        outputs = (f"{name}.top_probabilities", f"{name}.top_experts")
        top, _ = graph.nodes("TopK", probabilities, graph.ints(d.top_k), outputs=outputs, axis=-1)
        share = graph.node("ReduceSum", top, graph.ints(-1), keepdims=1)  # [1, n, 1]
        return graph.node("Mul", from_half(graph, y), share)


@dataclass(frozen=True)
class _Stack:
    """One matrix of all experts."""

    codes: np.ndarray  # uint8 [n_experts, out, in / 2]
    scale: np.ndarray  # float16 [n_experts, out, in / block]
    zero_point: np.ndarray  # uint8 [n_experts, out, in / block / 2]

    @classmethod
    def empty(cls, n: int, n_out: int, n_in: int, block: int) -> _Stack:
        blocks = n_in // block
        return cls(
            np.empty((n, n_out, n_in // 2), np.uint8),
            np.empty((n, n_out, blocks), np.float16),
            np.empty((n, n_out, -(-blocks // 2)), np.uint8),
        )

    def put(self, e: int, rows: slice, rounded: Blocks) -> None:
        self.codes[e, rows], self.scale[e, rows], zero_point = _packed(rounded, np.float16)
        if zero_point is not None:
            self.zero_point[e, rows] = zero_point

    def add(self, graph: Graph, name: str, asymmetric: bool) -> tuple[str, str, str]:
        zero_point = graph.weight(f"{name}.zero_point", self.zero_point) if asymmetric else ""
        return graph.weight(f"{name}.weight", self.codes), graph.weight(f"{name}.scale", self.scale), zero_point


def _packed(rounded: Blocks, number: type) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    zero_point = None if rounded.zero_point is None else pack_nibbles(rounded.zero_point)
    return pack_nibbles(rounded.codes), rounded.scale.astype(number), zero_point


def int4_precision(word: str, how: Int4 | None = None, keep: Collection[str] = ()) -> Precision:
    """ "q4", "mixed" or "q4f16", as the head of this file says. `keep`: of q4f16, what float16 has no room for."""
    how = how or Int4()

    def linear(graph: Graph, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None) -> str:
        if name in keep:
            return fp32_linear(graph, x, name, weight, bias)
        if is_head(name):
            return (float16_linear if half else q8_linear)(graph, x, name, weight, bias)
        if word == "mixed" and name.endswith((".att_proj", ".attn_out")):
            return int8_linear(graph, x, name, weight, bias)
        return how.linear(graph, x, name, weight, bias, half=half)

    def experts(graph: Graph, d: DecoderConfig, x: str, probabilities: str, name: str, part: ExpertPart) -> str | None:
        return how.experts(graph, d, x, probabilities, name, part, half=half)

    half = word == "q4f16"
    return Precision(
        word, f"_{word}", 0.6, linear, float16_table if half else int8_table, experts, half=half, keep=frozenset(keep)
    )
