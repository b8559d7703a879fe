"""Words, numbers and short signs, rendered in readable fonts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from molmo_edge.data.drawn.colours import contrasting, random_colour
from molmo_edge.data.drawn.fonts import load_font, random_font
from molmo_edge.data.drawn.sprite_names import sprite_sources

_SIGNS = (
    "NO PARKING", "KEEP OUT", "EXIT", "OPEN", "CLOSED", "PUSH", "PULL", "SALE", "FOR SALE", "FOR RENT", "STOP",
    "SLOW DOWN", "ONE WAY", "DO NOT ENTER", "WET FLOOR", "NO SMOKING", "FREE WIFI", "TAXI STAND", "BUS STOP",
    "MAIN STREET", "PARK AVENUE", "ROOM 12", "GATE 7", "EXIT 25", "PLATFORM 3", "WELCOME", "THANK YOU", "CAUTION",
    "DANGER", "HIGH VOLTAGE", "FIRE EXIT", "INFORMATION", "RECEPTION", "REST AREA", "TICKETS", "COFFEE SHOP",
    "FRESH BREAD", "ICE CREAM", "HAPPY BIRTHDAY", "GOOD MORNING", "HELLO WORLD", "SPEED LIMIT 50", "SCHOOL BUS",
    "POLICE", "AMBULANCE", "TOILETS", "EMERGENCY", "NO ENTRY", "WAY OUT", "MIND THE GAP", "CASH ONLY", "HOTEL", "BANK",
)  # fmt: skip
_COMMON = Path(__file__).with_name("words.txt")
WORDS = tuple(sorted({*_COMMON.read_text(encoding="utf-8").split(), *(n for n in sprite_sources() if n.isalpha())}))


def random_text(rng: np.random.Generator) -> str:
    """A common word (any capitalisation), a number from 0 to 999, a price, or a short sign."""
    kind = rng.random()
    if kind < 0.58:
        word = WORDS[int(rng.integers(len(WORDS)))]
        return str(rng.choice([word, word.upper(), word.capitalize()]))
    if kind < 0.78:
        return str(int(rng.integers(1000)))
    if kind < 0.84:
        return f"${int(rng.integers(1, 100))}.{int(rng.choice([0, 25, 49, 50, 75, 95, 99])):02d}"
    return _SIGNS[int(rng.integers(len(_SIGNS)))]


def draw_text(rng: np.random.Generator, fonts: Sequence[Path], text: str, height: int, max_width: int) -> Image.Image:
    """RGBA, cropped to the text or its panel.

    Capitals are `height` pixels tall, smaller if `max_width` requires it; the font has 8 pixels or more. Two of three
    texts are on a panel of contrasting colour, the others have an outline.
    """
    path = random_font(rng, fonts)
    padding, points = rng.uniform(0.2, 0.6), height * 1.4  # a capital is about 0.7 of its font's size
    while True:
        font = load_font(path, max(8, round(points)))
        left, top, right, bottom = font.getbbox(text)
        pad = int((bottom - top) * padding)
        width = right - left + 2 * pad
        if width <= max_width or points <= 8:
            break
        points *= min(0.95, max_width / width)
    paper = random_colour(rng)
    ink = contrasting(paper, rng)
    size = (int(right - left) + 2 * pad, int(bottom - top) + 2 * pad)
    image = Image.new("RGBA", size)
    draw = ImageDraw.Draw(image)
    stroke = 0
    if rng.random() < 2 / 3:
        corner = pad * rng.uniform(0, 1)
        outline = ink if rng.random() < 0.4 else None
        draw.rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), corner, paper, outline, max(1, pad // 6))
    else:
        stroke = max(1, round((bottom - top) / 12))
    draw.text((pad - left, pad - top), text, fill=ink, font=font, stroke_width=stroke, stroke_fill=paper)
    return image
