"""What all drawn pictures share: sheets, fonts, colours, invented names, questions, and the wear of a photograph.

Every picture is a pure function of its random generator and of the fonts: the same numbers, the same bytes.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from molmo_edge.data.drawn.rendered_words import load_font
from molmo_edge.errors import MolmoEdgeError

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]  # x0, y0, x1, y1, pixels
Pair = tuple[str, str]  # question, answer
T = TypeVar("T")

# Ten colours that a person tells apart and names at once.
COLOURS: dict[str, Colour] = {
    "red": (211, 47, 47), "orange": (245, 133, 24), "yellow": (250, 208, 44), "green": (56, 142, 60),
    "teal": (0, 150, 145), "blue": (33, 102, 200), "purple": (123, 50, 165), "pink": (240, 110, 170),
    "brown": (121, 78, 46), "gray": (128, 128, 128),
}  # fmt: skip
_LETTERS = "ABCXYZabcxyz0189$%#&()[]{}<>=+-*/_.,:;'\"!?@|"  # a font without one of these is of no use here


class DrawError(MolmoEdgeError):
    """A font folder without a usable font, or a generator that is asked for the impossible."""


@dataclass(frozen=True)
class Drawing:
    """A picture and what is known of it."""

    image: Image.Image  # RGB
    questions: list[Pair]
    data: dict[str, Any]  # what is drawn, plain JSON: the answers can be worked out from it
    texts: list[Box] = field(default_factory=list)  # where words stand


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def some(rng: np.random.Generator, options: Sequence[T], number: int) -> list[T]:
    """`number` different ones, or all where there are fewer, in a random order."""
    return [options[int(i)] for i in rng.permutation(len(options))[:number]]


def whole(rng: np.random.Generator, low: int, high: int) -> int:
    """low to high, both included."""
    return int(rng.integers(low, high + 1))


def pairs(rng: np.random.Generator, found: Sequence[Pair], most: int) -> list[Pair]:
    """At most `most` of them, in a random order; a question that stands there twice is asked once."""
    return some(rng, list(dict(found).items()), most)


def ink_on(colour: Colour) -> Colour:
    """Black or white, whichever is read better on `colour`."""
    return (0, 0, 0) if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140 else (255, 255, 255)


def number(value: float) -> str:
    """12 rather than 12.0, and 2.5 rather than 2.500001."""
    return f"{value:.10g}"


# --- fonts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Face:
    """Files of one family; None: Pillow's own font, which it carries (a subset of Aileron)."""

    regular: Path | None = None
    bold: Path | None = None


@dataclass(frozen=True)
class Type:
    """A font at a size in pixels of the finished picture."""

    path: Path | None
    size: float

    @property
    def line(self) -> float:
        """From one line of text to the next, pixels."""
        return self.size * 1.35


@dataclass(frozen=True)
class Fonts:
    """The fonts that pictures are lettered with. Without `mono`, code is set letter by letter on a grid."""

    faces: tuple[Face, ...] = (Face(),)
    mono: tuple[Path, ...] = ()


def find_fonts(folder: Path | None = None) -> Fonts:
    """matplotlib's DejaVu where that is installed, Pillow's own font, and all readable fonts below `folder`.

    Raises DrawError where `folder` has none that could be used.
    """
    files = _matplotlib_fonts()
    if folder is not None:
        own = sorted(path for path in folder.rglob("*.[ot]tf") if _is_usable(path))
        if not own:
            raise DrawError(f"{folder} holds no .ttf or .otf font with Latin letters, digits and signs: check --fonts")
        files += own
    slanted = ("Oblique", "Italic")
    upright = [path for path in files if not any(word in path.stem for word in slanted)]
    mono = [path for path in upright if "Mono" in path.stem or "Code" in path.stem]
    plain = [path for path in upright if path not in mono and "Bold" not in path.stem]
    faces = [Face(path, _bold_of(path, upright)) for path in plain]
    return Fonts((*faces, Face()), tuple(path for path in mono if "Bold" not in path.stem))


def _matplotlib_fonts() -> list[Path]:
    spec = importlib.util.find_spec("matplotlib")  # found, not imported
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
    return [p for p in sorted(folder.glob("DejaVuS*.ttf")) if "Display" not in p.stem]


