"""Antialiased resizing in numpy, equal to torch's `interpolate(..., antialias=True)` on floats.

The filter is separable and its weights are a band matrix: an output pixel depends on a few neighbouring input pixels.
The outputs are split into blocks that depend on about the same inputs. Each block is a small dense matrix product,
which BLAS computes many times faster than gathering taps.

Source of the weights: ATen's `_upsample_bilinear2d_aa` and `_upsample_bicubic2d_aa` (a = -0.5). ATen computes them in
float32; doing the same keeps the result within 1e-6, while float64 centres would differ by 1e-4 in wide images.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

_BLOCK = 8  # output pixels per product: larger blocks contain more zeros, and blocks below 8 are slower too
# OpenBLAS uses threads for larger products. At these sizes that gains nothing, and while other work kept the cores
# busy, waiting for the threads made a resize take a second instead of 15 ms.
_MOST_MULTIPLICATIONS = 65536 * 4


class _Band(NamedTuple):
    """The outputs first..last of one axis as a matrix product with the inputs start..stop."""

    first: int
    last: int
    start: int
    stop: int
    rows: np.ndarray  # float32 [last - first, stop - start]: multiplied from the left, for the vertical axis
    columns: np.ndarray  # float32 [3 * (stop - start), 3 * (last - first)]: multiplied from the right, for RGB


def resize(rgb: np.ndarray, height: int, width: int, *, cubic: bool = False) -> np.ndarray:
    """Resize `rgb`, uint8 [h, w, 3], to float32 [height, width, 3] in 0..1, clipped.

    Bilinear, or bicubic if `cubic`. Sizes are in pixels, at least 1.
    """
    h, w = rgb.shape[:2]
    flat = rgb.reshape(h, w * 3)
    squeezed = np.empty((height, w * 3), np.float32)
    for band in _bands(h, height, cubic):
        # Converted block by block: a 12-megapixel photo would be 144 MB of floats.
        part = flat[band.start : band.stop].astype(np.float32)  # [stop - start, w * 3]
        step = max(_MOST_MULTIPLICATIONS // band.rows.size, 1)
        for i in range(0, w * 3, step):
            np.matmul(band.rows, part[:, i : i + step], out=squeezed[band.first : band.last, i : i + step])
    squeezed *= np.float32(1 / 255)
    out = np.empty((height, width * 3), np.float32)
    for band in _bands(w, width, cubic):
        part = squeezed[:, 3 * band.start : 3 * band.stop]  # [height, 3 * (stop - start)]
        target = out[:, 3 * band.first : 3 * band.last]
        step = max(_MOST_MULTIPLICATIONS // band.columns.size, 1)
        for i in range(0, height, step):
            np.matmul(part[i : i + step], band.columns, out=target[i : i + step])
    np.clip(out, 0.0, 1.0, out=out)
    return out.reshape(height, width, 3)


@lru_cache(maxsize=32)
def _bands(size: int, out_size: int, cubic: bool) -> tuple[_Band, ...]:
    """The band matrix of one axis, `size` -> `out_size` pixels, in blocks. Cached: a camera repeats its sizes."""
    start, weights = _taps(size, out_size, cubic)  # [out_size], [out_size, n_taps]
    bands = []
    for first in range(0, out_size, _BLOCK):
        last = min(first + _BLOCK, out_size)
        # Taps outside of a pixel's support have weight 0; they must not reach outside of the image.
        begin = int(start[first])
        stop = min(int(start[last - 1]) + weights.shape[1], size)
        rows = np.zeros((last - first, stop - begin), np.float32)
        for i in range(first, last):
            n = min(weights.shape[1], size - int(start[i]))
            rows[i - first, start[i] - begin : start[i] - begin + n] = weights[i, :n]
        columns = np.kron(rows.T, np.eye(3, dtype=np.float32))
        for matrix in (rows, columns):
            matrix.flags.writeable = False
        bands.append(_Band(first, last, begin, stop, rows, columns))
    return tuple(bands)


def _taps(size: int, out_size: int, cubic: bool) -> tuple[np.ndarray, np.ndarray]:
    """First input pixel (int64 [out_size]) and normalised weights (float32 [out_size, n_taps]) of each output."""
    scale = np.float32(size) / np.float32(out_size)
    stretch = max(scale, np.float32(1))  # only shrinking widens the filter
    support = np.float32(2 if cubic else 1) * stretch
    center = (np.float64(scale) * (np.arange(out_size) + 0.5)).astype(np.float32).astype(np.float64)
    start = np.maximum((center - support + 0.5).astype(np.int64), 0)
    stop = np.minimum((center + support + 0.5).astype(np.int64), size)
    taps = np.arange(int((stop - start).max()))  # [n_taps]
    distance = np.abs((taps + start[:, None] - center[:, None] + 0.5) * np.float64(np.float32(1) / stretch))
    weights = _cubic(distance) if cubic else np.maximum(1 - distance, 0)
    weights = np.where(taps < (stop - start)[:, None], weights, 0)
    return start, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic with a = -0.5, the one that PIL and torch's antialiased resize use, of distances x >= 0."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))
