"""Compiled kernels for molmo-edge: where the library is, and which instructions it uses on this processor."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

__version__ = "0.3.0"

KERNELS = ("amx", "avx512-bf16", "avx512-vnni", "avx-vnni", "avx2", "neon-i8mm", "neon-dot", "plain")
OPERATORS = ("MatMulNBits", "QMoE", "GroupQueryAttention", "MultiHeadAttention", "QuantizedLinear")
_FOUR_BITS = OPERATORS[:2]
# Used by default: faster than ONNX Runtime's own operators of the same instructions (benchmarks/RESULTS.md). Those of
# vision towers without bfloat16 are not faster; NEON has not been measured.
FASTER = {
    "amx": OPERATORS,
    "avx512-bf16": OPERATORS,
    "avx512-vnni": _FOUR_BITS,
    "avx-vnni": _FOUR_BITS,
    "avx2": _FOUR_BITS,
}


def library() -> Path:
    """The shared library that ONNX Runtime loads. Raises FileNotFoundError if it is missing."""
    path = Path(__file__).with_name("kernels.dll" if sys.platform == "win32" else "kernels.so")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: pip install --force-reinstall molmo-edge-kernels")
    return path


@functools.cache
def load() -> ctypes.CDLL:
    """Load the library. Raises OSError if the system cannot load it."""
    loaded = ctypes.CDLL(str(library()))
    loaded.molmo_kernel_name.restype = ctypes.c_char_p
    loaded.molmo_has_kernel.argtypes = [ctypes.c_char_p]
    loaded.molmo_computes.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    return loaded


def kernel() -> str:
    """The kernel in use, one of KERNELS: the fastest of this processor, or what MOLMO_EDGE_KERNEL names."""
    name: bytes = load().molmo_kernel_name()
    return name.decode()


def supported() -> tuple[str, ...]:
    """Those of KERNELS that this processor and its operating system support."""
    return tuple(name for name in KERNELS if load().molmo_has_kernel(name.encode()))


def operators(*, faster: bool = False) -> tuple[str, ...]:
    """Those of OPERATORS that the kernel in use computes. `faster`: faster than ONNX Runtime."""
    name = kernel()
    found = (each for each in OPERATORS if load().molmo_computes(name.encode(), each.encode()))
    return tuple(each for each in found if not faster or each in FASTER.get(name, ()))
