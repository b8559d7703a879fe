"""From floats to four bits, and back: blocks of weights that share a scale.

Round to nearest, symmetric: the value of a block that is largest in size becomes exactly -8, so that all sixteen levels
are used. Against max|w| / 7 that is a seventh finer; llama.cpp's Q4_0 has the same rule. Asymmetric: the sixteen
levels lie between the smallest and the largest value, with a zero point, so that 0 stays exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MIDDLE = 8  # the zero point of a symmetric block
_TOP = 15


@dataclass(frozen=True)
class Blocks:
    """Weights [..., in] in four bits: w ~= (code - zero point) * scale."""

    codes: np.ndarray  # uint8 [..., in] of 0..15
    scale: np.ndarray  # float32 [..., in / block]
    zero_point: np.ndarray | None = None  # uint8 [..., in / block] of 0..15; None: 8 everywhere

    def restored(self) -> np.ndarray:
        """float32 [..., in]"""
        codes = self.codes.reshape(*self.scale.shape, -1).astype(np.float32)
        zero_point = MIDDLE if self.zero_point is None else self.zero_point[..., None].astype(np.float32)
        return ((codes - zero_point) * self.scale[..., None]).reshape(self.codes.shape)


Round = Callable[[str, np.ndarray, int, bool], Blocks]
"""(hub name without ".weight", weight [out, in], block, asymmetric) -> the weight in blocks"""


def nearest(name: str, weight: np.ndarray, block: int, asymmetric: bool) -> Blocks:
    """Each weight by itself. `in` must be a multiple of `block`.

    |error| <= |scale| / 2; but symmetric, for values near the opposite of the largest one, which have no level of
    their own, at most |scale|.
    """
    blocks = weight.reshape(*weight.shape[:-1], -1, block)
    scale, zero_point = block_scales(blocks, asymmetric)
    steps = blocks / np.where(scale == 0, np.float32(1), scale)[..., None]  # of zeros alone: no step
    shift = MIDDLE if zero_point is None else zero_point[..., None]
    codes = np.clip(np.rint(steps) + shift, 0, _TOP).astype(np.uint8).reshape(weight.shape)
    return Blocks(codes, scale, zero_point)


def block_scales(blocks: np.ndarray, asymmetric: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """[..., block] -> scale float32 [...], and zero point uint8 [...] where asymmetric."""
    if asymmetric:
        low = np.minimum(blocks.min(axis=-1), 0).astype(np.float32)
        scale = (np.maximum(blocks.max(axis=-1), 0) - low) / np.float32(_TOP)
        zero_point = np.rint(-low / np.where(scale == 0, np.float32(1), scale))
        return scale, zero_point.astype(np.uint8)
    at = np.abs(blocks).argmax(axis=-1, keepdims=True)
    largest = np.take_along_axis(blocks, at, axis=-1)[..., 0]  # with its sign
    return (largest / np.float32(-MIDDLE)).astype(np.float32), None


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 [..., n] of 0..15 -> uint8 [..., ceil(n / 2)], the first of a pair in the low half."""
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack_nibbles` for an even n."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
