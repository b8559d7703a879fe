"""Numbered markers and labels on a picture."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from PIL import Image, ImageDraw

from molmo_edge.frontend.points import Point
from molmo_edge.sdk import lettering

# One colour per label, in order of appearance; each readable inside its white ring on white and on black.
_COLOURS = ((229, 37, 107), (0, 114, 206), (0, 135, 90), (217, 95, 2), (117, 76, 192), (30, 30, 30))
_OVERSAMPLING = 4  # markers are drawn this many times larger and scaled down: Pillow's circles are not antialiased


def draw_points(image: Image.Image, points: Sequence[Point]) -> Image.Image:
    """Return a copy of `image` in RGB with a numbered marker on each point, and each label once, at its first point.

    Markers grow with the image and stay readable on small ones. A marker at the edge is cropped rather than moved:
    its centre is always the point.
    """
    canvas = image.convert("RGB")
    if canvas is image:
        canvas = image.copy()
    radius = max(7, round(0.016 * (canvas.width * canvas.height) ** 0.5))
    colours: dict[str, tuple[int, int, int]] = {}
    for point in points:
        if point.label not in colours:
            colours[point.label] = _COLOURS[len(colours) % len(_COLOURS)]
            if point.label:
                _draw_label(canvas, point.label, _centre(point, canvas), radius, colours[point.label])
    for number, point in enumerate(points, 1):  # after the labels, which must not cover a point
        x, y = _centre(point, canvas)
        marker = _marker(radius, str(number), colours[point.label])
        canvas.paste(marker, (x - radius, y - radius), marker)
    return canvas


def _centre(point: Point, canvas: Image.Image) -> tuple[int, int]:
    x, y = point.pixel(*canvas.size)
    return round(x), round(y)


@functools.lru_cache(maxsize=256)
def _marker(radius: int, text: str, colour: tuple[int, int, int]) -> Image.Image:
    """Draw a disc of `radius` pixels in a white ring, with `text` in it."""
    size = 2 * radius + 1
    big = size * _OVERSAMPLING
    marker = Image.new("RGBA", (big, big), (255, 255, 255, 0))
    draw = ImageDraw.Draw(marker)
    ring = max(1.0, radius / 6) * _OVERSAMPLING
    draw.ellipse((0, 0, big - 1, big - 1), fill=(255, 255, 255, 255))
    draw.ellipse((ring, ring, big - 1 - ring, big - 1 - ring), fill=(*colour, 255))
    font = lettering.embedded_font((1.25 if len(text) == 1 else 2.1 / len(text)) * radius * _OVERSAMPLING)
    draw.text((big / 2, big / 2), text, font=font, fill=(255, 255, 255, 255), anchor="mm")
    return marker.resize((size, size), Image.Resampling.LANCZOS)


def _draw_label(
    canvas: Image.Image, label: str, centre: tuple[int, int], radius: int, colour: tuple[int, int, int]
) -> None:
    """Draw the label on a plate to the right of its marker, or to the left if there is no room."""
    pad = max(2, radius // 4)
    size = max(10.0, 1.1 * radius)
    line = lettering.line(label, size, min(22 * size, canvas.width - 2 * pad))
    left, top, right, bottom = line.box
    wide, high = right - left + 2 * pad, bottom - top + 2 * pad
    x = centre[0] + radius + pad
    if x + wide > canvas.width:
        x = max(0, centre[0] - radius - pad - wide)
    y = min(max(0, centre[1] - high // 2), max(0, canvas.height - high))
    draw = ImageDraw.Draw(canvas)
    draw.rounded_rectangle((x, y, x + wide, y + high), radius=pad, fill=colour, outline=(255, 255, 255))
    line.draw(draw, x + pad, y + pad, (255, 255, 255))
