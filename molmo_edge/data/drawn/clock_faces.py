"""Analogue clock faces in many styles, showing a time to five minutes."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from molmo_edge.data.drawn.backdrops import random_colour
from molmo_edge.data.drawn.rendered_words import contrasting, load_font, random_font
from molmo_edge.data.drawn.sprites import Assets

_ROMAN = ("XII", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI")
_OVERSAMPLED = 2  # drawn larger, then reduced: ImageDraw has no anti-aliasing


def draw_clock(rng: np.random.Generator, assets: Assets, side: int) -> tuple[Image.Image, str]:
    """(RGBA [side, side], the time as "3:25")."""
    hour, minute = int(rng.integers(12)), 5 * int(rng.integers(12))
    big = side * _OVERSAMPLED
    image = Image.new("RGBA", (big, big))
    draw = ImageDraw.Draw(image)
    face = (255, 255, 255) if rng.random() < 0.5 else random_colour(rng)
    ink = contrasting(face, rng)
    rim = random_colour(rng) if rng.random() < 0.6 else ink
    centre, radius = big / 2, big / 2 - 1
    width = max(1, int(radius * rng.uniform(0.03, 0.12)))
    if rng.random() < 0.85:
        draw.ellipse((0, 0, big - 1, big - 1), fill=face, outline=rim, width=width)
    else:
        draw.rounded_rectangle((0, 0, big - 1, big - 1), radius * 0.15, fill=face, outline=rim, width=width)
    _draw_marks(rng, assets, draw, ink, centre, radius - width)
    thick = radius * rng.uniform(0.035, 0.07)
    hour_turn = (hour + minute / 60) / 12
    _draw_hand(draw, centre, hour_turn, radius * rng.uniform(0.42, 0.52), thick * 1.5, ink)
    _draw_hand(draw, centre, minute / 60, radius * rng.uniform(0.68, 0.8), thick, ink)
    if rng.random() < 0.35:
        red = (200, 30, 30) if rng.random() < 0.7 else ink
        _draw_hand(draw, centre, rng.random(), radius * rng.uniform(0.7, 0.85), thick * 0.3, red)
    hub = thick * 1.4
    draw.ellipse((centre - hub, centre - hub, centre + hub, centre + hub), fill=ink)
    return image.resize((side, side), Image.Resampling.LANCZOS), f"{hour or 12}:{minute:02d}"


def _draw_marks(
    rng: np.random.Generator,
    assets: Assets,
    draw: ImageDraw.ImageDraw,
    ink: tuple[int, int, int],
    centre: float,
    radius: float,
) -> None:
    """Numbers, Roman numbers, the four quarters, or ticks alone; mostly with ticks around."""
    style = str(rng.choice(["numbers", "roman", "quarters", "ticks"], p=[0.5, 0.12, 0.15, 0.23]))
    ticks = style in ("ticks", "quarters") or rng.random() < 0.6
    if ticks:
        minutes = rng.random() < 0.5
        for i in range(60):
            if i % 5 == 0 or minutes:
                inner = radius * ((0.88 if style == "ticks" else 0.91) if i % 5 == 0 else 0.95)
                mark = max(1, int(radius * (0.03 if i % 5 == 0 else 0.012)))
                draw.line((*_at(centre, i / 60, inner), *_at(centre, i / 60, radius * 0.97)), fill=ink, width=mark)
    if style != "ticks":
        font = load_font(random_font(rng, assets), max(6, int(radius * rng.uniform(0.2, 0.28))))
        ring = radius * (0.74 if ticks else 0.82)
        for hour in range(0, 12, 3 if style == "quarters" else 1):
            text = _ROMAN[hour] if style == "roman" else str(hour or 12)
            draw.text(_at(centre, hour / 12, ring), text, fill=ink, font=font, anchor="mm")


def _draw_hand(
    draw: ImageDraw.ImageDraw, centre: float, turn: float, length: float, width: float, colour: tuple[int, int, int]
) -> None:
    """`turn` in full turns from twelve o'clock; a short tail shows behind the hub."""
    tail = _at(centre, turn + 0.5, length * 0.15)
    draw.line((*tail, *_at(centre, turn, length)), fill=colour, width=max(1, round(width)))


def _at(centre: float, turn: float, radius: float) -> tuple[float, float]:
    angle = 2 * math.pi * turn
    return centre + radius * math.sin(angle), centre - radius * math.cos(angle)