def _bold_of(path: Path, files: Sequence[Path]) -> Path:
    stem = path.stem.removesuffix("-Regular")
    return next((other for other in files if other.stem == f"{stem}-Bold"), path)


def _is_usable(path: Path) -> bool:
    """False for fonts of signs or other scripts, which would show boxes instead of letters."""
    try:
        font = ImageFont.truetype(str(path), 24)
    except OSError:
        return False
    missing = bytes(font.getmask("\ue000"))
    return all(bytes(font.getmask(letter)) != missing for letter in _LETTERS)


@lru_cache(maxsize=65536)
def text_width(text: str, path: Path | None, size: int) -> float:
    return load_font(path, size).getlength(text)


# --- sheets -------------------------------------------------------------------------------------------------------


class Sheet:
    """A picture in the making. ImageDraw has no anti-aliasing, so it is drawn `scale` times larger and reduced.

    All coordinates and sizes are pixels of the finished picture.
    """

    def __init__(self, width: int, height: int, paper: Colour, scale: int = 1) -> None:
        self.width, self.height, self.paper, self.scale = width, height, paper, scale
        self.image = Image.new("RGB", (width * scale, height * scale), paper)
        self.draw = ImageDraw.Draw(self.image)
        self.texts: list[Box] = []

    def finished(self) -> Image.Image:
        return self.image.reduce(self.scale) if self.scale > 1 else self.image

    def measure(self, text: str, font: Type) -> float:
        """Width of a line of text, pixels."""
        return text_width(text, font.path, max(1, round(font.size * self.scale))) / self.scale

    def text(self, x: float, y: float, text: str, font: Type, ink: Colour, anchor: str = "la", turn: int = 0) -> None:
        """`turn`: degrees counter-clockwise, 90 for upwards; then x, y is the middle of the text."""
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
        """Lines no wider than `width` pixels; a single word may be."""
        lines: list[str] = []
        for word in text.split():
            if lines and self.measure(f"{lines[-1]} {word}", font) <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
        return lines

    def line(self, points: Sequence[tuple[float, float]], ink: Colour, width: float = 1) -> None:
        s = self.scale
        self.draw.line([(x * s, y * s) for x, y in points], fill=ink, width=max(1, round(width * s)), joint="curve")

    def box(
        self, box: Box, fill: Colour | None = None, outline: Colour | None = None, width: float = 1, radius: float = 0
    ) -> None:
        s = self.scale
        corners = (box[0] * s, box[1] * s, box[2] * s, box[3] * s)
        self.draw.rounded_rectangle(corners, radius * s, fill, outline, max(1, round(width * s)))

    def ellipse(self, box: Box, fill: Colour | None = None, outline: Colour | None = None, width: float = 1) -> None:
        s = self.scale
        self.draw.ellipse((box[0] * s, box[1] * s, box[2] * s, box[3] * s), fill, outline, max(1, round(width * s)))

    def polygon(self, points: Sequence[tuple[float, float]], fill: Colour, outline: Colour | None = None) -> None:
        s = self.scale
        self.draw.polygon([(x * s, y * s) for x, y in points], fill, outline, width=s * 2)


# --- wear ---------------------------------------------------------------------------------------------------------


def photographed(rng: np.random.Generator, page: Image.Image) -> Image.Image:
    """A sheet of paper as a camera sees it: a little turned, on a table, lit from one side, soft and noisy."""
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
    """One in four screen pictures as it was passed on: made a little smaller, or a little soft."""
    chance = rng.random()
    if chance < 0.15:
        share = float(rng.uniform(0.8, 0.95))
        return image.resize((round(image.width * share), round(image.height * share)), Image.Resampling.BILINEAR)
    return image.filter(ImageFilter.GaussianBlur(0.5)) if chance < 0.25 else image


def encode(rng: np.random.Generator, image: Image.Image, photo: bool = False) -> tuple[bytes, str]:
    """(the file, "jpg" or "png"). A photograph is always a JPEG; half of the others are, with its artefacts."""
    buffer = io.BytesIO()
    if photo or rng.random() < 0.5:
        image.save(buffer, "JPEG", quality=whole(rng, 70, 95))
        return buffer.getvalue(), "jpg"
    image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue(), "png"


# --- names --------------------------------------------------------------------------------------------------------


def _words(text: str, by: str | None = None) -> tuple[str, ...]:
    return tuple(text.split(by))


