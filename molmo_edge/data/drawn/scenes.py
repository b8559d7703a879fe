"""Scenes of things to point at and to count: sprites that the user has built, or coloured shapes drawn here.

Shapes need no assets: fifteen of them in ten colours are 150 kinds of things, told apart by colour, by form or both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from molmo_edge.data.drawn.backdrops import draw_backdrop
from molmo_edge.data.drawn.sheets import COLOURS, Colour, pick, some, whole
from molmo_edge.data.drawn.sprite_names import overlapping
from molmo_edge.data.drawn.sprites import Assets
from molmo_edge.data.english import plural

Sprites = dict[str, tuple[Image.Image, ...]]  # as load_sprites gives them
Points = list[tuple[float, float]]  # percent of width and height, one decimal

MOST = 40  # things in a scene
_SIDE = 192  # of a drawn shape before it is reduced, pixels
_TRIES = 40  # places tried for a thing before it is left out
_NOTHING = Assets({"": (Image.new("RGBA", (1, 1)),)})  # backdrops then are plain, shaded or noisy: no photographs


@dataclass(frozen=True)
class Scene:
    """A picture, and where everything is."""

    image: Image.Image  # RGB
    points: dict[str, Points]  # label -> one point on each; none: certainly not there
    many: bool  # drawn to be counted


def draw_scene(rng: np.random.Generator, sprites: Sprites | None = None) -> Scene:
    """1 to 40 things on 320 to 800 pixels, none hiding another; a third of the scenes are for counting."""
    size = (whole(rng, 320, 800), whole(rng, 320, 800))
    image = draw_backdrop(rng, _NOTHING, size)[0].convert("RGB")
    many = rng.random() < 0.34
    names = _choose(rng, image, sprites)
    amounts = [whole(rng, 4, 20) if many and i == 0 else whole(rng, 1, 4) for i in range(len(names))]
    wanted = [name for name, amount in zip(names, amounts, strict=True) for _ in range(amount)][:MOST]
    largest = min(0.4, 0.8 / math.sqrt(len(wanted)))
    found: dict[str, Points] = {}
    taken: list[tuple[int, int, int, int]] = []
    for i in rng.permutation(len(wanted)):
        side = max(24, int(min(size) * rng.uniform(0.5, 1.0) * largest))
        thing = _turned(rng, _picture(rng, wanted[i], sprites), side)
        box = _place(rng, size, thing.size, taken)
        if box is not None:
            taken.append(box)
            image.paste(thing, box[:2], thing)
            x, y = _point_on(thing)
            found.setdefault(wanted[i], []).append((_percent(box[0] + x, size[0]), _percent(box[1] + y, size[1])))
    labels = _labels_of_sprites(rng, found, sprites) if sprites else _labels_of_shapes(rng, found)
    spoken = {plural(n) if len(ps) != 1 and rng.random() < 0.7 else n: ps for n, ps in labels.items()}
    return Scene(image, spoken, many)


def _percent(pixel: float, side: int) -> float:
    """Of a pixel's middle."""
    return round((pixel + 0.5) / side * 100, 1)


def _choose(rng: np.random.Generator, image: Image.Image, sprites: Sprites | None) -> list[str]:
    """1 to 6 names, of which none could be called another; shapes stand out from the backdrop."""
    amount = whole(rng, 1, 6)
    if sprites:
        names: list[str] = []
        for name in some(rng, sorted(sprites), len(sprites)):
            if len(names) < amount and not overlapping(name) & set(names):
                names.append(name)
        return names
    ground = np.asarray(image.resize((8, 8), Image.Resampling.BOX), np.float32).reshape(-1, 3)  # [64, 3]
    clear = [n for n, rgb in COLOURS.items() if np.linalg.norm(ground - np.array(rgb), axis=1).min() > 90]
    kinds: dict[str, None] = {}
    shape = pick(rng, list(SHAPES))
    while len(kinds) < amount:
        # The same form in another colour now and then, so that a label needs both of its words.
        shape = shape if rng.random() < 0.3 else pick(rng, list(SHAPES))
        kinds[f"{pick(rng, clear or list(COLOURS))} {shape}"] = None
    return list(kinds)


def _picture(rng: np.random.Generator, name: str, sprites: Sprites | None) -> Image.Image:
    return pick(rng, sprites[name]) if sprites else draw_shape(*name.split(" ", 1))


