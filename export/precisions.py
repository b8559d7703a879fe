"""Every precision name: what it means, what it costs, and which engines and components accept it.

A precision of an ONNX component names a storage format for each kind of matrix (`OnnxPrecision.formats`). A name given
for a whole bundle is a preset: it expands to one precision per component (`OnnxPrecision.bundle`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from molmo_edge.checkpoints.manifest import GRAPHS

POINT_HEAD_PRECISIONS = ("fp32", "q8", "int8")  # fp32 unless named: its choices cannot be corrected by later tokens
PARTS = ("attention", "experts", "router", "head")  # of a decoder; "experts" is the FFN, of dense decoders too
PART_PRECISIONS = ("fp32", "q8", "int8", "q4")  # the largest first
QUANTIZED = PART_PRECISIONS[1:]
BYTES_PER_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "q8": 1.1, "q4": 0.6}  # scales included


@dataclass(frozen=True)
class OnnxPrecision:
    """A precision of ONNX components: its storage formats, and the preset that it names for a bundle."""

    name: str
    meaning: str  # shown by `molmo-edge export --help`
    formats: Mapping[str, str]  # decoder part -> storage format; other components store all matrices as "experts"
    table: str  # format of the embedding table
    half: bool = False  # products, and the decoder's cache, in float16
    plain: bool = False  # available in standard ONNX operators
    bundle: Mapping[str, str] | None = None  # component -> precision, when given for a whole bundle; None: itself

    @property
    def bytes_per_weight(self) -> float:
        """Approximate size of a weight of the experts (or of the FFN), scales included."""
        return BYTES_PER_WEIGHT[self.formats["experts"]]


def _formats(matrices: str, head: str) -> dict[str, str]:
    return {"attention": matrices, "experts": matrices, "router": "fp32", "head": head}


def _bundle(*precisions: str) -> dict[str, str]:
    return dict(zip(GRAPHS, precisions, strict=True))


# On a CPU a four-bit ViT is slower than fp32 and an int8 one faster. The connector's input has channels so large that
# one scale per row has ten times the error of one scale per block. Head and embedding keep eight bits in q4: each is
# used once per token and shows every error.
_Q4 = OnnxPrecision(
    "q4", "4-bit decoder", _formats("q4", head="q8"), "int8", bundle=_bundle("int8", "q8", "int8", "q4")
)
ONNX_PRECISIONS = {
    precision.name: precision
    for precision in (
        OnnxPrecision("fp32", "exact", _formats("fp32", head="fp32"), "fp32", plain=True),
        OnnxPrecision("fp16", "for GPUs", _formats("fp16", head="fp16"), "fp16", half=True, plain=True),
        OnnxPrecision(
            "int8",
            "8-bit, one scale per row: fastest",
            _formats("int8", head="q8"),
            "int8",
            plain=True,
            bundle=_bundle("int8", "q8", "int8", "int8"),
        ),
        OnnxPrecision("q8", "8-bit, one scale per 32 weights: more accurate", _formats("q8", head="q8"), "int8"),
        _Q4,
        replace(
            _Q4,
            name="mixed",
            meaning="q4 with int8 attention",
            formats={**_Q4.formats, "attention": "int8"},
            bundle=_bundle("int8", "q8", "int8", "mixed"),
        ),
        OnnxPrecision(
            "q4f16",
            "q4 for GPUs",
            _formats("q4", head="fp16"),
            "fp16",
            half=True,
            bundle=_bundle("fp16", "fp16", "fp16", "q4f16"),
        ),
    )
}
PLAIN_PRECISIONS = tuple(name for name, precision in ONNX_PRECISIONS.items() if precision.plain)

# Decoders for llama.cpp, by the names of its file types (gguf.LlamaFileType). Types of two bits and fewer are left out:
# they need an importance matrix, and their effect on a Molmo has not been measured.
GGUF_FLOATS = ("f32", "f16", "bf16")
GGUF_CALIBRATED = (  # llama.cpp rounds these with an importance matrix if it has one
    *("q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0"),
    *("iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s"),
)
GGUF_PRECISIONS = (*GGUF_FLOATS, "q8_0", *GGUF_CALIBRATED)

SAFETENSORS_PRECISIONS = {"bf16": "BF16", "fp32": "F32"}  # -> dtype in the file


def onnx_bundle(name: str) -> dict[str, str]:
    """The precision of every component when `name`, one of ONNX_PRECISIONS, is given for a whole bundle."""
    return dict(ONNX_PRECISIONS[name].bundle or dict.fromkeys(GRAPHS, name))


def gguf_bundle(decoder: str) -> dict[str, str]:
    """The precision of every component when `decoder`, one of GGUF_PRECISIONS, is given for a whole bundle."""
    others = ("fp32", "fp32", "fp32") if decoder in GGUF_FLOATS else ("int8", "q8", "int8")
    return _bundle(*others, decoder)


def decoder_part(matrix: str) -> str:
    """The part of a decoder that a matrix belongs to, by its hub name without ".weight"."""
    if matrix.endswith((".att_proj", ".attn_out")):
        return "attention"
    if matrix.startswith("lm_head") or matrix.endswith(("transformer.ff_out", "wte.embedding")):
        return "head"
    return "router" if matrix.endswith(".mlp.gate") else "experts"
