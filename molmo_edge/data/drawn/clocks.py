"""Clocks: dials for scenes, and whole pictures of clocks with the columns of PixMo-Clocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from molmo_edge.data.choices import pick, whole
from molmo_edge.data.drawn.backdrops import draw_backdrop
from molmo_edge.data.drawn.colours import WHITE, Colour, contrasting, ink_on, random_colour
from molmo_edge.data.drawn.fonts import Fonts, load_font, random_font

WITHOUT_AM, WITH_AM, NOT_SHOWN = "12 hour clock (without AM/PM)", "12 hour clock (with AM/PM)", "The time is not shown"
_ROMAN = ("XII", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI")
_STYLES = {"arabic": 0.5, "roman": 0.12, "quarters": 0.15, "ticks": 0.23}
_RED: Colour = (200, 30, 30)
_DIGITAL, _BLANK = 0.12, 0.02  # shares of clocks with digits, and of dials without hands
_OVERSAMPLED = 2  # drawn larger, then reduced: ImageDraw has no anti-aliasing
_THICK = {"hour": 1.5, "minute": 1.0, "second": 0.3}  # of hands, relative to the minute hand
# The segments of a digit, x0, y0, x1, y1 in widths, and which of them each digit has.
_SEGMENTS = (
    (0.14, 0.0, 0.86, 0.2), (0.0, 0.14, 0.2, 0.96), (0.8, 0.14, 1.0, 0.96), (0.14, 0.9, 0.86, 1.1),
    (0.0, 1.04, 0.2, 1.86), (0.8, 1.04, 1.0, 1.86), (0.14, 1.8, 0.86, 2.0),
)  # fmt: skip
_STROKES = (
    "1110111", "0010010", "1011101", "1011011", "0111010", "1101011", "1101111", "1010010", "1111111", "1111011",
)  # fmt: skip


@dataclass(frozen=True)
class Hand:
    """A hand in the finished picture."""

    angle: float  # degrees clockwise from straight up, the clock's own turn included
    length: float  # pixels from the middle
    colour: Colour


@dataclass(frozen=True)
class Clock:
    """A clock and all that is known about it."""

    image: Image.Image  # RGB
    row: dict[str, Any]  # the columns of allenai/pixmo-clocks except the picture
    middle: tuple[float, float]  # pixels; of a clock with hands
    turn: float  # degrees clockwise, of the whole clock
    hands: dict[str, Hand]  # "hour", "minute", "second"


@dataclass(frozen=True)
class _Look:
    """What a dial looks like. Lengths are shares of its radius."""

    paper: Colour
    ink: Colour
    rim: Colour
    rim_width: float
    corner: float | None  # of a square dial; None: round
    style: str  # of _STYLES
    ticks: bool
    minutes: bool  # a tick for every minute
    font: Path | None
    letters: float
    thick: float  # of the minute hand
    hands: Mapping[str, tuple[float, Colour]]  # name -> length, colour
    dots: bool = False  # instead of hour ticks
    shape: str = "bar"  # of hands: "bar", "taper" or "leaf"
    scale: float = 1.0  # of the dial in its picture


def draw_dial(rng: np.random.Generator, fonts: Sequence[Path], side: int) -> tuple[Image.Image, str]:
    """(RGBA [side, side], the time as "3:25") of a dial that shows a time to five minutes."""
    hour, minute = int(rng.integers(12)), 5 * int(rng.integers(12))
    look = _random_look(rng, fonts)
    turns = _turns(hour, minute, None)
    if rng.random() < 0.35:  # a second hand, at any second
        look, turns["second"] = _with_seconds(rng, look)
    large = _draw(look, side, turns)
    return large.resize((side, side), Image.Resampling.LANCZOS), f"{hour or 12}:{minute:02d}"


def draw_clock(rng: np.random.Generator, fonts: Fonts) -> Clock:
    """A clock of 150 to 615 pixels on a backdrop of 256 to 640."""
    hour, minute, second = whole(rng, 0, 23), whole(rng, 0, 59), whole(rng, 0, 59)
    width, height = whole(rng, 256, 640), whole(rng, 256, 640)
    ground = draw_backdrop(rng, (), (width, height))[0]
    size = int(min(width, height) * rng.uniform(0.6, 0.96))
    corner = (whole(rng, 0, width - size), whole(rng, 0, height - size))
    if rng.random() < _DIGITAL:
        face, row = _digital(rng, size, hour, minute, second)
        ground.paste(face, (corner[0], corner[1] + (size - face.height) // 2), face)
        return Clock(ground, {"watchface_name": "digital"} | row, (0, 0), 0.0, {})
    blank, seconds = rng.random() < _BLANK, rng.random() < 0.5
    look = _random_look(rng, fonts.files)
    look = _varied(rng, _with_seconds(rng, look)[0] if seconds else look)
    shown = second if seconds else None
    turns = {} if blank else _turns(hour, minute, shown)
    limit = 8 if look.style == "ticks" else 40  # numerals show how far a dial is turned
    turn = float(rng.uniform(-limit, limit)) if rng.random() < 0.5 else 0.0
    large = _draw(look, size, turns).rotate(-turn, Image.Resampling.BICUBIC)
    face = large.resize((size, size), Image.Resampling.LANCZOS)
    ground.paste(face, corner, face)
    row = {"watchface_name": look.style, **describe(hour, minute, shown, NOT_SHOWN if blank else WITHOUT_AM)}
    hands = {
        name: Hand(360 * at + turn, look.hands[name][0] * look.scale * size / 2, look.hands[name][1])
        for name, at in turns.items()
    }
    return Clock(ground, row, (corner[0] + size / 2, corner[1] + size / 2), turn, hands)


def describe(hour: int, minute: int, second: int | None, time_format: str) -> dict[str, Any]:
    """PixMo-Clocks' columns for a time of day; `second` None: the clock shows no seconds.

    "text" is the time alone, "8:15:30"; the loader adds the sentence. 12:00 at noon is PM, unlike in the reference
    (olmo/data/pixmo_datasets.py::PixMoClocks).
    """
    row: dict[str, Any] = {
        "watch_time": f"{hour:02d}:{minute:02d}:{second or 0:02d}",
        "time_format": time_format,
        "shows_seconds": second is not None and time_format != NOT_SHOWN,
    }
    if time_format == NOT_SHOWN:
        unseen = dict.fromkeys(("hour_visible", "minute_visible", "second_visible"), -1)
        return row | unseen | {"text": "The time is not shown in the image."}
    time = f"{hour % 12 or 12}:{minute:02d}" + ("" if second is None else f":{second:02d}")
    shown = hour if time_format == WITH_AM else hour % 12
    if time_format == WITH_AM:
        time += " AM" if hour < 12 else " PM"
    row |= {"hour_visible": shown, "minute_visible": minute, "second_visible": -1 if second is None else second}
    return row | {"text": time}


# --- with hands ---------------------------------------------------------------------------------------------------


def _turns(hour: int, minute: int, second: int | None) -> dict[str, float]:
    """Where each hand points, in full turns from twelve o'clock. Every hand moves with the smaller ones."""
    minutes = minute + (second or 0) / 60
    turns = {"hour": (hour % 12 + minutes / 60) / 12, "minute": minutes / 60}
    return turns if second is None else turns | {"second": second / 60}


