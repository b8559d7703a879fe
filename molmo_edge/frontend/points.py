"""Molmo's points: read from text, as it streams if need be, and written.

Four ways of writing a point are known (reference: olmo/util.py::extract_points). Coordinates are percent of the
image's width and height:

    <point x="10.5" y="20.0" alt="cup">cup</point>      <points x1="1.0" y1="2.0" x2=... alt="cups">cups</points>
    Click(10.5, 20.0)                                   (10.5, 20.0)
    <point p=105,200 alt="cup">cup</point>              1=105,200 2=...        tenths of a percent
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

NONE = "There are none."  # how Molmo says that what was asked for is not in the image


@dataclass(frozen=True)
class Point:
    """A place in an image: percent of its width and height, from the top left."""

    x: float  # 0 to 100
    y: float  # 0 to 100
    label: str = ""

    def pixel(self, width: float, height: float) -> tuple[float, float]:
        """(x, y) in pixels of an image of width x height."""
        return self.x / 100.0 * width, self.y / 100.0 * height


# The reference's patterns, except that ids in front of `=` need no more than their last digit: with `\d+` there,
# a long row of digits would take quadratic time, and what is found is the same.
_CLICK = re.compile(r"Click\(([0-9]+\.[0-9]), ?([0-9]+\.[0-9])\)")
_PAIR = re.compile(r"\(([0-9]+\.[0-9]),? ?([0-9]+\.[0-9])\)")
_ATTRIBUTES = re.compile(r'x\d*="\s*([0-9]+(?:\.[0-9]+)?)"\s+y\d*="\s*([0-9]+(?:\.[0-9]+)?)"')
_TENTHS = re.compile(r"[\dp]\s*=\s*([0-9]{3})\s*,\s*([0-9]{3})")

# No point is longer than a run of these characters (Click( is a pair as well), whatever stands around it.
_LAST_OUTSIDE = re.compile(r'.*[^\d\sxyp=",.()]', re.DOTALL)
_OUTSIDE = re.compile(r'[^\d\sxyp=",.()]')

_TAG = "<point"  # of <points, too
_ALT = re.compile(r'\balt="([^"]*)"')
# A label may hold quotes and ">"; the tag itself ends in `">`, whose quote closes: behind "=" it would open.
_INNER = re.compile(r'(?<!=)"\s*>(.*)', re.DOTALL)


def parse_points(text: str) -> list[Point]:
    """All points in `text`, in its order, with the labels of their tags. A point above 100 percent is dropped.

    Finds what the reference finds, but lists each point once: the reference finds Click(...) twice, as its
    pattern for plain pairs matches again inside. Takes time linear in the text, hostile text included.
    """
    parser = StreamParser()
    return parser.feed(text) + parser.close()


def extract_points(text: str, width: float, height: float) -> list[tuple[float, float]]:
    """The points in `text` as (x, y) in pixels, exactly as the reference's function of this name returns them.

    That is: one way of writing after the other, not in the order of the text, and Click(...) points twice.
    Use it to compare scores with published ones; use `parse_points` for everything else.
    """
    found = [xy for pattern in (_CLICK, _PAIR, _ATTRIBUTES, _TENTHS) for _, *xy in _matches(pattern, text)]
    return [Point(x, y).pixel(width, height) for x, y in found]


class StreamParser:
    """Finds points in text that comes in pieces.

    `feed` returns the points that a piece completes: those of a tag when its closing tag begins, as the label
    stands in between; others with the first character that cannot belong to them. `close` returns what an
    answer that was cut off had left. All of them together are `parse_points` of the joined pieces.
    """

    def __init__(self) -> None:
        self._pending: list[str] = []  # text that may be the beginning of a point, or of a tag
        self._in_tag = False

    def feed(self, piece: str) -> list[Point]:
        self._pending.append(piece)
        # Most pieces decide nothing, and joining for each of them would take quadratic time in a long tag.
        if "<" not in piece if self._in_tag else not _OUTSIDE.search(piece):
            return []
        return self._take(final=False)

    def close(self) -> list[Point]:
        return self._take(final=True)

    def _take(self, *, final: bool) -> list[Point]:
        text = "".join(self._pending)
        points: list[Point] = []
        start = 0
        while start < len(text):
            is_tag = text.startswith(_TAG, start)
            if not is_tag and not final and _TAG.startswith(text[start : start + len(_TAG)]):
                break  # "<poi": not known yet
            # A tag, its label with it, reaches to the next "<".
            end = text.find("<", start + 1)
            if end < 0 and final:
                end = len(text)
            elif end < 0 and not is_tag:
                match = _LAST_OUTSIDE.match(text, start)
                end = match.end() if match else -1
            if end <= start:
                break
            part = text[start:end]
            label = _label(part) if is_tag else ""
            points += [Point(x, y, label) for x, y in _coordinates(part)]
            start = end
        rest = text[start:]
        self._pending = [rest]
        self._in_tag = rest.startswith(_TAG)
        return points


def _coordinates(text: str) -> list[tuple[float, float]]:
    """(x, y) of all points in `text`, in its order."""
    found = sorted(match for pattern in (_PAIR, _ATTRIBUTES, _TENTHS) for match in _matches(pattern, text))
    return [(x, y) for _, x, y in found]


def _matches(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, float, float]]:
    """(position, x, y) of the valid points that `pattern` finds."""
    unit = 10.0 if pattern is _TENTHS else 1.0
    for match in pattern.finditer(text):
        x, y = (float(match.group(i)) / unit for i in (1, 2))
        if max(x, y) <= 100:
            yield match.start(), x, y


def _label(tag: str) -> str:
    """The label of `<point ...>label`: what it shows, or its alt text if it shows nothing."""
    inner = _INNER.search(tag)
    if inner and inner.group(1).strip():
        return html.unescape(inner.group(1).strip())
    alt = _ALT.search(tag)
    return html.unescape(alt.group(1).strip()) if alt else ""


def format_points(points: Sequence[Point | tuple[float, float]], label: str, *, alt: str | None = None) -> str:
    """Write `points` (percent) the way Molmo was trained to: one decimal, left to right, then top to bottom.

    `alt` is `label` unless given. Nothing is escaped, as nothing was in training. No points give "There are
    none." Reference: olmo/data/data_formatter.py::points_to_text.
    """
    if not points:
        return NONE
    pairs = [(p.x, p.y) if isinstance(p, Point) else (p[0], p[1]) for p in points]
    # numpy's rounding, not Python's: they differ where a half is not exact, 0.15 for one.
    # Adding 0 makes 0 of -0, whose sign no pattern reads back.
    rounded = [(float(x), float(y)) for x, y in np.round(np.array(pairs, np.float64), 1) + 0.0]
    rounded.sort(key=lambda xy: xy[0] * 10000 + xy[1])
    alt = label if alt is None else alt
    if len(rounded) == 1:
        ((x, y),) = rounded
        return f'<point x="{x:.1f}" y="{y:.1f}" alt="{alt}">{label}</point>'
    attributes = " ".join(f'x{i}="{x:.1f}" y{i}="{y:.1f}"' for i, (x, y) in enumerate(rounded, start=1))
    return f'<points {attributes} alt="{alt}">{label}</points>'


def format_count(points: Sequence[Point | tuple[float, float]], label: str) -> str:
    """Write the answer to "How many ... are there?": the points, then their number."""
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
    """The count that an answer states, None if it states none.

    Its last word as a number or a number word (to twenty), else the N of "a total of N", else 0 for an answer
    with the word "none". Reference: olmo/eval/evaluators.py::PointCountEval, whose search for "none" can
    never succeed (its \\b is a backspace), so that it scores "There are none." as no answer: here it is 0.
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
