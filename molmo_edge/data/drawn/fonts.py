"""Fonts of drawings: which files are used, and opened fonts kept in memory."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ImageFont

from molmo_edge.errors import MolmoEdgeError

_LETTERS = "ABCXYZabcxyz0189$%#&()[]{}<>=+-*/_.,:;'\"!?@|"  # a font without one of these is not used
SCENE_FAMILIES = (
    "DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "LiberationSans", "LiberationSerif", "OpenSans", "Lato", "Inter-",
    "Carlito", "ComicNeue", "FiraCode",
)  # fmt: skip
_HARD_TO_READ = re.compile("Thin|Hairline|Light|MathTeX|ExtLt|Black")


class FontError(MolmoEdgeError):
    """A folder without a usable font, or a Pillow that cannot draw text."""


@dataclass(frozen=True)
class Face:
    """Font files of one family; None: the font that Pillow includes (a subset of Aileron)."""

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
class Lettering:
    """A family at a basic size in pixels."""

    face: Face
    size: float

    def font(self, scale: float = 1.0, bold: bool = False) -> Type:
        """The font at `scale` times the basic size."""
        return Type(self.face.bold if bold else self.face.regular, self.size * scale)


@dataclass(frozen=True)
class Fonts:
    """The fonts of drawn pages. Without `mono`, code is set letter by letter on a grid."""

    faces: tuple[Face, ...] = (Face(),)
    mono: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All files but `mono`, sorted; empty where there is only Pillow's font."""
        return tuple(sorted({path for face in self.faces for path in (face.regular, face.bold) if path is not None}))


def find_fonts(folder: Path | None = None) -> Fonts:
    """matplotlib's DejaVu if it is installed, Pillow's own font, and all usable fonts below `folder`.

    Raises FontError if `folder` has no usable font.
    """
    files = _matplotlib_fonts()
    if folder is not None:
        added = sorted(path for path in folder.rglob("*.[ot]tf") if _is_usable(path))
        if not added:
            raise FontError(f"{folder} holds no .ttf or .otf font with Latin letters, digits and signs: check --fonts")
        files += added
    upright = [path for path in files if not re.search("Oblique|Italic", path.stem)]
    mono = [path for path in upright if re.search("Mono|Code", path.stem)]
    plain = [path for path in upright if path not in mono and "Bold" not in path.stem]
    faces = [Face(path, _bold_of(path, upright)) for path in plain]
    return Fonts((*faces, Face()), tuple(path for path in mono if "Bold" not in path.stem))


def find_scene_fonts(folder: str | Path = "/usr/share/fonts") -> tuple[Path, ...]:
    """Readable Latin fonts of SCENE_FAMILIES below `folder`, sorted. Raises FontError if there are none."""
    fonts = sorted(
        path
        for path in Path(folder).rglob("*.[ot]tf")
        if path.name.startswith(SCENE_FAMILIES) and not _HARD_TO_READ.search(path.stem)
    )
    if not fonts:
        raise FontError(f"{folder} holds none of the fonts {', '.join(SCENE_FAMILIES)}: install fonts-dejavu-core")
    return tuple(fonts)


def _matplotlib_fonts() -> list[Path]:
    spec = importlib.util.find_spec("matplotlib")  # located, not imported
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
    return [p for p in sorted(folder.glob("DejaVuS*.ttf")) if "Display" not in p.stem]


def _bold_of(path: Path, files: Sequence[Path]) -> Path:
    stem = path.stem.removesuffix("-Regular")
    return next((other for other in files if other.stem == f"{stem}-Bold"), path)


def _is_usable(path: Path) -> bool:
    """False for fonts of symbols or other scripts, which draw boxes instead of letters."""
    try:
        font = ImageFont.truetype(str(path), 24)
    except OSError:
        return False
    missing = bytes(font.getmask("\ue000"))
    return all(bytes(font.getmask(letter)) != missing for letter in _LETTERS)


def random_font(rng: np.random.Generator, fonts: Sequence[Path]) -> Path | None:
    """One of `fonts`; None, Pillow's own font, if there are none."""
    return fonts[int(rng.integers(len(fonts)))] if fonts else None


@lru_cache(maxsize=512)
def load_font(path: Path | None, size: int) -> ImageFont.FreeTypeFont:
    """A font, kept in memory: opening it takes longer than drawing a word. Raises FontError."""
    font = ImageFont.truetype(str(path), size) if path else ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise FontError("this Pillow was built without FreeType and cannot draw text: install the wheel from PyPI")
    return font


@lru_cache(maxsize=65536)
def text_width(text: str, path: Path | None, size: int) -> float:
    """Pixels."""
    return load_font(path, size).getlength(text)