def _random_look(rng: np.random.Generator, fonts: Sequence[Path]) -> _Look:
    paper = WHITE if rng.random() < 0.5 else random_colour(rng)
    ink = contrasting(paper, rng)
    rim = random_colour(rng) if rng.random() < 0.6 else ink
    rim_width = rng.uniform(0.03, 0.12)
    corner = None if rng.random() < 0.85 else 0.15
    style = str(rng.choice(list(_STYLES), p=list(_STYLES.values())))
    ticks = style in ("ticks", "quarters") or rng.random() < 0.6
    minutes = ticks and rng.random() < 0.5
    font, letters = (None, 0.0) if style == "ticks" else (random_font(rng, fonts), rng.uniform(0.2, 0.28))
    thick = rng.uniform(0.035, 0.07)
    hands = {"hour": (rng.uniform(0.42, 0.52), ink), "minute": (rng.uniform(0.68, 0.8), ink)}
    return _Look(paper, ink, rim, rim_width, corner, style, ticks, minutes, font, letters, thick, hands)


def _with_seconds(rng: np.random.Generator, look: _Look) -> tuple[_Look, float]:
    """With a second hand, and a random turn for it."""
    colour = _RED if rng.random() < 0.7 else look.ink
    turn, length = rng.random(), rng.uniform(0.7, 0.85)
    return replace(look, hands={**look.hands, "second": (length, colour)}), turn


