"""Precision, decided in one place: which weights are stored how, and what "auto" means on a device.

"fp32" and "bf16" are dtypes of the large matrices. "int8" and "nf4" (bitsandbytes) are for the decoder's attention
and its FFN or experts, the bulk of the bytes; embeddings and head stay in bfloat16 there.

Norms, biases, the router, the connector and whatever meets the pixels are float32 in every precision: they are small,
and rounding them costs most. On a CPU the vision tower is, too. On the golden models tower and connector are what
changes answers (in bfloat16 97.2 % same top tokens, without them 99.9 %); a GPU keeps the tower in bfloat16, as the
reference is evaluated, because float32 costs it an order of magnitude, not the factor of two that a CPU pays.
"""

from __future__ import annotations

import math
import re

import torch

from molmo_edge.config import PRECISIONS, MolmoConfig
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.modeling.layout import hub_layout, hub_shapes

_QUANTIZED = re.compile(
    r"decoder\.blocks\.\d+\.(attn\.(att_proj|attn_out)\.weight|ffn\.(ff_proj|ff_out)\.weight|ffn\.(gate|up|down))"
)
_FLOAT32 = re.compile(r"connector\.|vision\.(patch_embedding|class_embedding|positional_embedding)|.*\.router")
# With their scales: one float32 for 64 weights, one for a row.
_QUANTIZED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.01}


class PrecisionError(MolmoEdgeError):
    """A precision that is not known, or not here."""


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of large matrices, of keys and of values. Raises PrecisionError."""
    if precision not in PRECISIONS[1:]:
        raise PrecisionError(f'precision "{precision}" is not known; known are {", ".join(PRECISIONS)}')
    return torch.float32 if precision == "fp32" else torch.bfloat16


def is_quantized(parameter: str, precision: str) -> bool:
    """Whether a parameter of `modeling.Molmo` goes through bitsandbytes."""
    return precision in _QUANTIZED_BYTES and _QUANTIZED.fullmatch(parameter) is not None


def storage_dtype(parameter: str, ndim: int, precision: str, device: str) -> torch.dtype:
    """How a parameter that is not quantised is stored; `device` is "cpu", "cuda" or "mps"."""
    exact = ndim == 1 or _FLOAT32.match(parameter) or (device == "cpu" and parameter.startswith("vision."))
    return torch.float32 if exact else compute_dtype(precision)


def weight_bytes(config: MolmoConfig, precision: str, device: str) -> int:
    """What the weights of a model take in memory."""
    shapes, total = hub_shapes(config), 0.0
    for parameter, slot in hub_layout(config).items():
        count = len(slot) * math.prod(shapes[slot[0]])
        if is_quantized(parameter, precision):
            total += count * _QUANTIZED_BYTES[precision]
        else:
            total += count * storage_dtype(parameter, len(shapes[slot[0]]), precision, device).itemsize
    return int(total)


def choose_precision(config: MolmoConfig, precision: str, device: str, available: int | None) -> str:
    """What "auto" means: bf16 on an accelerator; on a CPU fp32 where it fits into `available` bytes, else bf16.

    Raises PrecisionError for one that is not known, and where the weights would not fit.
    """
    if precision == "auto":
        # float32 is what every figure of the reference is compared with; a processor gains little from bfloat16.
        fits = available is None or weight_bytes(config, "fp32", device) + ROOM < available
        precision = "fp32" if device == "cpu" and fits else "bf16"
    compute_dtype(precision)
    needed = weight_bytes(config, precision, device)
    if available is not None and needed + ROOM > available:
        smaller = [name for name in ("bf16", "int8", "nf4") if weight_bytes(config, name, device) + ROOM < available]
        advice = f'use precision="{smaller[0]}"' if smaller else "no precision makes it fit here"
        raise PrecisionError(
            f"the weights take {needed / 1e9:.1f} GB in {precision}, and answering up to {ROOM / 1e9:.1f} GB more, "
            f"but only {available / 1e9:.1f} GB of memory are free: {advice}"
        )
    return precision


ROOM = 1_500_000_000  # bytes for activations, keys and values, and the tensor that is being loaded