_FIRST = _words(
    "Ada Amir Anneke Bela Boris Carla Chidi Clara Dana Derek Elif Emil Esra Farid Freya Gita Goran Hana Hugo Ines Ivan "
    "Jonas Joyce Kofi Lara Leon Lucia Malik Marta Mei Milan Nadia Noah Olga Omar Paula Petra Quinn Rafael Rosa Samir "
    "Sofia Tariq Theo Uma Vera Viktor Wanda Yara Zeno"
)
_BEGIN = _words("Al Bar Bran Cal Dor El Far Gar Hal Kel Lan Mar Nor Or Pel Ran Sel Tor Ul Var Wel Yar")
_MIDDLE = _words("a e i o an en is or un ar")
_END = _words("berg dale den by ford mann ney ridge sen son stone ton tov well wick yama")
_TOWN = _words("bridge burgh bury field ford ham haven mouth port stead ton ville wick worth")
_TRADES = _words(
    "Supplies,Logistics,Foods,Tools,Print Works,Textiles,Energy,Garden Centre,Systems,Motors,Bakery,Books,Interiors,"
    "Sports,Optics,Travel,Pharmacy,Instruments,Paper,Hardware",
    ",",
)
_QUALITIES = _words("Basic Blue Classic Compact Deluxe Double Green Heavy Large Light Mini Plain Pro Red Small Soft")
_GOODS = _words(
    "Anchor,Apron,Basket,Bench,Blanket,Bottle,Bracket,Brush,Bucket,Cable,Candle,Chair,Clamp,Cushion,Desk,Drill,Filter,"
    "Folder,Frame,Gloves,Hammer,Handle,Helmet,Hinge,Hose,Kettle,Ladder,Lamp,Mirror,Mug,Notebook,Paint,Pan,Pen,Plate,"
    "Pump,Rope,Scarf,Shelf,Stapler,Stool,Tape,Teapot,Tent,Towel,Tray,Valve,Vase,Wheel,Wrench",
    ",",
)
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip


def surname(rng: np.random.Generator) -> str:
    return pick(rng, _BEGIN) + (pick(rng, _MIDDLE) if rng.random() < 0.4 else "") + pick(rng, _END)


def person(rng: np.random.Generator) -> str:
    return f"{pick(rng, _FIRST)} {surname(rng)}"


def first_names(rng: np.random.Generator, amount: int) -> list[str]:
    return some(rng, _FIRST, amount)


def town(rng: np.random.Generator) -> str:
    return pick(rng, _BEGIN) + pick(rng, _MIDDLE) + pick(rng, _TOWN)


def towns(rng: np.random.Generator, amount: int) -> list[str]:
    """Different ones."""
    found: dict[str, None] = {}
    while len(found) < amount:
        found[town(rng)] = None
    return list(found)


def company(rng: np.random.Generator) -> str:
    return f"{surname(rng)} {pick(rng, _TRADES)}"


def goods(rng: np.random.Generator, amount: int, short: bool = False) -> list[str]:
    """Different articles: "Tray", or where not `short`, "Soft Tray"."""
    names = some(rng, _GOODS, amount)
    return names if short else [f"{pick(rng, _QUALITIES)} {name}" for name in names]


def street(rng: np.random.Generator) -> str:
    return f"{whole(rng, 1, 199)} {surname(rng)} {pick(rng, ('Street', 'Road', 'Lane', 'Avenue', 'Square'))}"


def phone(rng: np.random.Generator) -> str:
    return f"({whole(rng, 201, 989)}) 555-01{whole(rng, 0, 99):02d}"  # kept free for stories


def date(rng: np.random.Generator, style: int, year: int | None = None, months: tuple[int, int] = (1, 12)) -> str:
    """In one of four ways of writing, within `months` of `year`; from 2010 to 2029 where that is None."""
    day, month = whole(rng, 1, 28), whole(rng, *months)
    year, name = year or whole(rng, 2010, 2029), MONTHS[month - 1]
    ways = (
        f"{day} {name} {year}",
        f"{name} {day}, {year}",
        f"{year}-{month:02d}-{day:02d}",
        f"{name[:3]} {day} {year}",
    )
    return ways[style % 4]


def money(cents: int) -> str:
    return f"${cents // 100:,}.{cents % 100:02d}"
