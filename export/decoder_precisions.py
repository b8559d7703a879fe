"""A decoder whose parts differ: attention, experts, router and head each in a precision of its own.

"experts" are the feed-forward matrices, of a dense decoder too. Measuring what each part costs
(molmo_edge.evaluation.ablation) and choosing by it (molmo_edge.evaluation.precision_search) both need them apart.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from molmo_edge.config import DecoderConfig
from molmo_edge.export.errors import ExportError
from molmo_edge.export.graph_builder import ExpertPart, Graph, Linear, Precision, fp32_linear
from molmo_edge.export.int4_graph import Int4
from molmo_edge.export.int8_graph import int8_linear, is_head, q8_linear

PARTS = ("attention", "experts", "router", "head")
PART_WORDS = ("fp32", "int8", "q8", "q4")
_BYTES = {"fp32": 4.0, "int8": 1.0, "q8": 1.1, "q4": 0.6}  # a weight


def part_of(name: str) -> str:
    """The part of a decoder's matrix, by its hub name without ".weight"."""
    if name.endswith((".att_proj", ".attn_out")):
        return "attention"
    if is_head(name):
        return "head"
    return "router" if name.endswith(".mlp.gate") else "experts"


def by_part(base: Precision, words: Mapping[str, str], how: Int4) -> Precision:
    """`base`, but for the parts in `words`, {part: one of PART_WORDS}. Raises ExportError for a base in float16."""
    if base.half:
        raise ExportError(f"parts of a decoder in {base.name} cannot be chosen: its products are in float16 throughout")
    of_word: dict[str, Linear] = {"fp32": fp32_linear, "int8": int8_linear, "q8": q8_linear, "q4": how.linear}
    linears = {part: of_word[word] for part, word in words.items()}

    def linear(graph: Graph, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None) -> str:
        return linears.get(part_of(name), base.linear)(graph, x, name, weight, bias)

    def experts(graph: Graph, d: DecoderConfig, x: str, probabilities: str, name: str, part: ExpertPart) -> str | None:
        if "experts" in words:
            return how.experts(graph, d, x, probabilities, name, part) if words["experts"] == "q4" else None
        return None if base.experts is None else base.experts(graph, d, x, probabilities, name, part)

    return Precision(
        ",".join([base.name, *(f"{part}={words[part]}" for part in PARTS if part in words)]),
        "_parts",
        max(base.bytes_per_weight, *(_BYTES[word] for word in words.values())),
        linear,
        base.table,
        experts,
        router=linears.get("router", base.router),
        keep=base.keep,
    )