def _turned(rng: np.random.Generator, picture: Image.Image, side: int) -> Image.Image:
    """RGBA, longest side about `side` pixels. Turned by 12 degrees at most, or a square would be a diamond."""
    if rng.random() < 0.5:
        picture = picture.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BILINEAR, expand=True)
        picture = picture.crop(picture.getchannel("A").point(lambda a: 255 if a > 24 else 0).getbbox())
    scale = side / max(picture.size)
    size = (max(8, round(picture.width * scale)), max(8, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)


def _place(
    rng: np.random.Generator, size: tuple[int, int], thing: tuple[int, int], taken: list[tuple[int, int, int, int]]
) -> tuple[int, int, int, int] | None:
    """A free box with a little room around, or None after _TRIES."""
    for _ in range(_TRIES):
        x, y = whole(rng, 0, size[0] - thing[0]), whole(rng, 0, size[1] - thing[1])
        box = (x, y, x + thing[0], y + thing[1])
        if all(box[0] > o[2] + 3 or o[0] > box[2] + 3 or box[1] > o[3] + 3 or o[1] > box[3] + 3 for o in taken):
            return box
    return None


def _point_on(thing: Image.Image) -> tuple[int, int]:
    """A pixel well inside, near the middle: of a ring or a crescent, the middle is not on it."""
    alpha = np.asarray(thing.getchannel("A")) > 200  # [h, w]
    inside = alpha.copy()  # two pixels from the edge, so that rounding to tenths of a percent stays on the thing
    for shift in (-2, 2):
        for axis in (0, 1):
            inside &= np.roll(alpha, shift, axis)
    ys, xs = np.nonzero(inside if inside.any() else np.asarray(thing.getchannel("A")) > 0)
    nearest = int(np.argmin((ys - thing.height / 2) ** 2 + (xs - thing.width / 2) ** 2))
    return int(xs[nearest]), int(ys[nearest])


# --- labels -------------------------------------------------------------------------------------------------------


def _labels_of_sprites(rng: np.random.Generator, found: dict[str, Points], sprites: Sprites) -> dict[str, Points]:
    """What is there, and one or two names that nothing there could be called."""
    near = set(found).union(*(overlapping(name) for name in found))
    absent = some(rng, [name for name in sorted(sprites) if name not in near], whole(rng, 1, 2))
    return {**found, **{name: [] for name in absent}}


def _labels_of_shapes(rng: np.random.Generator, found: dict[str, Points]) -> dict[str, Points]:
    """By colour and form, by form, by colour; and absent ones, of which the first is nearly there."""
    labels: dict[str, Points] = dict(found)
    for word, end in ((1, "{}"), (0, "{} shape")):
        for key in sorted({name.split(" ", 1)[word] for name in found}):
            points = [p for name, ps in found.items() if name.split(" ", 1)[word] == key for p in ps]
            if rng.random() < 0.5:
                labels[end.format(key)] = points
    colours, shapes = ({name.split(" ", 1)[word] for name in found} for word in (0, 1))
    nearly = [f"{c} {s}" for c in sorted(colours) for s in sorted(shapes) if f"{c} {s}" not in found]
    others = [s for s in SHAPES if s not in shapes]
    nowhere = [f"{c} shape" for c in COLOURS if c not in colours]
    absent = [*some(rng, nearly, 1), pick(rng, others), *some(rng, nowhere, 1)]
    return {**labels, **{name: [] for name in some(rng, absent, 2)}}


# --- shapes -------------------------------------------------------------------------------------------------------


def _ring(corners: int, inner: float = 1.0, turn: float = 0.0) -> list[tuple[float, float]]:
    """Corners around the middle, from straight up; every other one at `inner` of the radius."""
    steps = corners * (1 if inner == 1.0 else 2)
    radii = [1.0 if i % 2 == 0 or inner == 1.0 else inner for i in range(steps)]
    angles = [2 * math.pi * i / steps + turn for i in range(steps)]
    return [(0.5 + r * math.sin(a) / 2, 0.5 - r * math.cos(a) / 2) for r, a in zip(radii, angles, strict=True)]


def _heart() -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / 60 for i in range(60)]
    tall = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
    return [(0.5 + 16 * math.sin(a) ** 3 / 34, 0.44 - y / 34) for a, y in zip(angles, tall, strict=True)]


Paint = Callable[[ImageDraw.ImageDraw, float], None]


def _polygon(points: list[tuple[float, float]]) -> Paint:
    return lambda draw, side: draw.polygon([(x * side, y * side) for x, y in points], fill=255)


def _ellipses(*boxes: tuple[float, float, float, float, int]) -> Paint:
    """Each with the value that it is filled with: 0 cuts out."""

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


@lru_cache(maxsize=256)
def draw_shape(colour: str, shape: str) -> Image.Image:
    """RGBA, cropped, with smooth edges, in one colour of COLOURS."""
    mask = Image.new("L", (_SIDE * 3, _SIDE * 3))
    SHAPES[shape](ImageDraw.Draw(mask), _SIDE * 3 - 1)
    mask = mask.reduce(3)
    rgb: Colour = COLOURS[colour]
    picture = Image.new("RGBA", mask.size, rgb)
    picture.putalpha(mask)
    return picture.crop(mask.getbbox())


# --- rows ---------------------------------------------------------------------------------------------------------


def point_rows(scene: Scene) -> list[dict[str, Any]]:
    """A row a label, as in allenai/pixmo-points: points in percent."""
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


def count_row(rng: np.random.Generator, scene: Scene) -> dict[str, Any]:
    """One label, mostly the most frequent, as in allenai/pixmo-count: points in pixels, x and y apart."""
    there = sorted((label for label, points in scene.points.items() if points), key=lambda n: -len(scene.points[n]))
    absent = [label for label, points in scene.points.items() if not points]
    label = there[0] if rng.random() < 0.6 else pick(rng, there)
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
