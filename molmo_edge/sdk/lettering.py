"""Draw one line of text in any script. Pillow's built-in font has only ASCII letters.

Characters come from the embedded font (a subset of DejaVu Sans: Latin, Greek, Cyrillic, Armenian, Georgian, Hebrew,
Arabic, signs and symbols), else from an installed font that has them. A character that no font has is written as its
compatibility form ("ａ" as "a"), its name ("[dog face]") or its code point ("[U+732B]"). Scripts that join or reorder
letters (Arabic, Devanagari) need a Pillow with Raqm, which the wheels on PyPI include.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageDraw, ImageFont

from molmo_edge.system.lazy import cached_property

EMBEDDED = Path(__file__).parent.parent / "fonts" / "DejaVuSans-subset.ttf"

# File names, without suffix, of system fonts for other scripts, in order of preference.
_SYSTEM_FONTS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"NotoSans(Mono)?CJK.*-Regular|SourceHanSans.*-Regular",  # Linux
        r"wqy-(micro|zen)hei|DroidSansFallback(Full)?|NanumGothic|ipag|ipagp|TakaoGothic|uming|VL-Gothic-Regular",
        r"Arial Unicode|PingFang|Hiragino Sans GB|AppleSDGothicNeo|Apple Symbols",  # macOS
        r"msyh|YuGothM|malgun|simsun|msgothic|msjh|Nirmala|LeelawUI|ebrima|gadugi|seguisym|seguiemj",  # Windows
        r"Noto(Sans|SansSymbols2?|Emoji)\w*-Regular|Symbola.*|unifont",
    )
)
_SUFFIXES = (".ttf", ".ttc", ".otf", ".otc")
_NO_CHARACTER = "\uffff"  # in no font: rendered as the glyph for missing characters
_SAMPLE_SIZE = 24  # pixels, to test whether a font has a character
_SKIPPED = {"Cc", "Cf"}  # control and format characters: joiners, directions
_MODIFIERS = re.compile("[\ufe00-\ufe0f\U0001f3fb-\U0001f3ff]")  # variation selectors and skin tones of emoji


@dataclass(frozen=True)
class Line:
    """Text to draw on one baseline, in pieces of one font each."""

    pieces: tuple[tuple[str, ImageFont.FreeTypeFont], ...]

    @cached_property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the ink in pixels, relative to the start of the baseline; zeros without ink."""
        boxes = []
        x = 0.0
        for text, font in self.pieces:
            left, top, right, bottom = font.getbbox(text, anchor="ls")
            boxes.append((x + left, top, x + right, bottom))
            x += font.getlength(text)
        if not boxes:
            return 0, 0, 0, 0
        lefts, tops, rights, bottoms = zip(*boxes, strict=True)
        return round(min(lefts)), round(min(tops)), round(max(rights)), round(max(bottoms))

    def draw(self, draw: ImageDraw.ImageDraw, x: float, y: float, fill: tuple[int, ...]) -> None:
        """Draw with the top left corner of `box` at (x, y) in pixels."""
        left, top, _, _ = self.box
        x, y = x - left, y - top
        for text, font in self.pieces:
            draw.text((x, y), text, font=font, fill=fill, anchor="ls")
            x += font.getlength(text)


def line(text: str, size: float, width: float | None = None) -> Line:
    """Lay out `text` on one line, with letters of `size` pixels.

    `width`: the limit on the ink in pixels; longer text ends in an ellipsis. Raises OSError if Pillow lacks FreeType.
    """
    text = " ".join(unicodedata.normalize("NFC", text).split())
    whole = Line(tuple(_pieces(text, size)))
    if width is None or _width(whole) <= width:
        return whole
    low, high = 0, len(text) - 1  # binary search for the longest beginning that fits
    while low < high:
        middle = (low + high + 1) // 2
        if _width(Line(tuple(_pieces(text[:middle].rstrip() + "…", size)))) <= width:
            low = middle
        else:
            high = middle - 1
    return Line(tuple(_pieces(text[:low].rstrip() + "…", size)))