def _varied(rng: np.random.Generator, look: _Look) -> _Look:
    """Other hands and marks; a square dial is made small enough to be turned without losing its corners."""
    square = look.corner is not None
    colour = contrasting(look.paper, rng) if rng.random() < 0.25 else look.ink
    visible_red = sum(abs(a - b) for a, b in zip(_RED, look.paper, strict=True)) > 200
    hands = {name: (length, colour) for name, (length, _) in look.hands.items()}
    if "second" in hands:
        length, red = look.hands["second"]
        hands["second"] = (length, red if visible_red else look.ink)
    return replace(
        look,
        corner=pick(rng, (0.0, 0.1, 0.3)) if square else None,
        scale=0.7 if square else 1.0,
        dots=rng.random() < 0.2,
        shape=pick(rng, ("bar", "taper", "leaf")),
        hands=hands,
    )


def _draw(look: _Look, side: int, turns: Mapping[str, float]) -> Image.Image:
    """RGBA, _OVERSAMPLED times `side`."""
    big = side * _OVERSAMPLED
    image = Image.new("RGBA", (big, big))
    draw = ImageDraw.Draw(image)
    centre, radius = big / 2, (big / 2 - 1) * look.scale
    width = max(1, int(radius * look.rim_width))
    box = (centre - radius - 1, centre - radius - 1, centre + radius, centre + radius)
    if look.corner is None:
        draw.ellipse(box, fill=look.paper, outline=look.rim, width=width)
    else:
        draw.rounded_rectangle(box, radius * look.corner, fill=look.paper, outline=look.rim, width=width)
    _draw_marks(draw, look, centre, radius - width)
    thick = radius * look.thick
    for name, turn in turns.items():
        length, colour = look.hands[name]
        shape = "bar" if name == "second" else look.shape
        _draw_hand(draw, centre, turn, radius * length, thick * _THICK[name], shape, colour)
    if turns:
        hub = thick * 1.4
        draw.ellipse((centre - hub, centre - hub, centre + hub, centre + hub), fill=look.hands["minute"][1])
    return image


def _draw_marks(draw: ImageDraw.ImageDraw, look: _Look, centre: float, radius: float) -> None:
    """Numbers, Roman numbers, the four quarters, or ticks alone; mostly with ticks around."""
    for i in range(60) if look.ticks else ():
        large = i % 5 == 0
        if large and look.dots:
            (x, y), dot = _at(centre, i / 60, radius * 0.93), radius * 0.022
            draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=look.ink)
        elif large or look.minutes:
            inner = radius * ((0.88 if look.style == "ticks" else 0.91) if large else 0.95)
            mark = max(1, int(radius * (0.03 if large else 0.012)))
            draw.line((*_at(centre, i / 60, inner), *_at(centre, i / 60, radius * 0.97)), fill=look.ink, width=mark)
    if look.style == "ticks":
        return
    font = load_font(look.font, max(6, int(radius * look.letters)))
    ring = radius * (0.74 if look.ticks else 0.82)
    for hour in range(0, 12, 3 if look.style == "quarters" else 1):
        text = _ROMAN[hour] if look.style == "roman" else str(hour or 12)
        draw.text(_at(centre, hour / 12, ring), text, fill=look.ink, font=font, anchor="mm")


