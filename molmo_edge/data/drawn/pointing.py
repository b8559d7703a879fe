"""Scenes to point at and to count, as rows: sprites that the user has built, or coloured shapes drawn here.

Shapes need no assets: fifteen of them in ten colours are 150 names, told apart by colour, by form or by both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from molmo_edge.data.choices import pick, some, whole
from molmo_edge.data.drawn.colours import COLOURS
from molmo_edge.data.drawn.scenes import draw_scene
from molmo_edge.data.drawn.sprites import Assets
from molmo_edge.data.english import plural
from molmo_edge.data.grounded_questions import absent_labels

Points = list[tuple[float, float]]  # percent of width and height, one decimal

_MANY = 0.34  # share of the scenes that are drawn to be counted
_SIDE = 192  # of a drawn shape before it is reduced, pixels


@dataclass(frozen=True)
class LabelledScene:
    """A picture, and where everything is."""

    image: Image.Image  # RGB
    points: dict[str, Points]  # label -> one point on each object; empty: certainly absent
    many: bool  # drawn to be counted


def labelled_scene(rng: np.random.Generator, assets: Assets | None = None) -> LabelledScene:
    """Up to 40 objects, none hiding another. `assets` None: coloured shapes."""
    many = rng.random() < _MANY
    rgb, annotation = draw_scene(rng, assets or shape_assets(), "many" if many else "few")
    found = {item["label"]: [(x, y) for x, y in item["points"]] for item in annotation["objects"]}
    if assets is None:
        labels = _labels_of_shapes(rng, found)
    else:
        absent = some(rng, sorted(absent_labels(annotation, assets.names)), whole(rng, 1, 2))
        labels = found | {name: [] for name in absent}
    worded = {plural(n) if len(points) != 1 and rng.random() < 0.7 else n: points for n, points in labels.items()}
    return LabelledScene(Image.fromarray(rgb), worded, many)


def _labels_of_shapes(rng: np.random.Generator, found: dict[str, Points]) -> dict[str, Points]:
    """By colour and form, by form, by colour; and absent ones, such as a present form in another present colour."""
    labels: dict[str, Points] = dict(found)
    colours, shapes = (sorted({name.split(" ", 1)[word] for name in found}) for word in (0, 1))
    for shape in shapes:
        if rng.random() < 0.5:
            labels[shape] = [p for name, points in found.items() if name.endswith(f" {shape}") for p in points]
    for colour in colours:
        if rng.random() < 0.5:
            labels[f"{colour} shape"] = [p for name, points in found.items() if name.startswith(colour) for p in points]
    near_misses = [f"{c} {s}" for c in colours for s in shapes if f"{c} {s}" not in found]
    other_shapes = [s for s in SHAPES if s not in shapes]
    other_colours = [f"{c} shape" for c in COLOURS if c not in colours]
    absent = [*some(rng, near_misses, 1), pick(rng, other_shapes), *some(rng, other_colours, 1)]
    return labels | {name: [] for name in some(rng, absent, 2)}


# --- shapes -------------------------------------------------------------------------------------------------------


def _ring(corners: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """Corners around the middle, from straight up; every other one at `inner` of the radius."""
    steps = corners * (1 if inner == 1.0 else 2)
    radii = [1.0 if i % 2 == 0 else inner for i in range(steps)]
    angles = [2 * math.pi * i / steps for i in range(steps)]
    return [(0.5 + r * math.sin(a) / 2, 0.5 - r * math.cos(a) / 2) for r, a in zip(radii, angles, strict=True)]


def _heart() -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / 60 for i in range(60)]
    tall = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
    return [(0.5 + 16 * math.sin(a) ** 3 / 34, 0.44 - y / 34) for a, y in zip(angles, tall, strict=True)]


Paint = Callable[[ImageDraw.ImageDraw, float], None]


def _polygon(points: list[tuple[float, float]]) -> Paint:
    return lambda draw, side: draw.polygon([(x * side, y * side) for x, y in points], fill=255)


def _ellipses(*boxes: tuple[float, float, float, float, int]) -> Paint:
    """Each with its fill value: 0 cuts out."""

    def paint(draw: ImageDraw.ImageDraw, side: float) -> None:
        for x0, y0, x1, y1, value in boxes:
            draw.ellipse((x0 * side, y0 * side, x1 * side, y1 * side), fill=value)

    return paint


_CROSS_X = (0.33, 0.67, 0.67, 1.0, 1.0, 0.67, 0.67, 0.33, 0.33, 0.0, 0.0, 0.33)
_CROSS = list(zip(_CROSS_X, (*_CROSS_X[9:], *_CROSS_X[:9]), strict=True))
SHAPES: dict[str, Paint] = {
    "circle": _ellipses((0.02, 0.02, 0.98, 0.98, 255)),
    "oval": _ellipses((0.0, 0.24, 1.0, 0.76, 255)),
    "ring": _ellipses((0.02, 0.02, 0.98, 0.98, 255), (0.26, 0.26, 0.74, 0.74, 0)),
    "crescent": _ellipses((0.02, 0.02, 0.98, 0.98, 255), (0.3, -0.1, 1.3, 0.9, 0)),
    "cloud": _ellipses((0.0, 0.45, 0.5, 0.85, 255), (0.2, 0.2, 0.7, 0.8, 255), (0.5, 0.4, 1.0, 0.85, 255)),
    "square": _polygon([(0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92)]),
    "rectangle": _polygon([(0.0, 0.27), (1.0, 0.27), (1.0, 0.73), (0.0, 0.73)]),
    "triangle": _polygon([(0.5, 0.05), (1.0, 0.92), (0.0, 0.92)]),
    "diamond": _polygon([(0.5, 0.0), (0.82, 0.5), (0.5, 1.0), (0.18, 0.5)]),
    "pentagon": _polygon(_ring(5)),
    "hexagon": _polygon(_ring(6)),
    "star": _polygon(_ring(5, 0.4)),
    "cross": _polygon(_CROSS),
    "arrow": _polygon([(0, 0.35), (0.55, 0.35), (0.55, 0.12), (1, 0.5), (0.55, 0.88), (0.55, 0.65), (0, 0.65)]),
    "heart": _polygon(_heart()),
}


@lru_cache(maxsize=1)
def shape_assets() -> Assets:
    """Every shape in every colour as a sprite, such as "red star"."""
    names = {f"{colour} {shape}": (colour, shape) for shape in SHAPES for colour in COLOURS}
    sprites = {name: (draw_shape(*parts),) for name, parts in names.items()}
    return Assets(sprites, flat={name: COLOURS[colour] for name, (colour, _) in names.items()})


def draw_shape(colour: str, shape: str) -> Image.Image:
    """RGBA, cropped, with smooth edges, in one colour of COLOURS."""
    mask = Image.new("L", (_SIDE * 3, _SIDE * 3))
    SHAPES[shape](ImageDraw.Draw(mask), _SIDE * 3 - 1)
    mask = mask.reduce(3)
    picture = Image.new("RGBA", mask.size, COLOURS[colour])
    picture.putalpha(mask)
    return picture.crop(mask.getbbox())


# --- rows ---------------------------------------------------------------------------------------------------------


def point_rows(scene: LabelledScene) -> list[dict[str, Any]]:
    """A row for each label, as in allenai/pixmo-points: points in percent."""
    method = "counting" if scene.many else "pointing"
    return [
        {
            "points": [{"x": x, "y": y} for x, y in points],
            "count": len(points),
            "label": label,
            "collection_method": method,
        }
        for label, points in scene.points.items()
    ]


def count_row(rng: np.random.Generator, scene: LabelledScene) -> dict[str, Any]:
    """A row for one label, mostly the most frequent, as in allenai/pixmo-count: points in pixels, x and y apart."""
    present = sorted((label for label, points in scene.points.items() if points), key=lambda n: -len(scene.points[n]))
    absent = [label for label, points in scene.points.items() if not points]
    label = present[0] if rng.random() < 0.6 else pick(rng, present)
    if absent and rng.random() < 0.08:
        label = pick(rng, absent)
    points = scene.points[label]
    width, height = scene.image.size
    return {
        "count": len(points),
        "points": {
            "x": [round(x * width / 100, 2) for x, _ in points],
            "y": [round(y * height / 100, 2) for _, y in points],
        },
        "label": label,
    }