def embedded_font(size: float) -> ImageFont.FreeTypeFont:
    """The font in the package, at `size` pixels."""
    return _load(EMBEDDED, size)


def _width(line: Line) -> int:
    left, _, right, _ = line.box
    return right - left


def _pieces(text: str, size: float) -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
    chosen: list[tuple[str, Path | None]] = []
    last: Path | None = EMBEDDED
    for cluster in _clusters(text):
        # Keep the font if it has the cluster: a space between two Chinese words does not split them.
        if last is None or not _has(last, cluster):
            last = font_with(cluster)
        chosen.append((cluster, last))
    for path, group in itertools.groupby(chosen, key=lambda each: each[1]):
        written = "".join(cluster for cluster, _ in group)
        yield (written, _load(path, size)) if path else (_spelled_out(written), _load(EMBEDDED, size))


def _clusters(text: str) -> list[str]:
    """Split into characters with their combining marks: an accent never comes from another font."""
    clusters: list[str] = []
    for character in _MODIFIERS.sub("", text):
        category = unicodedata.category(character)
        if category.startswith("M") and clusters:
            clusters[-1] += character
        elif category not in _SKIPPED:
            clusters.append(character)
    return clusters


def _spelled_out(characters: str) -> str:
    simple = unicodedata.normalize("NFKD", characters)
    if all(_has(EMBEDDED, character) for character in simple):
        return simple
    return f"[{', '.join(map(_name, characters))}]"


def _name(character: str) -> str:
    if unicodedata.category(character).startswith("S"):  # symbols: their names describe them
        return unicodedata.name(character, f"U+{ord(character):04X}").lower()
    return f"U+{ord(character):04X}"


@functools.lru_cache(maxsize=4096)
def font_with(cluster: str) -> Path | None:
    """The first font file that has all characters of `cluster`; None if there is none."""
    return next((path for path in (EMBEDDED, *system_fonts()) if _has(path, cluster)), None)


@functools.lru_cache(maxsize=16384)
def _has(path: Path, cluster: str) -> bool:
    if len(cluster) > 1:
        return all(_has(path, character) for character in cluster)
    try:
        mask = _mask(path, cluster)
        return cluster.isspace() or (any(mask) and mask != _mask(path, _NO_CHARACTER))
    except (OSError, ValueError):  # not a scalable font, or a lone surrogate
        return False


@functools.lru_cache(maxsize=4096)
def _mask(path: Path, character: str) -> bytes:
    # Without Raqm, which draws a dotted circle under a lone accent.
    font = ImageFont.truetype(str(path), _SAMPLE_SIZE, layout_engine=ImageFont.Layout.BASIC)
    return bytes(font.getmask(character))


@functools.lru_cache(maxsize=256)
def _load(path: Path, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size)


@functools.lru_cache(maxsize=1)
def system_fonts() -> tuple[Path, ...]:
    """Return the installed fonts for scripts that the embedded font lacks, in order of preference. Cached."""
    found: list[tuple[int, Path]] = []
    for folder in font_folders():
        for at, _, names in os.walk(folder):
            for name in names:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in _SUFFIXES:
                    ranks = (i for i, pattern in enumerate(_SYSTEM_FONTS) if pattern.fullmatch(stem))
                    if (rank := next(ranks, None)) is not None:
                        found.append((rank, Path(at, name)))
    return tuple(path for _, path in sorted(found))


def font_folders() -> list[Path]:
    """The folders in which this system keeps its fonts."""
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        local = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
        return [Path(os.environ.get("WINDIR", r"C:\Windows")) / "Fonts", local / "Microsoft" / "Windows" / "Fonts"]
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library" / "Fonts"]
    data = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    own = os.environ.get("XDG_DATA_HOME") or str(home / ".local" / "share")
    return [Path(folder) / "fonts" for folder in (own, *data.split(":"))] + [home / ".fonts"]
