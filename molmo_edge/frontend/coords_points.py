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

from molmo_edge.frontend.totals import format_total

Mode = Literal["point", "point_then_count", "count_then_point"]

_TAG = re.compile(r"<(?:points|tracks)")
_NEXT = re.compile(r'\n| coords="')  # a tag does not cross a line break
_COORDS = re.compile(r"[0-9\t:;, .]*")
_SEPARATORS = "\t:;,"


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


class CoordsReader:
    """Reads `coords` tags in text that arrives in pieces, in linear time.

    The results are those of the reference's patterns: `<(?:points|tracks).*? coords="([0-9\\t:;, .]+)"/?>` for a tag,
    `(?:^|\\t|:|,|;)([0-9.]+) ([0-9. ]+)` for a group, `([0-9]+) ([0-9]{3,4}) ([0-9]{3,4})` for a point.
    """

    def __init__(self) -> None:
        self._rest, self._at = "", 0  # text that is not read yet, and its position
        self._start: int | None = None  # of a tag that is open
        self._groups: _Groups | None = None  # of its attribute
        self._quoted = False  # the attribute has ended; the tag has to end, too

    def feed(self, piece: str) -> Iterator[tuple[int, CoordsPoint | CoordsTag]]:
        """Add a piece of text; return what it completes, with positions in the text in ascending order.

        A point, inside the image, comes when its numbers are certain; its tag comes when it ends. If it does not end
        with `">` or `"/>` after its attribute, no tag comes, and its points do not count.
        """
        text, at = self._rest + piece, 0
        while True:
            if self._start is None:
                tag = _TAG.search(text, at)
                if tag is None:
                    at = max(at, len(text) - len("<points") + 1)
                    break
                self._start, at = self._at + tag.start(), tag.end()
            elif self._groups is None:
                found = _NEXT.search(text, at)
                if found is None:
                    at = max(at, len(text) - len(' coords="') + 1)
                    break
                at = found.end()
                if found[0] == "\n":
                    self._start = None
                else:
                    self._groups = _Groups()
            elif self._quoted:
                end = text[at : at + 2]
                if end in ("", "/"):
                    break
                if end[0] == ">" or end == "/>":
                    at += end.index(">") + 1
                    yield self._at + at, CoordsTag(self._start, self._at + at, self._groups.points)
                    self._start = None
                self._groups, self._quoted = None, False
            else:
                match = _COORDS.match(text, at)
                assert match is not None
                for point in self._groups.feed(match[0]):
                    yield self._at + at, point
                at = match.end()
                if at == len(text):
                    break
                if text[at] == '"' and self._groups.last:
                    for point in self._groups.close():
                        yield self._at + at, point
                    self._quoted, at = True, at + 1
                    continue
                if self._groups.last == " " and at:  # it may begin another ` coords="`
                    at -= 1
                elif self._groups.last == " ":
                    text, self._at = " " + text, self._at - 1
                self._groups = None
        self._rest, self._at = text[at:], self._at + at


class _Groups:
    """The groups of a `coords` attribute, whose characters arrive in pieces."""

    def __init__(self) -> None:
        self.points: list[CoordsPoint] = []
        self.last = ""  # character
        self._letters: list[str] | None = []  # of the frame; None: no group until the next separator
        self._frame = ""
        self._runs: list[list[str]] | None = None  # digits of ID, X and Y after the frame; None: before its space

    def feed(self, characters: str) -> list[CoordsPoint]:
        """Return the points that are certain now: a Y of four digits, or of three and another character."""
        before = len(self.points)
        for character in characters:
            if character in _SEPARATORS:
                self._complete()
                self._letters, self._runs = [], None
            elif self._runs is not None:
                self._number(character, self._runs)
            elif character != " ":
                if self._letters is not None:
                    self._letters.append(character)
            elif self._letters:
                self._frame, self._runs = "".join(self._letters), []
            else:
                self._letters = None
        self.last = characters[-1:] or self.last
        return self.points[before:]

    def close(self) -> list[CoordsPoint]:
        """Return the points that the end of the attribute makes certain."""
        before = len(self.points)
        self._complete()
        return self.points[before:]

    def _number(self, character: str, runs: list[list[str]]) -> None:
        if character.isdigit():
            if not runs:
                runs.append([])
            runs[-1].append(character)
            if len(runs) == 3 and len(runs[2]) == 4:
                self._complete()
            return
        self._complete()
        if character != " " or not runs or not runs[-1]:
            runs.clear()
        elif len(runs) == 2 and len(runs[1]) in (3, 4):
            runs.append([])
        else:  # the last number is no X or no Y, but may be an ID
            runs[:] = [runs[-1], []]

    def _complete(self) -> None:
        """Add a point whose Y has ended."""
        if self._runs is None or len(self._runs) < 3 or len(self._runs[2]) < 3:
            return
        name, x, y = ("".join(run) for run in self._runs)
        self._runs.clear()
        if int(x) <= 1000 and int(y) <= 1000:
            self.points.append(CoordsPoint(self._frame, name, int(x), int(y)))


def find_coords(text: str) -> Iterator[CoordsTag]:
    """The tags in `text` that the reference reads, with their points inside the image."""
    for _, found in CoordsReader().feed(text):
        if isinstance(found, CoordsTag):
            yield found


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
        return format_total(tag, count)
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
