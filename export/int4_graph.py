"""Four-bit weights in a graph: matrices through MatMulNBits, OLMoE's experts through QMoE, both in blocks.

Weights are rounded to nearest, or with a calibration (molmo_edge.quantize.gptq). Inputs are rounded to int8 in blocks
(accuracy_level 4), which makes it fast on a CPU, or are float16 for GPUs (`half`).

The precision "mixed" has int8 attention. At MolmoE's full size it adds 0.1 GB and has an eighth of the error of those
matrices; a prompt takes a seventh less time and a token a fourteenth more.

Experts, nearly all weights of MolmoE, share one scale among 128 weights. At full size a prompt is a quarter faster than
with blocks of 64 and the file 0.2 GB smaller; the error of the weights is 3 % larger (normally distributed weights:
0.098 against 0.095, with blocks of 32 0.084). A calibration gains several times what the larger blocks lose.

QMoE picks the experts itself and weights them by its last input. Without that input it renormalises over the chosen
experts, which OLMoE does not: a relative error of 0.48.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from molmo_edge.config import DecoderConfig
from molmo_edge.export.errors import ExportError
from molmo_edge.export.graph_builder import MICROSOFT, ExpertPart, Graph, add_bias
from molmo_edge.export.graph_operators import from_half, to_half
from molmo_edge.quantize.rounding import Blocks, Round, nearest, pack_nibbles

BLOCKS = (32, 64, 128)  # supported numbers of weights that share a scale
BLOCK = 32
_EXPERT_BLOCK = 128  # for experts whose dimensions are multiples of it
_INT8_ACTIVATIONS = 4  # accuracy_level


def expert_block(d: DecoderConfig, block: int | None = None) -> int | None:
    """How many weights of an expert share a scale in QMoE; None if its sizes are not supported. block: the largest."""
    sizes = (block or _EXPERT_BLOCK, 64, 32, 16)
    return next((b for b in sizes if not d.d_model % b and not d.ffn_dim % b), None)


@dataclass(frozen=True)
class Int4:
    """How weights are rounded to four bits."""

    block: int | None = None  # weights that share a scale; None: 32, and 128 in experts
    asymmetric: bool = False  # a zero point for each block
    round: Round = nearest

    def __post_init__(self) -> None:
        if self.block is not None and self.block not in BLOCKS:
            raise ExportError(
                f"a block of {self.block} weights is not supported (supported: {', '.join(map(str, BLOCKS))})"
            )

    def linear(
        self, graph: Graph, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None, *, half: bool = False
    ) -> str:
        """Multiply x [..., in] by a weight [out, in] rounded to four bits (MatMulNBits) -> float32 [..., out].

        With `half` the product is computed in float16; otherwise ONNX Runtime may round x to int8 for it.
        """
        n_out, n_in = weight.shape
        block = self.block or BLOCK
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
        """QMoE of x [1, n, d_model] and the router's probabilities [1, n, n_experts]; None for unsupported sizes.

        None also if all experts are active: QMoE has none to leave out, and needs a newer ONNX Runtime.

        Scales are float16 in the file; ONNX Runtime converts them to float32 for float32 inputs.
        """
        block = expert_block(d, self.block)
        if block is None or d.top_k == d.n_experts:
            return None
        n, f, w = d.n_experts, d.ffn_dim, d.d_model
        first, second = _Stack.empty(n, 2 * f, w, block), _Stack.empty(n, w, f, block)
        for e in range(n):  # one at a time: all experts of a layer in float32 would be 1.6 GB
            for which in ("gate", "up", "down"):
                weight = part(which, e)
                rounded = self.round(f"{name}.{e}.{which}_proj", weight, block, self.asymmetric)
                rounded = Blocks(rounded.codes, rounded.scale.astype(np.float16), rounded.zero_point)
                graph.rounded(f"{name}.{which}_proj", weight, rounded.restored())
                # Rows of gate and up alternate, the only layout that the CPU kernel supports.
                rows = slice(None) if which == "down" else slice(("gate", "up").index(which), None, 2)
                (second if which == "down" else first).put(e, rows, rounded)
        codes_1, scale_1, zero_1 = first.add(graph, f"{name}.gate_up", self.asymmetric)
        codes_2, scale_2, zero_2 = second.add(graph, f"{name}.down", self.asymmetric)
        graph.need(1, 31)  # the first whose QMoE has accuracy_level; 1.26 added router_weights
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
        # CUDA's kernel ignores the last input. It weights experts by the softmax of the chosen logits, so its output
        # lacks one factor: the sum of the chosen probabilities. CPUs support weights that are not prepacked, too.
        options |= {"normalize_routing_weights": 1, "weights_prepacked": 0}
        logits = graph.node("Log", graph.node("Max", mix, graph.constant(1e-30)))
        y = graph.node("QMoE", to_half(graph, x), to_half(graph, logits), *weights, domain=MICROSOFT, **options)
        outputs = (f"{name}.top_probabilities", f"{name}.top_experts")
        top, _ = graph.nodes("TopK", probabilities, graph.ints(d.top_k), outputs=outputs, axis=-1)
        share = graph.node("ReduceSum", top, graph.ints(-1), keepdims=1)  # [1, n, 1]
        return graph.node("Mul", from_half(graph, y), share)


@dataclass(frozen=True)
class _Stack:
    """One matrix of every expert."""

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
