"""Parse Molmo's points from text, also while it streams, and format them.

Molmo v1 has four notations for points (reference: olmo/util.py::extract_points). Coordinates are percent of the
image's width and height:

    <point x="10.5" y="20.0" alt="cup">cup</point>      <points x1="1.0" y1="2.0" x2=... alt="cups">cups</points>
    Click(10.5, 20.0)                                   (10.5, 20.0)
    <point p=105,200 alt="cup">cup</point>              1=105,200 2=...        tenths of a percent

Molmo2 writes `<points coords="1 1 105 200 2 ...">cups</points>`, see coords_points.py.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from molmo_edge.frontend.coords_points import CoordsPoint, CoordsReader, find_coords
from molmo_edge.frontend.totals import format_total

NONE = "There are none."  # Molmo's answer if the requested object is not in the image


@dataclass(frozen=True)
class Point:
    """A point in an image, in percent of its width and height from the top left."""

    x: float  # 0 to 100
    y: float  # 0 to 100
    label: str = ""
    image: int | None = None  # number of the image in the prompt, from 1, where the model names it (Molmo2)
    time: float | None = None  # seconds from the start of a video, where the model names it (Molmo2)

    def pixel(self, width: float, height: float) -> tuple[float, float]:
        """(x, y) in pixels of an image of width x height."""
        return self.x / 100.0 * width, self.y / 100.0 * height

    def __repr__(self) -> str:
        """Without image and time where the model names none."""
        more = [f"{name}={value!r}" for name in ("image", "time") if (value := getattr(self, name)) is not None]
        return f"Point({', '.join([f'x={self.x!r}', f'y={self.y!r}', f'label={self.label!r}', *more])})"


# The reference's patterns, except that an id before `=` matches only its last digit. The matches are the same, but
# `\d+` would take quadratic time for a long row of digits.
_CLICK = re.compile(r"Click\(([0-9]+\.[0-9]), ?([0-9]+\.[0-9])\)")
_PAIR = re.compile(r"\(([0-9]+\.[0-9]),? ?([0-9]+\.[0-9])\)")
_ATTRIBUTES = re.compile(r'x\d*="\s*([0-9]+(?:\.[0-9]+)?)"\s+y\d*="\s*([0-9]+(?:\.[0-9]+)?)"')
_TENTHS = re.compile(r"[\dp]\s*=\s*([0-9]{3})\s*,\s*([0-9]{3})")

_TAGS = ("<point", "<tracks")  # the first of <points, too
_ALT = re.compile(r'\balt="([^"]*)"')
# A label may contain quotes and ">"; the tag ends with `">`, whose quote is a closing one: not preceded by "=".
_INNER = re.compile(r'(?<!=)"\s*>(.*)', re.DOTALL)


def parse_points(text: str, *, video: bool = False) -> list[Point]:
    """All points in `text` in order, with the labels of their tags. Points above 100 percent are dropped.

    Finds the same points as the reference, but each only once: the reference finds Click(...) twice, because its
    pattern for plain pairs matches inside, too. Takes linear time, even for adversarial text.

    `video`: the answer is about a video, so that a whole number before points is a time, too ("2" for "2.0").
    """
    found = [
        (at, Point(x, y), False) for pattern in (_PAIR, _ATTRIBUTES, _TENTHS) for at, x, y in _matches(pattern, text)
    ]
    for tag in find_coords(text):
        found += [(tag.end - 1, _coords_point(point, video), True) for point in tag.points]
    points: list[Point] = []
    part, end, labels = "", 0, ("", "")
    for at, point, in_coords in sorted(found, key=lambda entry: entry[0]):
        if at >= end:  # a tag and its label end at the next "<"
            end = text.find("<", at + 1)
            end = len(text) if end < 0 else end
            part = text[max(text.rfind("<", 0, at + 1), 0) : end]
            labels = _label(part) if part.startswith(_TAGS) else "", _label(part)
        points.append(replace(point, label=labels[in_coords]))
    return points


def extract_points(text: str, width: float, height: float) -> list[tuple[float, float]]:
    """The points in `text` as (x, y) in pixels, exactly as the reference's function of this name returns them.

    They are sorted by notation rather than by their order in the text, and Click(...) points occur twice. Use this
    function to compare scores with published ones, and `parse_points` for everything else.
    """
    found = [xy for pattern in (_CLICK, _PAIR, _ATTRIBUTES, _TENTHS) for _, *xy in _matches(pattern, text)]
    return [Point(x, y).pixel(width, height) for x, y in found]


class StreamParser:
    """Finds points in text that arrives in pieces: each as soon as its numbers are certain, before its tag closes.

    In a tag with `coords="..."` that is when Y has four digits, or when another character follows three; in all other
    notations it is the last character of the point. A point comes before the label of its tag, so its `label` is
    empty: `parse_points` of the whole text has the labels.

    The points that `feed` returns, and their order, are those of `parse_points` of the joined pieces, except for their
    labels and for one case: the reference reads a `coords` tag only if it ends with `">` or `"/>` directly after its
    numbers. If the text is cut off before, or goes on in another way, `feed` has already returned points that
    `parse_points` does not count. `video`: see `parse_points`.
    """

    def __init__(self, *, video: bool = False) -> None:
        self._video = video
        self._finders = [_Finder(*patterns) for patterns in _STREAMED]
        self._coords = CoordsReader()

    def feed(self, piece: str) -> list[Point]:
        """Add a piece of text; return the points that it completes."""
        found = [(at, Point(x, y)) for finder in self._finders for at, x, y in finder.feed(piece)]
        for at, read in self._coords.feed(piece):
            if isinstance(read, CoordsPoint):
                found.append((at, _coords_point(read, self._video)))
        return [point for _, point in sorted(found, key=lambda pair: pair[0])]

    def close(self) -> list[Point]:
        """End the text. Returns an empty list: the end of a text completes no point."""
        return []


# For each notation but coords: its pattern; the characters that may end a match; what a text ends with if a match may
# have begun. A match has one "(", one "x" and four quotes, or one "=" and six digits, so that a character is searched
# at most six times, however small the pieces are.
_STREAMED = (
    (_PAIR, re.compile(r"\)"), re.compile(r"\([^()]*\Z")),
    (_ATTRIBUTES, re.compile('"'), re.compile(r'x[^x"]*(?:"[^x"]*){0,3}\Z')),
    (
        _TENTHS,
        re.compile("[0-9]"),
        re.compile(r"[\dp]\s*(?:=\s*(?:[0-9]{1,3}\s*(?:,\s*[0-9]{0,2})?)?)?\Z"),
    ),
)


class _Finder:
    """Finds the matches of one pattern, which do not depend on what follows them, in text that arrives in pieces."""

    def __init__(self, pattern: re.Pattern[str], last: re.Pattern[str], begun: re.Pattern[str]) -> None:
        self._pattern, self._last, self._begun = pattern, last, begun
        self._pending: list[str] = []  # text that may be the beginning of a match, and its position
        self._at = 0

    def feed(self, piece: str) -> list[tuple[int, float, float]]:
        """(position in the text, x, y) of the valid points that `piece` completes."""
        self._pending.append(piece)
        if not self._last.search(piece):
            return []
        text, end = "".join(self._pending), 0
        found = []
        for match in self._pattern.finditer(text):
            found += [(self._at + at, x, y) for at, x, y in _valid(self._pattern, match)]
            end = match.end()
        begun = self._begun.search(text, end)
        rest = begun.start() if begun else len(text)
        self._pending, self._at = [text[rest:]], self._at + rest
        return found


def _coords_point(point: CoordsPoint, video: bool) -> Point:
    x, y = point.x / 10, point.y / 10
    try:
        if "." in point.frame or video:
            time = float(point.frame)
            return Point(x, y, time=time) if math.isfinite(time) else Point(x, y)
        return Point(x, y, image=int(point.frame))
    except ValueError:  # "1.5.2", or thousands of digits: the reference raises here
        return Point(x, y)


def _matches(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, float, float]]:
    """(position, x, y) of the valid points that match `pattern`."""
    for match in pattern.finditer(text):
        yield from _valid(pattern, match)


def _valid(pattern: re.Pattern[str], match: re.Match[str]) -> Iterator[tuple[int, float, float]]:
    unit = 10.0 if pattern is _TENTHS else 1.0
    x, y = (float(match.group(i)) / unit for i in (1, 2))
    if max(x, y) <= 100:
        yield match.start(), x, y


def _label(tag: str) -> str:
    """The label of `<point ...>label`: its text, or its alt attribute if the text is empty."""
    inner = _INNER.search(tag)
    if inner and inner.group(1).strip():
        return html.unescape(inner.group(1).strip())
    alt = _ALT.search(tag)
    return html.unescape(alt.group(1).strip()) if alt else ""


def format_points(points: Sequence[Point | tuple[float, float]], label: str, *, alt: str | None = None) -> str:
    """Format `points` (percent) as in Molmo's training data: one decimal, sorted left to right, then top to bottom.

    `alt` defaults to `label`. Nothing is escaped, as in the training data. Without points the result is "There are
    none." Reference: olmo/data/data_formatter.py::points_to_text.
    """
    if not points:
        return NONE
    pairs = [(p.x, p.y) if isinstance(p, Point) else (p[0], p[1]) for p in points]
    # numpy's rounding as in the reference: Python's differs where a half is not exact, for example 0.15.
    # Adding 0 turns -0 into 0: no pattern matches a sign.
    rounded = [(float(x), float(y)) for x, y in np.round(np.array(pairs, np.float64), 1) + 0.0]
    rounded.sort(key=lambda xy: xy[0] * 10000 + xy[1])
    alt = label if alt is None else alt
    if len(rounded) == 1:
        ((x, y),) = rounded
        return f'<point x="{x:.1f}" y="{y:.1f}" alt="{alt}">{label}</point>'
    attributes = " ".join(f'x{i}="{x:.1f}" y{i}="{y:.1f}"' for i, (x, y) in enumerate(rounded, start=1))
    return f'<points {attributes} alt="{alt}">{label}</points>'


def format_absent(label: str) -> str:
    """A tag without points: how a model that points by grounding tokens may answer that an object is absent.

    It is used in training data only: the SDK shows such an answer as text, see `written_absent`.
    """
    return f'<points alt="{label}">{label}</points>'


def written_absent(label: str, *, alone: bool) -> str:
    """The text of a tag without points: NONE, or the label alone if the tag is part of a sentence."""
    return NONE if alone else label


def format_count(points: Sequence[Point | tuple[float, float]], label: str) -> str:
    """Format the answer to "How many ... are there?": the points, then their number."""
    if not points:
        return NONE
    return format_total(format_points(points, label), len(points))


# fmt: off
_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)
# fmt: on
_NUMBERS = {word: number for number, word in enumerate(_WORDS)}


def parse_count(text: str) -> int | None:
    """The count that an answer states; None if it states no count.

    Its last word as a number or a number word (up to twenty), else the N of "a total of N", else 0 for an answer with
    the word "none". Reference: olmo/eval/evaluators.py::PointCountEval, which never finds "none" (its \\b is a
    backspace) and scores "There are none." as no answer; here it is 0.
    """
    words = text.lower().rstrip().rstrip(".").split()
    if words:
        if re.fullmatch(r"[0-9]{1,9}", words[-1]):
            return int(words[-1])
        if words[-1] in _NUMBERS:
            return _NUMBERS[words[-1]]
    totals = re.findall(r"a total of ([0-9]{1,9})(?![0-9])", text.lower())
    if totals:
        return int(totals[-1])
    return 0 if re.search(r"\bnone\b", text.lower()) else None
