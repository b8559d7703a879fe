"""What comes back: the text, the points in it, what it cost, and the picture with the points drawn in."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.points import Point
from molmo_edge.sdk import lettering
from molmo_edge.sdk.readable_text import readable

__all__ = ["Answer", "DrawError", "Point", "Seconds", "Tokens", "Usage", "draw_points"]

# One colour a label, in order of appearance; each readable on white and on black inside its white ring.
_COLOURS = ((229, 37, 107), (0, 114, 206), (0, 135, 90), (217, 95, 2), (117, 76, 192), (30, 30, 30))
_FINE = 4  # markers are drawn this many times larger and scaled down: Pillow's circles have no soft edge


class DrawError(MolmoEdgeError):
    """An answer without its image cannot be drawn."""


@dataclass(frozen=True)
class Tokens:
    """Positions in the model's context."""

    image: int = 0  # with BOS and the markers around the crops
    prompt: int = 0  # the question and the role words around it, and earlier turns
    generated: int = 0
    prefilled: int = field(
        default=0, compare=False
    )  # of image and prompt: run for this answer; the rest was kept from a Scene or an earlier turn


@dataclass(frozen=True)
class Seconds:
    """Wall-clock seconds by stage."""

    # Opening the model: once a Molmo, so each of its answers says the same figure. An engine may go on loading in
    # the background; the stages of the first answer then include the wait for its graphs.
    load: float = 0.0
    preprocess: float = 0.0  # image file to crops
    vision: float = 0.0  # crops to features
    prefill: float = 0.0  # image and question to the first token
    decode: float = 0.0  # the tokens behind the first

    @property
    def total(self) -> float:
        """Without `load`."""
        return self.preprocess + self.vision + self.prefill + self.decode


@dataclass(frozen=True)
class Usage:
    tokens: Tokens = Tokens()
    crops: int = 0  # the global view counted
    seconds: Seconds = field(default=Seconds(), compare=False)


@dataclass(frozen=True)
class Answer:
    """An answer; `str(answer)` is its text as generated, point tags included.

    Two answers are equal where they say the same and took as many tokens and crops; how long they took, and whether
    the image was prefilled before, is not compared.
    """

    text: str
    points: tuple[Point, ...] = ()
    count: int | None = None  # as the text states it, else the number of points; None where it has neither
    token_ids: tuple[int, ...] = ()  # as generated, before the stop token
    complete: bool = True  # False: cut off by max_new_tokens or by the end of the context
    usage: Usage = Usage()
    image: np.ndarray | None = field(default=None, repr=False, compare=False)  # uint8 [h, w, 3], as asked about
    model: str | None = field(default=None, compare=False)  # the name of the model that answered

    def __str__(self) -> str:
        return self.text

    @property
    def readable(self) -> str:
        """The text without point tags, their labels left in."""
        return readable(self.text).strip()

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first by the seconds they took; None where there were none, or no times are known."""
        # A complete answer's last step found the stop token.
        steps = self.usage.tokens.generated - 1 + self.complete
        seconds = self.usage.seconds.decode
        return steps / seconds if steps > 0 and seconds > 0 else None

    def pixels(self) -> list[tuple[float, float]]:
        """The points as (x, y) in pixels of the image, EXIF rotation applied. Raises DrawError without image."""
        height, width = self._rgb().shape[:2]
        return [point.pixel(width, height) for point in self.points]

    def draw(self) -> Image.Image:
        """A copy of the image with a numbered marker on each point. Raises DrawError without image."""
        return draw_points(Image.fromarray(self._rgb()), self.points)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the image, ready for JSON; each point in percent and, with the image, in pixels.

        molmo_edge/answer.schema.json describes it.
        """
        points: list[dict[str, Any]] = [{"x": p.x, "y": p.y, "label": p.label} for p in self.points]
        if self.image is not None:
            for point, (x, y) in zip(points, self.pixels(), strict=True):
                point["pixel"] = [round(x, 1), round(y, 1)]
        return {
            "text": self.text,
            "points": points,
            "count": self.count,
            "complete": self.complete,
            "token_ids": list(self.token_ids),
            "usage": dataclasses.asdict(self.usage),
            "model": self.model,
            "tokens_per_second": None if (speed := self.tokens_per_second) is None else round(speed, 2),
        }

    def _repr_png_(self) -> bytes | None:
        """For notebooks."""
        from molmo_edge.sdk.notebook import to_png

        return to_png(self)

    def _repr_html_(self) -> str:
        """For notebooks."""
        from molmo_edge.sdk.notebook import to_html

        return to_html(self)

    def _rgb(self) -> np.ndarray:
        if self.image is None:
            raise DrawError("this answer was made without its image, there is nothing to draw on")
        return self.image


def draw_points(image: Image.Image, points: tuple[Point, ...] | list[Point]) -> Image.Image:
    """A copy of `image`, as RGB, with a numbered marker on each point and each label once, beside its first point.

    Markers grow with the image and stay readable on a small one; a marker at the edge is cut off, not moved,
    so that its centre is always the point.
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
    for number, point in enumerate(points, 1):  # after the labels, which must not hide a point
        x, y = _centre(point, canvas)
        marker = _marker(radius, str(number), colours[point.label])
        canvas.paste(marker, (x - radius, y - radius), marker)
    return canvas


def _centre(point: Point, canvas: Image.Image) -> tuple[int, int]:
    x, y = point.pixel(*canvas.size)
    return round(x), round(y)


@functools.lru_cache(maxsize=256)
def _marker(radius: int, text: str, colour: tuple[int, int, int]) -> Image.Image:
    """A disc of `radius` pixels in a white ring, `text` in it."""
    size = 2 * radius + 1
    big = size * _FINE
    marker = Image.new("RGBA", (big, big), (255, 255, 255, 0))
    draw = ImageDraw.Draw(marker)
    ring = max(1.0, radius / 6) * _FINE
    draw.ellipse((0, 0, big - 1, big - 1), fill=(255, 255, 255, 255))
    draw.ellipse((ring, ring, big - 1 - ring, big - 1 - ring), fill=(*colour, 255))
    font = lettering.embedded_font((1.25 if len(text) == 1 else 2.1 / len(text)) * radius * _FINE)
    draw.text((big / 2, big / 2), text, font=font, fill=(255, 255, 255, 255), anchor="mm")
    return marker.resize((size, size), Image.Resampling.LANCZOS)


def _draw_label(
    canvas: Image.Image, label: str, centre: tuple[int, int], radius: int, colour: tuple[int, int, int]
) -> None:
    """The label on a plate right of its marker, or left of it where the right has no room."""
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
