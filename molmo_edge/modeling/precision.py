"""The precisions of the PyTorch runtime: the dtype of each weight, and what "auto" means on a device.

"fp32" and "bf16" are dtypes of the large matrices. "int8" and "nf4" (bitsandbytes) quantise the decoder's attention
and its FFN or experts, which are most of the bytes; embeddings and head are bfloat16 then.

Norms, biases, the router, the connector, a convolutional tower and the embeddings of the ViT are float32 in every
precision: they are small, and rounding them costs most. On a CPU the whole vision tower is float32, too: on the golden
models, rounding tower and connector to bfloat16 changes most of the answers (97.2 % same top tokens, without them
99.9 %). A GPU keeps the tower in bfloat16, as in the reference's evaluation, because float32 is ten times slower there,
not twice as on a CPU.
"""

from __future__ import annotations

import torch

from molmo_edge.config import PRECISIONS, MolmoConfig
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.modeling.weight_sizes import QUANTIZED_BYTES, is_float32, room, weight_bytes
from molmo_edge.modeling.weight_sizes import is_quantized as is_quantized


class PrecisionError(MolmoEdgeError):
    """A precision that does not exist, or that cannot be used here."""


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of large matrices, of keys and of values. Raises PrecisionError."""
    if precision not in PRECISIONS[1:]:
        raise PrecisionError(f'precision "{precision}" is not supported (supported: {", ".join(PRECISIONS[1:])})')
    return torch.float32 if precision == "fp32" else torch.bfloat16


def storage_dtype(parameter: str, ndim: int, precision: str, device: str) -> torch.dtype:
    """The dtype of a parameter that is not quantised; `device` is "cpu", "cuda" or "mps"."""
    compute_dtype(precision)
    return torch.float32 if is_float32(parameter, ndim, precision, device) else torch.bfloat16


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
    here = [name for name in ("bf16", "int8", "nf4") if device != "mps" or name not in QUANTIZED_BYTES]
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
