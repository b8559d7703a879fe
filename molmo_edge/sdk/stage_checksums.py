"""Checksums of the stages between a photo and the first token, recorded in a bundle for `molmo-edge verify`.

File hashes show that a bundle is unchanged, but not that this installation computes the same results with it: a mean
may have changed, a tiling may have one more crop, or graphs may be of another export. Each stage is compared
separately, in the order of the data, so that the first difference shows the cause:

- settings: a hash of the manifest's `model` and `special_ids`.
- layout: a hash of tilings, image tokens and the prompt's ids; integers, equal on every machine.
- pixels: normalised crops of two generated images, independent of JPEG decoders; equal up to float32's last bits.
- features: the decoder's input for the check's photo; as close as the graphs' precision allows.
- logits: those of the first token; likewise.

An array is stored as `_N_SUMS` sums of all its values with random signs. The relative distance of two sets of sums
estimates that of the arrays to about an eighth (Johnson and Lindenstrauss), so the comparison reflects the size of a
change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge.checkpoints.manifest import BundleError, content_sha256
from molmo_edge.config import ImageConfig
from molmo_edge.frontend.crops import ImageProcessor, PreparedImage, select_tiling
from molmo_edge.frontend.prompts import text_ids
from molmo_edge.frontend.tokenizer import SpecialIds, Tokenizer

VERSION = 1  # of these checksums
PARTS = ("settings", "layout", "pixels", "features", "logits")
_ARRAYS = ("pixels", "features", "logits")

_N_SUMS = 32
_BLOCK = 1 << 16  # values whose signs are in memory at once
_IMAGE_SIZES = ((97, 161), (230, 75))  # height, width of the generated images
_PIXELS = 5e-6  # relative; rounding of a resize gives 3e-7, a mean that is off by 1e-5 gives 2e-5
# Relative. Integer products round their inputs to 255 levels: the last bit of one pixel changes nano's features by
# 0.06 and its first logits by 0.07, a float32 engine by 0.08 and 0.07; another photo changes them by 1.2 and 0.8.
_FEATURES = {"float": 0.05, "integer": 0.2}
_LOGITS = {"float": 0.1, "integer": 0.4}
_FLOATS = ("fp32", "fp16", "f32", "f16", "bf16")


@dataclass(frozen=True)
class Part:
    """The comparison of one stage with its recording."""

    name: str  # one of PARTS
    same: bool
    distance: float | None = None  # relative; None for hashes, and for arrays of another shape
    limit: float | None = None  # the largest `distance` that counts as the same


def settings_sum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the model configuration and the special ids of a manifest."""
    return content_sha256({name: manifest[name] for name in ("model", "special_ids")})


def layout_sum(config: ImageConfig, tokenizer: Tokenizer, question: str) -> str:
    """Hash the tilings of many image sizes, the tokens and feature positions of each tiling, and the question's ids."""
    tilings = [select_tiling(height, width, config) for height, width in _sizes()]
    found = hashlib.sha256(repr(tilings).encode())
    blank = ImageProcessor(config, tokenizer.special)
    for tiling in sorted(set(tilings), key=lambda t: (t[0] * t[1], t))[:24]:
        tokens, index = blank.layout(tiling)
        for array in (tokens, index):
            found.update(repr(array.shape).encode() + array.astype("<i4").tobytes())
    found.update(text_ids(tokenizer, [question]).astype("<i4").tobytes())
    return found.hexdigest()


def pixels_sum(config: ImageConfig, special: SpecialIds) -> dict[str, Any]:
    """Sum the crops and masks of the generated images."""
    process = ImageProcessor(config, special)
    parts = [part for size in _IMAGE_SIZES for image in (process(_generated_image(*size)),) for part in _arrays(image)]
    return array_sum(np.concatenate([part.reshape(-1) for part in parts]))


def _arrays(image: PreparedImage) -> list[np.ndarray]:
    whole = image.overview
    return [image.crops, image.masks, *(() if whole is None else (whole.pixels, whole.positions))]


def array_sum(array: np.ndarray) -> dict[str, Any]:
    """Return the shape of a float array and its signed sums."""
    flat = np.ascontiguousarray(array, np.float64).reshape(-1)
    sums = np.zeros(_N_SUMS)
    # numpy guarantees the stream of a bit generator across versions, but not that of its distributions.
    random = np.random.PCG64(1)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        bits = random.random_raw(len(block)).astype("<u8").view(np.uint8).reshape(-1, 8)
        signs = np.unpackbits(bits[:, : _N_SUMS // 8], axis=1)  # [n, _N_SUMS] of 0 and 1
        sums += 2.0 * (block @ signs) - block.sum()
    return {"shape": list(array.shape), "sums": [float(f"{value:.8g}") for value in sums]}


def logits_sum(logits: np.ndarray) -> dict[str, Any]:
    """Like `array_sum`, for logits [vocab_size] without their mean, which does not affect the choice."""
    values = logits.astype(np.float64)
    return array_sum(values - values.mean())


def compare(name: str, recorded: Any, found: Any, precisions: Sequence[str] = ()) -> Part:
    """Compare the stage `name` (one of PARTS). `precisions`: of the components involved."""
    if name not in _ARRAYS:
        return Part(name, recorded == found)
    kind = "float" if all(word in _FLOATS for word in precisions) else "integer"
    limit = {"pixels": _PIXELS, "features": _FEATURES[kind], "logits": _LOGITS[kind]}[name]
    exact, here = (np.asarray(part["sums"], np.float64) for part in (recorded, found))
    if recorded["shape"] != found["shape"] or exact.shape != here.shape:
        return Part(name, False, None, limit)
    length = float(np.linalg.norm(exact))
    distance = float(np.linalg.norm(here - exact)) / max(length, 1e-30)
    return Part(name, distance <= limit, distance, limit)  # False for NaN


def read_sums(where: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Return the recorded checksums by stage, for `compare`. Raises BundleError for another version or missing ones."""
    version = entry.get("version")
    if isinstance(version, int) and version > VERSION:
        raise BundleError(
            f"{where}: version {version} of the check's checksums is not supported (supported: {VERSION}): "
            "pip install --upgrade molmo-edge"
        )
    whole = all(
        _is_array_sum(entry.get(name)) if name in _ARRAYS else isinstance(entry.get(name), str) for name in PARTS
    )
    if version != VERSION or not whole:
        raise BundleError(f"{where}: the check's checksums are incomplete: download or export the bundle again")
    return {name: entry[name] for name in PARTS}


def _is_array_sum(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
        return False
    sums = entry.get("sums")
    return isinstance(sums, list) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in sums)


@lru_cache(maxsize=1)
def _sizes() -> tuple[tuple[int, int], ...]:
    """Image sizes that distinguish tilings: for each number of crops up to 64 a strip that needs them all."""
    strips = [(2000, 2000 * n) for n in range(1, 65)]
    usual = [(h, w) for h in (40, 224, 336, 500, 768, 1100, 2400) for w in (40, 224, 336, 500, 768, 1100, 2400)]
    return tuple(strips + [(w, h) for h, w in strips] + usual)


def _generated_image(height: int, width: int) -> np.ndarray:
    """Return gradients with fine noise, uint8 [height, width, 3], the same on every machine."""
    y, x, channel = np.ogrid[:height, :width, :3]
    slope = (200 * y) // height + (40 * x) // width
    image: np.ndarray = (slope + (y * 37 + x * 91 + channel * 53 + (x * y) % 97) % 83) % 256
    return image.astype(np.uint8)
