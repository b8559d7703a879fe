"""The precisions of the PyTorch runtime: the dtype of each weight, and what "auto" means on a device.

"fp32" and "bf16" are dtypes of the large matrices. "int8" and "nf4" (bitsandbytes) quantise the decoder's attention
and its FFN or experts, which are most of the bytes; embeddings and head are bfloat16 then.

Norms, biases, the router, the connector and the embeddings of the ViT are float32 in every precision: they are small,
and rounding them costs most. On a CPU the whole vision tower is float32, too: on the golden models, rounding tower and
connector to bfloat16 changes most of the answers (97.2 % same top tokens, without them 99.9 %). A GPU keeps the tower
in bfloat16, as in the reference's evaluation, because float32 is ten times slower there, not twice as on a CPU.
"""

from __future__ import annotations

import math
import re

import torch

from molmo_edge.checkpoints.tensor_names import hub_layout, hub_shapes
from molmo_edge.config import PRECISIONS, MolmoConfig
from molmo_edge.errors import MolmoEdgeError

_QUANTIZED = re.compile(
    r"decoder\.blocks\.\d+\.(attn\.(att_proj|attn_out)\.weight|ffn\.(ff_proj|ff_out)\.weight|ffn\.(gate|up|down))"
)
_FLOAT32 = re.compile(r"connector\.|.*\.(patch_embedding|class_embedding|positional_embedding|router)\b")
# With their scales: one float32 per 64 weights, one per row.
_QUANTIZED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.01}
_POSITIONS = 2048  # of an image with many crops and a conversation
_ACTIVATIONS = 1_000_000_000  # bytes, including the tensor that is being loaded


class PrecisionError(MolmoEdgeError):
    """A precision that does not exist, or that cannot be used here."""


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of large matrices, of keys and of values. Raises PrecisionError."""
    if precision not in PRECISIONS[1:]:
        raise PrecisionError(f'precision "{precision}" is not supported (supported: {", ".join(PRECISIONS[1:])})')
    return torch.float32 if precision == "fp32" else torch.bfloat16


def is_quantized(parameter: str, precision: str) -> bool:
    """Whether bitsandbytes quantises a parameter of `modeling.Molmo`."""
    return precision in _QUANTIZED_BYTES and _QUANTIZED.fullmatch(parameter) is not None


def storage_dtype(parameter: str, ndim: int, precision: str, device: str) -> torch.dtype:
    """The dtype of a parameter that is not quantised; `device` is "cpu", "cuda" or "mps"."""
    on_cpu = device == "cpu" and parameter.startswith(("vision.", "extra_vision."))
    exact = ndim == 1 or _FLOAT32.match(parameter) or on_cpu
    return torch.float32 if exact else compute_dtype(precision)


def weight_bytes(config: MolmoConfig, precision: str, device: str) -> int:
    """The size of a model's weights in memory, in bytes."""
    shapes, total = hub_shapes(config), 0.0
    for parameter, slot in hub_layout(config).items():
        count = len(slot) * math.prod(shapes[slot[0]])
        if is_quantized(parameter, precision):
            total += count * _QUANTIZED_BYTES[precision]
        else:
            total += count * storage_dtype(parameter, len(shapes[slot[0]]), precision, device).itemsize
    return int(total)


def room(config: MolmoConfig, precision: str) -> int:
    """The bytes that answering needs besides the weights: two caches, of a scene and of a question, and activations."""
    d = config.decoder
    positions = min(_POSITIONS, d.max_position_embeddings)
    cache = 2 * d.n_layers * d.n_kv_heads * d.head_dim * positions * compute_dtype(precision).itemsize
    return 2 * cache + _ACTIVATIONS


def choose_precision(config: MolmoConfig, precision: str, device: str, available: int | None) -> str:
    """Resolve "auto": bf16 on an accelerator; on a CPU fp32 if it fits into `available` bytes, else bf16.

    Raises PrecisionError if the precision does not exist or not on this device, and if the weights do not fit.
    """

    def fits(name: str) -> bool:
        return available is None or weight_bytes(config, name, device) + room(config, name) <= available

    if precision == "auto":
        # Results are compared with the reference's in float32; bfloat16 would be faster on some processors.
        precision = "fp32" if device == "cpu" and fits("fp32") else "bf16"
    compute_dtype(precision)
    here = [name for name in ("bf16", "int8", "nf4") if device != "mps" or name not in _QUANTIZED_BYTES]
    if precision not in ("fp32", *here):
        raise PrecisionError(
            f'precision "{precision}" is not available on {device}: use precision="bf16", or device="cpu"'
        )
    if available is not None and not fits(precision):
        smaller = next((name for name in here if fits(name)), None)
        advice = "no precision makes it fit" if smaller is None else f'use precision="{smaller}"'
        weights, more, free = (
            f"{count / 1e9:.1f} GB"
            for count in (weight_bytes(config, precision, device), room(config, precision), available)
        )
        raise PrecisionError(
            f"the weights need {weights} in {precision} and answering needs {more} more, but only {free} of memory "
            f"are free: {advice}"
        )
    return precision
