"""What is drawn on a picture for its points: markers, numbers and labels, with their sizes, colours and places.

drawing.py paints an Annotation in pixels, svg.py writes it as vectors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.points import Point
from molmo_edge.sdk import lettering
from molmo_edge.sdk.lettering import Line
from molmo_edge.sdk.placement import Box, Request, place

LABELS = ("once", "each", "none")
# One colour per label, in order of appearance. White letters have a contrast of at least 4.5 on each.
COLOURS = (
    (222, 35, 103),
    (0, 110, 200),
    (0, 128, 84),
    (184, 78, 0),
    (117, 76, 192),
    (30, 30, 30),
    (0, 117, 133),
    (176, 36, 36),
    (139, 44, 139),
    (104, 93, 28),
)
_BASE = 0.018  # radius of a marker relative to the geometric mean of the picture's sides
_LEAST = 8.0  # pixels, radius of a marker whose number is readable
_LEAST_LETTERS = 7.0  # pixels; smaller letters are not drawn
_WIDEST = 22  # a label's width relative to the size of its letters
_FULL = 0.5  # share of the picture that numbered markers may cover

Colour = tuple[int, int, int]


class DrawingError(MolmoEdgeError):
    """An option of drawing that does not exist."""


@dataclass(frozen=True)
class DrawOptions:
    """How points are drawn.

    `labels`: "once" writes each label beside one of its points, "each" beside every point, "none" nowhere. `numbers`:
    None numbers the points if there are several and the picture has room for readable numbers. `size`: factor on the
    sizes of markers and letters. Raises DrawingError.
    """

    labels: str = "once"
    numbers: bool | None = None
    size: float = 1.0

    def __post_init__(self) -> None:
        if self.labels not in LABELS:
            raise DrawingError(f"labels must be one of {', '.join(LABELS)}, not {self.labels!r}")
        if self.numbers not in (None, True, False):
            raise DrawingError(f"numbers must be True, False or None, not {self.numbers!r}")
        if not isinstance(self.size, (int, float)) or not 0.1 <= self.size <= 10:
            raise DrawingError(f"size must be a number from 0.1 to 10, not {self.size!r}")


@dataclass(frozen=True)
class Marker:
    """A disc whose centre is the point. Without `text` it has a white dot in its centre."""

    x: float  # pixels
    y: float
    radius: float
    colour: Colour
    text: str
    point: Point
    number: int  # of the point in the answer, from 1


@dataclass(frozen=True)
class Plate:
    """A label, or the number of a point whose marker has no room for it, on a coloured plate."""

    box: Box
    rounding: float  # radius of its corners
    line: Line
    letters: float  # size in pixels
    colour: Colour
    anchor: tuple[float, float]  # the point that it belongs to
    leader: bool  # whether a line connects the two
    text: str  # in full


@dataclass(frozen=True)
class Annotation:
    """Everything that is drawn on a picture of `width` x `height` pixels."""

    width: int
    height: int
    radius: float  # the unit of line widths
    markers: tuple[Marker, ...]
    plates: tuple[Plate, ...]


def annotate(
    width: int,
    height: int,
    numbered: Sequence[tuple[int, Point]],
    points: Sequence[Point],
    options: DrawOptions | None = None,
) -> Annotation:
    """Lay out the points of one picture of width x height pixels.

    Args:
        width: Of the picture.
        height: Of the picture.
        numbered: The points in this picture, with their numbers in the answer. Points outside of it are left out.
        points: All points of the answer, so that a label has the same colour in every picture.
        options: Defaults: DrawOptions().
    """
    options = options or DrawOptions()
    labels = list(dict.fromkeys(point.label for point in points))
    colours = {label: COLOURS[at % len(COLOURS)] for at, label in enumerate(labels)}
    shown = [(number, point) for number, point in numbered if 0 <= point.x <= 100 and 0 <= point.y <= 100]
    places = np.array([point.pixel(width, height) for _, point in shown]).reshape(-1, 2)
    places = np.minimum(places, (width - 1, height - 1))
    base = min(options.size * max(_LEAST, _BASE * math.sqrt(width * height)), max(2.0, min(width, height) / 4))
    digits = max((len(str(number)) for number, _ in shown), default=1)
    radius, with_numbers = _radius(base, places, width * height, digits, options)
    if with_numbers is None:
        with_numbers = len(points) > 1
    moved = _without_room(places, radius, width, height) if with_numbers else np.zeros(len(shown), bool)
    markers, requests, drafts = [], [], []
    lay_out = functools.cache(lettering.line)  # many labels are equal
    for at, (number, point) in enumerate(shown):
        x, y = map(float, places[at])
        colour = colours[point.label]
        text = str(number) if with_numbers and not moved[at] else ""
        own = 0.5 * radius if moved[at] else radius
        markers.append(Marker(x, y, own, colour, text, point, number))
        if moved[at]:
            letters = number_size(radius, digits)
            line = lay_out(str(number), letters)
            side = max(2 * radius, line.box[2] - line.box[0] + radius)
            requests.append(Request(side, 2 * radius, ((x, y),), 0.8 * radius))
            drafts.append((line, letters, colour, True, str(number)))
    for label, anchors in _labelled(shown, places, options.labels):
        letters = min(1.3 * base, height / 3)
        pad = max(2.0, 0.35 * letters)
        if letters < _LEAST_LETTERS or width < 4 * letters:
            continue
        line = lay_out(label, letters, min(_WIDEST * letters, width - 2 * pad - 2))
        left, top, right, bottom = line.box
        if right > left:
            wide, high = right - left + 2 * pad, max(bottom - top, 0.72 * letters) + 1.6 * pad
            requests.append(Request(wide, high, anchors, radius + max(2.0, 0.3 * radius)))
            drafts.append((line, letters, colours[label], False, label))
    discs = np.array([(marker.x, marker.y, 1.1 * marker.radius) for marker in markers]).reshape(-1, 3)
    placed = place(requests, discs, (width, height), spacing=max(2.0, 0.25 * radius))
    plates = []
    for draft, request, found in zip(drafts, requests, placed, strict=True):
        line, letters, colour, always, text = draft
        far = math.dist(found.box.nearest(*found.anchor), found.anchor) > 1.8 * request.gap
        rounding = request.height / 2 if always else 0.3 * request.height
        plates.append(Plate(found.box, rounding, line, letters, colour, found.anchor, always or far, text))
    return Annotation(width, height, base, tuple(markers), tuple(plates))


def number_size(radius: float, digits: int) -> float:
    """The size of the digits in a marker, in pixels."""
    return (1.25 if digits == 1 else 2.1 / digits) * radius


def _labelled(
    shown: Sequence[tuple[int, Point]], places: np.ndarray, labels: str
) -> list[tuple[str, tuple[tuple[float, float], ...]]]:
    """The labels to write, each with the places of the points that it may be written beside."""
    each = [(point.label, (float(x), float(y))) for (_, point), (x, y) in zip(shown, places, strict=True)]
    each = [(label, at) for label, at in each if label.strip()]
    if labels == "each":
        return [(label, (at,)) for label, at in each]
    if labels == "none":
        return []
    grouped: dict[str, list[tuple[float, float]]] = {}
    for label, at in each:
        grouped.setdefault(label, []).append(at)
    return [(label, tuple(found)) for label, found in grouped.items()]


def _radius(base: float, places: np.ndarray, area: int, digits: int, options: DrawOptions) -> tuple[float, bool | None]:
    """The radius of the markers, smaller among many, and whether they are numbered; None: no objection."""
    if len(places) < 2:
        return base, options.numbers
    most = base * (1.25 if digits > 2 else 1)
    apart = _apart(places)
    radius = min(most, max(_LEAST * (1.25 if digits > 2 else 0.9), 0.55 * most, 0.45 * apart))
    if options.numbers or (options.numbers is None and len(places) * math.pi * radius**2 < _FULL * area):
        return radius, options.numbers
    return min(base, max(2.5, 0.45 * apart)), False


def _apart(places: np.ndarray) -> float:
    """The distance from a point to its nearest neighbour that 60 percent of the points exceed."""
    sample = places[:: max(1, len(places) // 1000)]
    nearest = []
    for at in range(0, len(sample), 256):
        part = sample[at : at + 256]
        distance = np.hypot(*np.moveaxis(part[:, None] - places[None], -1, 0))
        nearest.append(np.sort(distance, axis=1)[:, 1])  # the first is the point itself
    return float(np.quantile(np.concatenate(nearest), 0.4))


def _without_room(places: np.ndarray, radius: float, width: int, height: int) -> np.ndarray:
    """Which markers cannot hold their number: half covered by an earlier one, or cut by the border."""
    moved = np.zeros(len(places), bool)
    kept = np.empty((0, 2))
    for at, place_ in enumerate(places):
        x, y = place_
        margin = min(0.75 * radius, (min(width, height) - 1) / 2)
        cut = not (margin <= x <= width - 1 - margin and margin <= y <= height - 1 - margin)
        moved[at] = cut or (len(kept) > 0 and np.hypot(*(kept - place_).T).min() < 1.3 * radius)
        if not moved[at]:
            kept = np.concatenate([kept, [place_]])
    return moved
