"""Clocks with hands or digits, in many styles, with the columns of PixMo-Clocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from molmo_edge.data.drawn.backdrops import random_colour
from molmo_edge.data.drawn.rendered_words import load_font
from molmo_edge.data.drawn.sheets import COLOURS, Colour, Face, Fonts, Type, ink_on, pick, whole

WITHOUT_AM, WITH_AM, NOT_SHOWN = "12 hour clock (without AM/PM)", "12 hour clock (with AM/PM)", "The time is not shown"
_ROMAN = ("XII", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI")
_DIGITAL, _BLANK = 0.12, 0.02  # shares: with digits, and without any time
_OVERSAMPLED = 2
# Which of the seven strokes a digit has: top, upper left, upper right, middle, lower left, lower right, bottom.
_STROKES = (
    "1110111",
    "0010010",
    "1011101",
    "1011011",
    "0111010",
    "1101011",
    "1101111",
    "1010010",
    "1111111",
    "1111011",
)


@dataclass(frozen=True)
class Hand:
    """What a hand looks like in the finished picture."""

    angle: float  # degrees clockwise from straight up, as drawn: the clock may be turned
    length: float  # pixels from the middle
    colour: Colour


@dataclass(frozen=True)
class Clock:
    """A clock and all that is known of it."""

    image: Image.Image  # RGB
    row: dict[str, Any]  # the columns of allenai/pixmo-clocks but for the picture
    middle: tuple[float, float]  # pixels; of a clock with hands
    turn: float  # degrees clockwise, of the whole clock
    hands: dict[str, Hand]  # "hour", "minute", "second"


def draw_clock(rng: np.random.Generator, fonts: Fonts) -> Clock:
    """One clock, of 150 to 615 pixels, on a plain or shaded ground of 256 to 640."""
    hour, minute, second = whole(rng, 0, 23), whole(rng, 0, 59), whole(rng, 0, 59)
    width, height = whole(rng, 256, 640), whole(rng, 256, 640)
    ground = _ground(rng, (width, height))
    size = int(min(width, height) * rng.uniform(0.6, 0.96))
    corner = (whole(rng, 0, width - size), whole(rng, 0, height - size))
    if rng.random() < _DIGITAL:
        face, row = _digital(rng, size, hour, minute, second)
        ground.paste(face, (corner[0], corner[1] + (size - face.height) // 2), face)
        return Clock(ground, {"watchface_name": "digital"} | row, (0, 0), 0.0, {})
    blank, seconds = rng.random() < _BLANK, rng.random() < 0.5
    style = str(rng.choice(["arabic", "roman", "quarters", "ticks"], p=[0.46, 0.2, 0.14, 0.2]))
    face, turn, hands = _analog(rng, fonts, style, size, (hour, minute, second if seconds else None), blank)
    ground.paste(face, corner, face)
    row = {"watchface_name": style}
    row |= describe(hour, minute, second if seconds else None, NOT_SHOWN if blank else WITHOUT_AM)
    return Clock(ground, row, (corner[0] + size / 2, corner[1] + size / 2), turn, {} if blank else hands)


def describe(hour: int, minute: int, second: int | None, time_format: str) -> dict[str, Any]:
    """The columns of a time of day, of which a face shows as much as `time_format` says; `second` None: no seconds.

    "text" is the time alone, "8:15:30", the sentence around it is the loader's. Twelve at noon counts as PM, which the
    reference (olmo/data/pixmo_datasets.py::PixMoClocks) gets wrong.
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


