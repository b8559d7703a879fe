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
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from molmo_edge.frontend.coords_points import CoordsPoint, CoordsScanner

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

# A point outside of a tag consists of these characters only (a Click(...) contains a pair).
_LAST_OUTSIDE = re.compile(r'.*[^\d\sxyp=",.()]', re.DOTALL)
_OUTSIDE = re.compile(r'[^\d\sxyp=",.()]')

_TAGS = ("<point", "<tracks")  # the first of <points, too
_ALT = re.compile(r'\balt="([^"]*)"')
# A label may contain quotes and ">"; the tag ends with `">`, whose quote is a closing one: not preceded by "=".
_INNER = re.compile(r'(?<!=)"\s*>(.*)', re.DOTALL)


def parse_points(text: str) -> list[Point]:
    """All points in `text` in order, with the labels of their tags. Points above 100 percent are dropped.

    Finds the same points as the reference, but each only once: the reference finds Click(...) twice, because its
    pattern for plain pairs matches inside, too. Takes linear time, even for adversarial text.
    """
    parser = StreamParser()
    return parser.feed(text) + parser.close()


def extract_points(text: str, width: float, height: float) -> list[tuple[float, float]]:
    """The points in `text` as (x, y) in pixels, exactly as the reference's function of this name returns them.

    They are sorted by notation rather than by their order in the text, and Click(...) points occur twice. Use this
    function to compare scores with published ones, and `parse_points` for everything else.
    """
    found = [xy for pattern in (_CLICK, _PAIR, _ATTRIBUTES, _TENTHS) for _, *xy in _matches(pattern, text)]
    return [Point(x, y).pixel(width, height) for x, y in found]


class StreamParser:
    """Parses points from text that arrives in pieces.

    `feed` returns the points that a piece completes: those of a tag when its closing tag begins, because the label
    comes before it; others at the first character that cannot belong to them. `close` returns the remaining points of
    an answer that was cut off. Together they equal `parse_points` of the joined pieces.

    `video`: the answer is about a video, so that a whole number before points is a time, too ("2" for "2.0").
    """

    def __init__(self, *, video: bool = False) -> None:
        self._video = video
        self._pending: list[str] = []  # text that may be the beginning of a point or a tag
        self._in_tag = False
        self._coords = CoordsScanner()

    def feed(self, piece: str) -> list[Point]:
        """Add a piece of text; return the points that it completes."""
        self._pending.append(piece)
        # Most pieces complete nothing; joining the text for each of them would take quadratic time in a long tag.
        if "<" not in piece if self._in_tag else not _OUTSIDE.search(piece):
            return []
        return self._take(final=False)

    def close(self) -> list[Point]:
        """End the text; return the points that it left incomplete."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> list[Point]:
        text = "".join(self._pending)
        points: list[Point] = []
        start = 0
        while start < len(text):
            is_tag = text.startswith(_TAGS, start)
            if not is_tag and not final and any(tag.startswith(text[start : start + len(tag)]) for tag in _TAGS):
                break  # "<poi": undecided
            # A tag and its label end at the next "<".
            end = text.find("<", start + 1)
            if end < 0 and final:
                end = len(text)
            elif end < 0 and not is_tag and not self._coords.inside:
                match = _LAST_OUTSIDE.match(text, start)
                end = match.end() if match else -1
            if end <= start:
                break
            part = text[start:end]
            label = _label(part) if is_tag else ""
            points += self._points(part, label)
            start = end
        rest = text[start:]
        self._pending = [rest]
        self._in_tag = rest.startswith(_TAGS) or self._coords.inside
        return points

    def _points(self, part: str, label: str) -> list[Point]:
        """All points in `part` in order."""
        patterns = (_PAIR, _ATTRIBUTES, _TENTHS)
        found = [(at, Point(x, y, label)) for pattern in patterns for at, x, y in _matches(pattern, part)]
        for tag in self._coords.scan(part):
            found += [(tag.end, _coords_point(point, label or _label(part), self._video)) for point in tag.points]
        return [point for _, point in sorted(found, key=lambda pair: pair[0])]


def _coords_point(point: CoordsPoint, label: str, video: bool) -> Point:
    x, y = point.x / 10, point.y / 10
    if "." not in point.frame and not video:
        return Point(x, y, label, image=int(point.frame))
    try:
        return Point(x, y, label, time=float(point.frame))
    except ValueError:  # "1.5.2": the reference raises here
        return Point(x, y, label)


def _matches(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, float, float]]:
    """(position, x, y) of the valid points that match `pattern`."""
    unit = 10.0 if pattern is _TENTHS else 1.0
    for match in pattern.finditer(text):
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


def format_count(points: Sequence[Point | tuple[float, float]], label: str) -> str:
    """Format the answer to "How many ... are there?": the points, then their number."""
    if not points:
        return NONE
    return f"Counting the {format_points(points, label)} shows a total of {len(points)}."


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
