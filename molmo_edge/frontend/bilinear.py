"""Bilinear resizing without antialiasing, as Molmo2 resizes its images."""

from __future__ import annotations

import numpy as np

_ROWS_AT_ONCE = 64  # of the output: the float64 temporaries stay within a few megabytes


def resize_bilinear(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize without antialiasing: uint8 [h, w, 3] -> uint8 [height, width, 3].

    Bit-exact to torch's `interpolate(mode="bilinear", antialias=False)` on float32 in one thread, which adds the four
    products by fused multiply-adds in the order below; with several threads, torch may choose another kernel, which
    differs by 1 in a few bytes. A product of two float32 is exact in float64.
    """
    top, bottom, weight_top, weight_bottom = _taps(rgb.shape[0], height)
    left, right, weight_left, weight_right = _taps(rgb.shape[1], width)
    out = np.empty((height, width, rgb.shape[2]), np.uint8)
    for start in range(0, height, _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        upper, lower = rgb[top[part]], rgb[bottom[part]]
        w_top, w_bottom = weight_top[part, None, None], weight_bottom[part, None, None]
        w_left, w_right = weight_left[None, :, None], weight_right[None, :, None]
        total = (upper[:, right] * (w_top * w_right)).astype(np.float32)
        for pixels, weight in (
            (upper[:, left], w_top * w_left),
            (lower[:, left], w_bottom * w_left),
            (lower[:, right], w_bottom * w_right),
        ):
            total = (pixels * weight.astype(np.float64) + total).astype(np.float32)
        out[part] = np.clip(np.rint(total), 0, 255)
    return out


def _taps(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each output position along one axis: two input positions and their float32 weights (half-pixel centres)."""
    scale = np.float64(np.float32(n_in) / np.float32(n_out))
    centre = np.maximum((scale * (np.arange(n_out) + 0.5) - 0.5).astype(np.float32), np.float32(0))
    first = np.minimum(centre.astype(np.int64), n_in - 1)
    weight = np.clip(centre - first.astype(np.float32), 0, 1).astype(np.float32)
    return first, np.minimum(first + 1, n_in - 1), np.float32(1) - weight, weight
