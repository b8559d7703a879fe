"""What drawn pages share: sheets to draw on, questions, and the look of photographs and screenshots.

A picture depends only on its random generator and the fonts.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from molmo_edge.data.choices import some, whole
from molmo_edge.data.drawn.colours import Colour
from molmo_edge.data.drawn.fonts import Type, load_font, text_width

Box = tuple[float, float, float, float]  # x0, y0, x1, y1, pixels
Pair = tuple[str, str]  # question, answer

MOST_QUESTIONS = 12  # about a picture


@dataclass(frozen=True)
class Drawing:
    """A picture and what is known about it."""

    image: Image.Image  # RGB
    questions: list[Pair]
    data: dict[str, Any]  # what is drawn, as JSON: the answers follow from it
    texts: list[Box] = field(default_factory=list)  # boxes of the texts


def pairs(rng: np.random.Generator, found: Sequence[Pair], most: int) -> list[Pair]:
    """At most `most` of them in random order, without repeated questions."""
    return some(rng, list(dict(found).items()), most)


def about_numbers(
    rng: np.random.Generator, found: Mapping[str, float], kind: str, of: str, sign: str = ""
) -> list[Pair]:
    """Questions about extremes, sums, differences and order.

    `kind`: what the names are, such as "town". `of`: which numbers, such as ' under "Sold"'. `sign`: their unit.
    """
    asked: list[Pair] = []
    for extreme, best in (("lowest", min(found.values())), ("highest", max(found.values()))):
        names = [name for name, value in found.items() if value == best]
        if len(names) == 1:
            asked.append((f"Which {kind} has the {extreme} value{of}?", names[0]))
        asked.append((f"What is the {extreme} value{of}?", number(best) + sign))
    a, b = some(rng, list(found), 2)
    asked.append((f"What is the sum of {a} and {b}{of}?", number(found[a] + found[b]) + sign))
    asked.append((f"What is the difference between {a} and {b}{of}?", number(abs(found[a] - found[b])) + sign))
    if found[a] != found[b]:
        asked.append((f"Is {a} larger than {b}{of}?", "Yes" if found[a] > found[b] else "No"))
    return asked


def number(value: float) -> str:
    """As in 12 for 12.0, and 2.5 for 2.500001."""
    return f"{value:.10g}"


# --- sheets -------------------------------------------------------------------------------------------------------


class Sheet:
    """A picture to draw on. ImageDraw has no anti-aliasing, so it is drawn `scale` times larger and reduced.

    All coordinates and sizes are pixels of the finished picture.
    """

    def __init__(self, width: int, height: int, paper: Colour, scale: int = 1) -> None:
        self.width, self.height, self.paper, self.scale = width, height, paper, scale
        self.image = Image.new("RGB", (width * scale, height * scale), paper)
        self.draw = ImageDraw.Draw(self.image)
        self.texts: list[Box] = []

    def drawing(self, rng: np.random.Generator, asked: Sequence[Pair], data: dict[str, Any]) -> Drawing:
        """The finished picture with at most MOST_QUESTIONS of the questions."""
        image = self.image.reduce(self.scale) if self.scale > 1 else self.image
        return Drawing(image, pairs(rng, asked, MOST_QUESTIONS), data, self.texts)

    def measure(self, text: str, font: Type) -> float:
        """Width of a line of text, pixels."""
        return text_width(text, font.path, max(1, round(font.size * self.scale))) / self.scale

    def text(self, x: float, y: float, text: str, font: Type, ink: Colour, anchor: str = "la", turn: int = 0) -> None:
        """`turn`: degrees counter-clockwise; if not 0, x and y are the middle of the text."""
        s = self.scale
        face = load_font(font.path, max(1, round(font.size * s)))
        if turn:
            left, top, right, bottom = face.getbbox(text)
            mask = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
            ImageDraw.Draw(mask).text((1 - left, 1 - top), text, fill=255, font=face)
            mask = mask.rotate(turn, Image.Resampling.BICUBIC, expand=True)
            corner = (round(x * s - mask.width / 2), round(y * s - mask.height / 2))
            self.image.paste(ink, (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)
            box: Box = (corner[0], corner[1], corner[0] + mask.width, corner[1] + mask.height)
        else:
            self.draw.text((x * s, y * s), text, fill=ink, font=face, anchor=anchor)
            box = self.draw.textbbox((x * s, y * s), text, font=face, anchor=anchor)
        self.texts.append((box[0] / s, box[1] / s, box[2] / s, box[3] / s))

    def wrap(self, text: str, font: Type, width: float) -> list[str]:
        """Lines of at most `width` pixels, or of a single word."""
        lines: list[str] = []
        for word in text.split():
            if lines and self.measure(f"{lines[-1]} {word}", font) <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
        return lines

    def line(self, points: Sequence[tuple[float, float]], ink: Colour, width: float = 1) -> None:
        """Draw a line through `points`, `width` pixels thick."""
        s = self.scale
        self.draw.line([(x * s, y * s) for x, y in points], fill=ink, width=max(1, round(width * s)), joint="curve")

    def box(
        self, box: Box, fill: Colour | None = None, outline: Colour | None = None, width: float = 1, radius: float = 0
    ) -> None:
        """Draw a rectangle with corners rounded by `radius` pixels."""
        s = self.scale
        corners = (box[0] * s, box[1] * s, box[2] * s, box[3] * s)
        self.draw.rounded_rectangle(corners, radius * s, fill, outline, max(1, round(width * s)))

    def ellipse(self, box: Box, fill: Colour | None = None, outline: Colour | None = None, width: float = 1) -> None:
        """Draw the ellipse that fills `box`."""
        s = self.scale
        self.draw.ellipse((box[0] * s, box[1] * s, box[2] * s, box[3] * s), fill, outline, max(1, round(width * s)))

    def polygon(self, points: Sequence[tuple[float, float]], fill: Colour, outline: Colour | None = None) -> None:
        """Draw a filled polygon; an outline is 2 pixels thick."""
        s = self.scale
        self.draw.polygon([(x * s, y * s) for x, y in points], fill, outline, width=s * 2)


# --- photographs and screenshots ----------------------------------------------------------------------------------


def photographed(rng: np.random.Generator, page: Image.Image) -> Image.Image:
    """A photograph of a sheet of paper on a table: slightly turned, unevenly lit, soft and noisy."""
    edge = whole(rng, 8, 40)
    table = tuple(whole(rng, 30, 190) for _ in range(3))
    image = Image.new("RGB", (page.width + 2 * edge, page.height + 2 * edge), table)
    image.paste(page, (edge, edge))
    image = image.rotate(float(rng.uniform(-2.5, 2.5)), Image.Resampling.BICUBIC, fillcolor=table)
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.2, 0.7))))
    corners = Image.fromarray(rng.uniform(0.78, 1.04, (2, 2)).astype(np.float32))
    light = np.asarray(corners.resize(image.size, Image.Resampling.BILINEAR))  # [h, w]
    grain = rng.standard_normal(light.shape, dtype=np.float32) * float(rng.uniform(0, 6))
    rgb = np.asarray(image, np.float32) * light[..., None] + grain[..., None]
    return Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))


def softened(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """One in four pictures slightly smaller or softer, as screenshots become when shared."""
    chance = rng.random()
    if chance < 0.15:
        share = float(rng.uniform(0.8, 0.95))
        return image.resize((round(image.width * share), round(image.height * share)), Image.Resampling.BILINEAR)
    return image.filter(ImageFilter.GaussianBlur(0.5)) if chance < 0.25 else image


def encode(rng: np.random.Generator, image: Image.Image, photo: bool = False) -> tuple[bytes, str]:
    """(file contents, "jpg" or "png"). Photographs and half of the other pictures are JPEG."""
    buffer = io.BytesIO()
    if photo or rng.random() < 0.5:
        image.save(buffer, "JPEG", quality=whole(rng, 70, 95))
        return buffer.getvalue(), "jpg"
    image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue(), "png"
