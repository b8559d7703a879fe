"""Backdrops of scenes: crops of photographs, gradients, plain colours, noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from molmo_edge.data.drawn.colours import random_colour
from molmo_edge.data.drawn.sprites import Background
from molmo_edge.data.regions import shared_area

Size = tuple[int, int]  # width, height, pixels


def draw_backdrop(
    rng: np.random.Generator, backgrounds: Sequence[Background], size: Size
) -> tuple[Image.Image, str, frozenset[str]]:
    """(RGB image of `size`, its kind, labels of objects that it may show).

    The kind is "photo" (if there are `backgrounds`), "plain", "gradient" or "noise".
    """
    kind = str(rng.choice(["photo", "plain", "gradient", "noise"], p=[0.55, 0.15, 0.2, 0.1]))
    if kind == "photo" and len(backgrounds):
        background = backgrounds[int(rng.integers(len(backgrounds)))]
        image, maybe_present = _photo_crop(rng, background, size)
        return image, "photo", maybe_present
    if kind == "gradient":
        return _gradient(rng, size), kind, frozenset()
    if kind == "noise":
        return _noise(rng, size), kind, frozenset()
    return Image.new("RGB", size, random_colour(rng)), "plain", frozenset()


def _photo_crop(rng: np.random.Generator, background: Background, size: Size) -> tuple[Image.Image, frozenset[str]]:
    """The crop, out of six of the scene's aspect, that shows least of the labelled objects."""
    height, width = background.rgb.shape[:2]
    aspect = size[0] / size[1]
    boxes = [
        (x0 * width / 100, y0 * height / 100, x1 * width / 100, y1 * height / 100)
        for x0, y0, x1, y1 in background.boxes
    ]
    crops = []
    for _ in range(6):
        crop_w = min(width, height * aspect) * rng.uniform(0.5, 1.0)
        crop_h = crop_w / aspect
        x0, y0 = rng.uniform(0, width - crop_w), rng.uniform(0, height - crop_h)
        window = (int(x0), int(y0), max(int(x0) + 8, int(x0 + crop_w)), max(int(y0) + 8, int(y0 + crop_h)))
        shown = [shared_area(box, window) for box in boxes]
        crops.append((sum(shown), window, shown))
        if not any(shown):
            break
    _, window, shown = min(crops, key=lambda crop: crop[0])
    labels = frozenset(label for label, pixels in zip(background.labels, shown, strict=True) if pixels > 0)
    image = Image.fromarray(background.rgb[window[1] : window[3], window[0] : window[2]])
    return image.resize(size, Image.Resampling.BILINEAR), labels | background.maybe_present


def _gradient(rng: np.random.Generator, size: Size) -> Image.Image:
    """Four corner colours, blended."""
    corners = np.array([[random_colour(rng) for _ in range(2)] for _ in range(2)], np.uint8)
    if rng.random() < 0.5:
        corners[:, 1] = corners[:, 0]  # only from top to bottom, as sky and floor
    # Resizing a 2 x 2 image blends only its middle half: enlarge it and keep that half.
    wide = Image.fromarray(corners).resize((size[0] * 2, size[1] * 2), Image.Resampling.BILINEAR)
    return wide.crop((size[0] // 2, size[1] // 2, size[0] // 2 + size[0], size[1] // 2 + size[1]))


def _noise(rng: np.random.Generator, size: Size) -> Image.Image:
    """Coarse noise of random grain around one colour."""
    grain = int(rng.choice([4, 12, 40]))
    shape = (max(2, size[1] // grain), max(2, size[0] // grain), int(rng.choice([1, 3])))
    values = np.array(random_colour(rng)) + rng.normal(0, rng.uniform(8, 45), shape)
    coarse = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)
