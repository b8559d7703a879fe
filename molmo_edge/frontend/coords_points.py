"""Points of Molmo2: `<points coords="1 1 500 250 2 600 300">cups</points>` and `<tracks coords="...">`.

A tag holds groups `FRAME ID X Y ID X Y`, separated by a tab, colon, comma or semicolon. FRAME is the number of an
image, from 1, or a time in seconds; ID counts from 1 through the answer, and names an object in tracks; X and Y are
thousandths of width and height with three or four digits. Source: `olmo/preprocessing/point_formatter.py` of
allenai/molmo2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

Mode = Literal["point", "point_then_count", "count_then_point"]

# The patterns of the reference, split up so that any text takes linear time.
_TAG = re.compile(r"<(?:points|tracks)")
_COORDS = re.compile(r' coords="([0-9\t:;, .]+)"/?>')
_GROUP = re.compile(r"(?:^|\t|:|,|;)([0-9.]+) ([0-9. ]+)")
_DIGITS = re.compile(r"[0-9]+")
_XY = re.compile(r" ([0-9]{3,4}) ([0-9]{3,4})")


class CoordsPoint(NamedTuple):
    """One point of a `coords` tag."""

    frame: str  # as written: the number of an image from 1, or seconds
    id: str  # as written
    x: int  # thousandths of the width, 0 to 1000
    y: int  # thousandths of the height, 0 to 1000


class CoordsTag(NamedTuple):
    """One `<points ... coords="...">` or `<tracks ...>` tag, without its label."""

    start: int  # position of "<" in the text
    end: int  # position after ">"
    points: list[CoordsPoint]


class CoordsScanner:
    """Finds `coords` tags in text that arrives in parts. An attribute `coords` may not be split between parts."""

    def __init__(self) -> None:
        self.inside = False  # after "<points" or "<tracks", in the same line, without `coords` yet

    def scan(self, part: str) -> Iterator[CoordsTag]:
        """The tags that end in `part`; their positions are those in `part`."""
        position = start = 0
        coords = _COORDS.search(part)
        while True:
            if not self.inside:
                tag = _TAG.search(part, position)
                if tag is None:
                    return
                self.inside, start, position = True, tag.start(), tag.end()
            if coords is not None and coords.start() < position:
                coords = _COORDS.search(part, position)
            line_end = part.find("\n", position)  # a tag does not cross a line break
            if coords is not None and (line_end < 0 or coords.start() < line_end):
                self.inside, position = False, coords.end()
                yield CoordsTag(start, position, list(_points(coords[1])))
            elif line_end >= 0:
                self.inside, position = False, line_end + 1
            else:
                return


def find_coords(text: str) -> Iterator[CoordsTag]:
    """The tags in `text` that the reference reads, with their points inside the image."""
    return CoordsScanner().scan(text)


def _points(coords: str) -> Iterator[CoordsPoint]:
    for group in _GROUP.finditer(coords):
        frame, numbers = group.groups()
        position = 0
        while digits := _DIGITS.search(numbers, position):
            position = digits.end()
            if xy := _XY.match(numbers, position):
                position = xy.end()
                x, y = int(xy[1]), int(xy[2])
                if x <= 1000 and y <= 1000:
                    yield CoordsPoint(frame, digits[0], x, y)


def extract_image_points(
    text: str, width: float | Sequence[float], height: float | Sequence[float]
) -> list[tuple[float, str, float, float]]:
    """Points as (frame, id, x, y) with x and y in pixels, exactly as the reference's reader returns them.

    `width` and `height` are those of all frames, or one of each image. As in the reference, ValueError is raised for a
    frame that is not a number, and with several sizes for one that is not an integer; IndexError for one too high.
    """
    found: list[tuple[float, str, float, float]] = []
    for tag in find_coords(text):
        for frame, name, x, y in tag.points:
            number: float
            if isinstance(width, Sequence) and isinstance(height, Sequence):
                number = int(frame)
                w, h = width[int(number) - 1], height[int(number) - 1]
            else:
                assert not isinstance(width, Sequence)
                assert not isinstance(height, Sequence)
                number, w, h = float(frame), width, height
            found.append((number, name, float(x) / 1000 * w, float(y) / 1000 * h))
    return found


class Track(NamedTuple):
    """The objects at one time of a video."""

    time: float  # seconds
    frame: int  # time * fps, rounded
    points: dict[str, tuple[float, float]]  # id -> (x, y) in pixels


def extract_tracks(text: str, width: float, height: float, fps: float) -> list[Track]:
    """Points by time, sorted, as the reference's reader returns them.

    If an object has two points at the same time, the first is kept.
    """
    moments: dict[float, dict[str, tuple[float, float]]] = {}
    for time, name, x, y in extract_image_points(text, width, height):
        moments.setdefault(time, {}).setdefault(name, (x, y))
    return [Track(time, round(time * fps), moments[time]) for time in sorted(moments)]


def format_coords(
    frames: Mapping[str, Sequence[tuple[float, float]]],
    label: str,
    *,
    alt: str | None = None,
    mode: Mode = "point",
    separator: str = ";",
) -> str:
    """Format points as in Molmo2's training data.

    `frames`: of each image ("1", "2", ...) or time ("0.5"), points as fractions of width and height, 0 to 1. They are
    sorted by x, then y, after rounding. `separator` is ";" in the format of the released models, a tab in the format of
    pre-training ("html-v1").
    """
    count = sum(map(len, frames.values()))
    if not count:
        return "There are none."
    groups, number = [], 1
    for frame, points in frames.items():
        thousandths = sorted((round(1000 * x), round(1000 * y)) for x, y in points)
        groups.append(f"{frame} " + " ".join(f"{i} {x:03d} {y:03d}" for i, (x, y) in enumerate(thousandths, number)))
        number += len(points)
    tag = _tag("points", separator.join(groups), label, alt)
    if mode == "point_then_count":
        return f"Counting the {tag} shows a total of {count}."
    return f"There are {count} {tag}." if mode == "count_then_point" else tag


def format_tracks(
    moments: Mapping[float, Mapping[str, tuple[float, float]]],
    label: str,
    *,
    alt: str | None = None,
    separator: str = ";",
) -> str:
    """Format tracks as in Molmo2's training data. `moments`: by time in seconds, (x, y) from 0 to 1 of visible objects.

    Objects are numbered in the order of their first point, those of one moment by x, then y.
    """
    numbers: dict[str, int] = {}
    groups = []
    for time in sorted(moments):
        points = sorted(((round(1000 * x), round(1000 * y)), name) for name, (x, y) in moments[time].items())
        for _, name in points:
            numbers.setdefault(name, len(numbers) + 1)
        ordered = sorted((numbers[name], *xy) for xy, name in points)
        if ordered:
            groups.append(f"{time:0.1f} " + " ".join(f"{i} {x:03d} {y:03d}" for i, x, y in ordered))
    return _tag("tracks", separator.join(groups), label, alt) if groups else "No tracks available."


def _tag(name: str, coords: str, label: str, alt: str | None) -> str:
    attribute = "" if alt is None else f' alt="{alt}"'
    return f'<{name}{attribute} coords="{coords}">{label}</{name}>'
