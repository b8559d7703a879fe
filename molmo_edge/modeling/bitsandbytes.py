"""NF4 and int8 weights for the PyTorch runtime, quantised by bitsandbytes while a checkpoint is read.

NF4 (QLoRA, arXiv 2305.14314): four bits with a scale per 64 weights; activations stay bfloat16. int8 (LLM.int8, arXiv
2208.07339): a scale per row of weights and of inputs; inputs above 6 are multiplied in float16. Both are bitsandbytes'
own layers, on CUDA and on the CPU; they choose between their kernels themselves.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from molmo_edge.modeling.decoder import SparseFFN, by_expert, choose_experts
from molmo_edge.modeling.linear import Module
from molmo_edge.modeling.model import Molmo
from molmo_edge.modeling.precision import PrecisionError
from molmo_edge.system.extras import pip_command
from molmo_edge.system.memory import give_back

_OUTLIER = 6.0  # the threshold of LLM.int8
_FLOAT16_INPUT = 1000.0  # largest input: sums of products then stay below 65504 unless weights are large, too
_BLOCK = 64  # weights per scale (NF4)
_ABSENT = object()


class QuantizedLinear(Module):
    """A bitsandbytes layer that takes inputs of any float dtype and range and returns bfloat16."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = inner, dtype
        self.bias: nn.Parameter | None = None  # float32; set after the weight is loaded

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] of any float dtype -> bfloat16 [..., out]."""
        if self.dtype == torch.float16:  # int8: rows that would overflow float16, or whose products would, are scaled
            scale = (x.abs().amax(-1, keepdim=True).float() / _FLOAT16_INPUT).clamp(min=1.0)
            y = cast(Tensor, self.inner((x / scale).to(self.dtype))) * scale
        else:
            y = cast(Tensor, self.inner(x.to(self.dtype)))
        return (y if self.bias is None else y + self.bias).to(torch.bfloat16)


class QuantizedExperts(Module):
    """`SparseFFN` with a quantised layer for each matrix of each expert; the router is not quantised."""

    def __init__(self, plain: SparseFFN) -> None:
        super().__init__()
        self.top_k, self.router, self.n_experts = plain.top_k, plain.router, len(plain.gate)
        self.gate, self.up, self.down = (nn.ModuleList() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> float32 [..., d]."""
        flat = x.reshape(-1, x.shape[-1])
        weights, experts = choose_experts(self.router(flat), self.top_k)
        return by_expert(flat, weights, experts, self.n_experts, self.expert).view_as(x)

    def expert(self, x: Tensor, e: int) -> Tensor:
        """SwiGLU of expert `e` alone: x [n, d] -> bfloat16 [n, d]."""
        x = x.to(torch.bfloat16)
        return cast(Tensor, self.down[e](nn.functional.silu(self.gate[e](x)) * self.up[e](x)))


class Quantizer:
    """Makes layers of `kind`, "nf4" or "int8", from weights. Raises PrecisionError without bitsandbytes."""

    def __init__(self, kind: str, device: str | torch.device) -> None:
        self._kind, self._device = kind, torch.device(device)
        self._bnb = import_bitsandbytes("int8 and nf4")
        if self._device.type not in ("cpu", "cuda"):
            raise PrecisionError(f'precision "{kind}" runs on CPU and CUDA, not on {self._device.type}: use "bf16"')

    def put(self, model: Molmo, name: str, weights: Iterator[Tensor]) -> None:
        """Replace the parameter `name` of `model` by layers made from one weight, or from one per expert."""
        path, _, leaf = name.rpartition(".")
        parent, _, child = path.rpartition(".")
        module = model.get_submodule(path)
        if leaf == "weight":
            (weight,) = weights
            setattr(model.get_submodule(parent), child, self.linear(weight))
        else:
            if isinstance(module, SparseFFN):
                module = QuantizedExperts(module)
                setattr(model.get_submodule(parent), child, module)
            cast(nn.ModuleList, getattr(module, leaf)).extend(self.linear(weight) for weight in weights)
        give_back()

    def linear(self, weight: Tensor) -> QuantizedLinear:
        """A layer without bias from [out, in] of any float dtype."""
        make = self._nf4 if self._kind == "nf4" else self._int8
        layer = make(weight).eval()
        with torch.inference_mode():  # some layouts are made at first use, which here is part of loading
            layer(torch.zeros(1, weight.shape[1], device=self._device))
        return layer

    def _nf4(self, weight: Tensor) -> QuantizedLinear:
        n_out, n_in = weight.shape
        options = {"compress_statistics": False, "quant_type": "nf4"}
        layer = self._bnb.nn.Linear4bit(n_in, n_out, bias=False, compute_dtype=torch.bfloat16, device="meta", **options)
        layer.weight = self._bnb.nn.Params4bit(weight, requires_grad=False, **options).to(self._device)
        if n_out % 32 or n_in % _BLOCK:  # the packed CPU layout needs whole tiles, and does not check
            layer.support_avx512bf16_for_cpu = False
        return QuantizedLinear(layer, torch.bfloat16)

    def _int8(self, weight: Tensor) -> QuantizedLinear:
        n_out, n_in = weight.shape
        layer = self._bnb.nn.Linear8bitLt(
            n_in, n_out, bias=False, has_fp16_weights=False, threshold=_OUTLIER, device="meta"
        )
        half = weight.to(torch.float16)
        layer.weight = self._bnb.nn.Int8Params(half, has_fp16_weights=False, requires_grad=False).to(self._device)
        return QuantizedLinear(layer, torch.float16)


def import_bitsandbytes(wanted: str, instead: str = 'precision="bf16"') -> Any:
    """Import bitsandbytes without its log messages and its download.

    Raises PrecisionError, which says that `wanted` need the package, and what to use `instead`.
    """
    # On CPUs with AVX512-BF16 its import downloads native code from the hub through the package `kernels`, or logs
    # that it cannot. Neither may happen unasked.
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    kernels = sys.modules.get("kernels", _ABSENT)
    sys.modules["kernels"] = None  # type: ignore[assignment] # an import of it fails
    try:
        import bitsandbytes
    except ImportError as error:
        raise PrecisionError(
            f"{wanted} need bitsandbytes ({error}): {pip_command('quantize')}, or use {instead}"
        ) from None
    finally:
        logger.setLevel(level)
        if kernels is _ABSENT:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = cast(ModuleType, kernels)
    return bitsandbytes