def _ground(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Plain, or shaded from corner to corner."""
    first = np.array(random_colour(rng), np.float32)
    strength = 0.0 if rng.random() < 0.4 else float(rng.uniform(5, 60))
    corners = np.clip(first + rng.uniform(-strength, strength, (2, 2, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR)


# --- with hands ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Dial:
    draw: ImageDraw.ImageDraw
    middle: float
    radius: float  # of what is inside the rim, pixels of the large drawing
    paper: Colour
    ink: Colour
    face: Face

    def at(self, angle: float, share: float) -> tuple[float, float]:
        """`angle`: degrees clockwise from twelve; `share` of the radius."""
        turn = math.radians(angle)
        return self.middle + self.radius * share * math.sin(turn), self.middle - self.radius * share * math.cos(turn)


def _analog(
    rng: np.random.Generator, fonts: Fonts, style: str, size: int, time: tuple[int, int, int | None], blank: bool
) -> tuple[Image.Image, float, dict[str, Hand]]:
    """(RGBA, how far it is turned, its hands). Numerals bear a larger turn than ticks alone."""
    big = size * _OVERSAMPLED
    image = Image.new("RGBA", (big, big))
    dial = _dial(rng, ImageDraw.Draw(image), pick(rng, fonts.faces), big)
    _marks(rng, dial, style)
    hands = {} if blank else _hands(rng, dial, time)
    limit = 8 if style == "ticks" else 40
    turn = float(rng.uniform(-limit, limit)) if rng.random() < 0.5 else 0.0
    image = image.rotate(-turn, Image.Resampling.BICUBIC).reduce(_OVERSAMPLED)
    found = {
        name: Hand(angle + turn, share * dial.radius / _OVERSAMPLED, colour)
        for name, (angle, share, colour) in hands.items()
    }
    return image, turn, found


def _dial(rng: np.random.Generator, draw: ImageDraw.ImageDraw, face: Face, big: int) -> _Dial:
    """Round, or a square small enough to be turned without losing its corners."""
    paper: Colour = pick(rng, ((255, 255, 255), (250, 246, 230), (24, 24, 28), random_colour(rng)))
    plain = ink_on(paper)
    tinted = ((20, 40, 110), (90, 20, 30)) if plain == (0, 0, 0) else ((240, 210, 120), (150, 220, 255))
    ink = plain if rng.random() < 0.7 else pick(rng, tinted)
    ink = ink if abs(sum(ink) - sum(paper)) > 260 else plain
    rim = random_colour(rng) if rng.random() < 0.6 else ink
    width, middle = max(1, int(big * rng.uniform(0.01, 0.06))), big / 2
    half = middle - 2
    if rng.random() < 0.8:
        draw.ellipse((middle - half, middle - half, middle + half, middle + half), paper, rim, width)
    else:
        half *= 0.74
        corners = (middle - half, middle - half, middle + half, middle + half)
        draw.rounded_rectangle(corners, half * float(rng.choice([0.0, 0.1, 0.3])), paper, rim, width)
    return _Dial(draw, middle, half - width, paper, ink, face)


def _marks(rng: np.random.Generator, dial: _Dial, style: str) -> None:
    ticks = style in ("ticks", "quarters") or rng.random() < 0.6
    minutes, dots = rng.random() < 0.5, rng.random() < 0.2
    for i in range(60) if ticks else ():
        large = i % 5 == 0
        if dots and large:
            (x, y), r = dial.at(i * 6, 0.93), dial.radius * 0.022
            dial.draw.ellipse((x - r, y - r, x + r, y + r), dial.ink)
        elif large or minutes:
            inner = (0.86 if style == "ticks" else 0.9) if large else 0.95
            width = max(1, int(dial.radius * (0.03 if large else 0.012)))
            dial.draw.line((*dial.at(i * 6, inner), *dial.at(i * 6, 0.97)), dial.ink, width)
    if style == "ticks":
        return
    font = Type(pick(rng, (dial.face.regular, dial.face.bold)), dial.radius * float(rng.uniform(0.16, 0.24)))
    for hour in range(0, 12, 3 if style == "quarters" else 1):
        text = _ROMAN[hour] if style == "roman" else str(hour or 12)
        place = dial.at(hour * 30, 0.74 if ticks else 0.82)
        dial.draw.text(place, text, dial.ink, load_font(font.path, int(font.size)), "mm")


def _hands(
    rng: np.random.Generator, dial: _Dial, time: tuple[int, int, int | None]
) -> dict[str, tuple[float, float, Colour]]:
    """Name -> (angle, length as a share of the radius, colour). Every hand moves with the smaller ones."""
    hour, minute, second = time
    minutes = minute + (second or 0) / 60
    colour = dial.ink
    if rng.random() < 0.25:
        colour = pick(rng, [c for c in COLOURS.values() if abs(sum(c) - sum(dial.paper)) > 330] or [dial.ink])
    shape, thick = pick(rng, ("bar", "taper", "leaf")), float(rng.uniform(0.03, 0.06))
    hands = {
        "hour": ((hour % 12 + minutes / 60) * 30, float(rng.uniform(0.42, 0.52)), colour),
        "minute": (minutes * 6, float(rng.uniform(0.7, 0.84)), colour),
    }
    for name, (angle, length, ink) in hands.items():
        _hand(dial, angle, length, thick * (1.5 if name == "hour" else 1), shape, ink)
    if second is not None:
        red = COLOURS["red"] if abs(sum(COLOURS["red"]) - sum(dial.paper)) > 200 else dial.ink
        hands["second"] = (second * 6.0, float(rng.uniform(0.75, 0.88)), red if rng.random() < 0.7 else dial.ink)
        _hand(dial, second * 6.0, hands["second"][1], thick * 0.35, "bar", hands["second"][2])
    hub = dial.radius * thick * 1.3
    dial.draw.ellipse((dial.middle - hub, dial.middle - hub, dial.middle + hub, dial.middle + hub), hands["minute"][2])
    return hands


def _hand(dial: _Dial, angle: float, length: float, thick: float, shape: str, ink: Colour) -> None:
    """A bar, a wedge or a leaf, with a short tail behind the middle."""
    half = thick / 2
    outline = {
        "bar": ((-0.12, half), (length, half)),
        "taper": ((-0.12, half * 1.5), (length, half * 0.25)),
        "leaf": ((-0.12, half * 0.5), (length * 0.55, half * 1.7), (length, half * 0.2)),
    }[shape]
    turn = math.radians(angle)
    ahead, aside = (math.sin(turn), -math.cos(turn)), (math.cos(turn), math.sin(turn))
    corners = [(along, side) for along, side in outline] + [(along, -side) for along, side in reversed(outline)]
    dial.draw.polygon(
        [
            tuple(dial.middle + dial.radius * (along * ahead[k] + side * aside[k]) for k in (0, 1))
            for along, side in corners
        ],
        ink,
    )  # fmt: skip


# --- with digits --------------------------------------------------------------------------------------------------


def _digital(
    rng: np.random.Generator, size: int, hour: int, minute: int, second: int
) -> tuple[Image.Image, dict[str, Any]]:
    """(RGBA, its columns): seven-stroke digits on a panel, half of them with AM or PM."""
    seconds, half_day = rng.random() < 0.4, rng.random() < 0.5
    row = describe(hour, minute, second if seconds else None, WITH_AM if half_day else WITHOUT_AM)
    digits, _, suffix = row["text"].partition(" ")
    paper: Colour = pick(rng, ((16, 18, 20), (190, 205, 180), (235, 235, 235), (20, 30, 60)))
    bright: tuple[Colour, ...] = ((255, 60, 50), (90, 255, 130), (90, 200, 255), (255, 190, 60), (240, 240, 240))
    ink = pick(rng, bright if ink_on(paper) == (255, 255, 255) else ((20, 24, 20), (20, 30, 90)))
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
            _digit(draw, x + w * 0.12, w * 0.45, w * 0.76, w * 1.5, _STROKES[int(letter)], ink)
            x += w
    if suffix:
        draw.text((x + w * 0.2, w * 1.9), suffix, ink, load_font(None, int(w * 0.6)), "ls")
    return panel.reduce(_OVERSAMPLED), row


def _digit(
    draw: ImageDraw.ImageDraw, x: float, y: float, width: float, height: float, strokes: str, ink: Colour
) -> None:
    thick, gap, middle = width * 0.2, width * 0.04, height / 2
    lying = [(0.0, "0"), (middle - thick / 2, "3"), (height - thick, "6")]
    standing = [(0.0, 0.0, "1"), (width - thick, 0.0, "2"), (0.0, middle, "4"), (width - thick, middle, "5")]
    for down, at in lying:
        if strokes[int(at)] == "1":
            draw.rectangle((x + thick / 2 + gap, y + down, x + width - thick / 2 - gap, y + down + thick), ink)
    for right, down, at in standing:
        if strokes[int(at)] == "1":
            top = y + down + (thick / 2 if down == 0 else 0) + gap
            bottom = y + down + middle - (thick / 2 if down else 0) - gap
            draw.rectangle((x + right, top, x + right + thick, bottom), ink)