def _draw_hand(
    draw: ImageDraw.ImageDraw, centre: float, turn: float, length: float, width: float, shape: str, colour: Colour
) -> None:
    """A bar, a wedge or a leaf, with a short tail behind the hub."""
    if shape == "bar":
        tail = _at(centre, turn + 0.5, length * 0.15)
        draw.line((*tail, *_at(centre, turn, length)), fill=colour, width=max(1, round(width)))
        return
    outline = {  # share of the length, share of half the width
        "taper": ((-0.15, 1.5), (1.0, 0.25)),
        "leaf": ((-0.15, 0.5), (0.55, 1.7), (1.0, 0.2)),
    }[shape]
    angle = 2 * math.pi * turn
    corners = [(along, side) for along, side in outline] + [(along, -side) for along, side in reversed(outline)]
    draw.polygon(
        [
            (
                centre + length * along * math.sin(angle) + width / 2 * side * math.cos(angle),
                centre - length * along * math.cos(angle) + width / 2 * side * math.sin(angle),
            )
            for along, side in corners
        ],
        fill=colour,
    )


def _at(centre: float, turn: float, radius: float) -> tuple[float, float]:
    angle = 2 * math.pi * turn
    return centre + radius * math.sin(angle), centre - radius * math.cos(angle)


# --- with digits --------------------------------------------------------------------------------------------------


def _digital(
    rng: np.random.Generator, size: int, hour: int, minute: int, second: int
) -> tuple[Image.Image, dict[str, Any]]:
    """(RGBA, columns): seven-segment digits on a panel, half of them with AM or PM."""
    seconds, half_day = rng.random() < 0.4, rng.random() < 0.5
    row = describe(hour, minute, second if seconds else None, WITH_AM if half_day else WITHOUT_AM)
    digits, _, suffix = row["text"].partition(" ")
    paper: Colour = pick(rng, ((16, 18, 20), (190, 205, 180), (235, 235, 235), (20, 30, 60)))
    bright: tuple[Colour, ...] = ((255, 60, 50), (90, 255, 130), (90, 200, 255), (255, 190, 60), (240, 240, 240))
    ink = pick(rng, bright if ink_on(paper) == WHITE else ((20, 24, 20), (20, 30, 90)))
    units = sum(0.5 if letter == ":" else 1.0 for letter in digits) + (1.4 if suffix else 0) + 0.6
    w = size * _OVERSAMPLED / units
    panel = Image.new("RGBA", (size * _OVERSAMPLED, int(w * 2.4)))
    draw = ImageDraw.Draw(panel)
    draw.rounded_rectangle(
        (0, 0, panel.width - 1, panel.height - 1), w * 0.2, paper, random_colour(rng), max(2, int(w * 0.05))
    )
    x = w * 0.3
    for letter in digits:
        if letter == ":":
            for y in (0.85, 1.5):
                draw.ellipse((x + w * 0.14, w * y, x + w * 0.34, w * (y + 0.2)), ink)
            x += w * 0.5
        else:
            _digit(draw, x + w * 0.12, w * 0.45, w * 0.76, _STROKES[int(letter)], ink)
            x += w
    if suffix:
        draw.text((x + w * 0.2, w * 1.9), suffix, ink, load_font(None, int(w * 0.6)), "ls")
    return panel.reduce(_OVERSAMPLED), row


def _digit(draw: ImageDraw.ImageDraw, x: float, y: float, width: float, strokes: str, ink: Colour) -> None:
    for on, (x0, y0, x1, y1) in zip(strokes, _SEGMENTS, strict=True):
        if on == "1":
            draw.rectangle((x + x0 * width, y + y0 * width, x + x1 * width, y + y1 * width), ink)
