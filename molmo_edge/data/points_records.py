"""What all formats of a points folder share: its pictures, what was read about them, and how values are checked.

Files are read first, line by line. Pictures are decoded after that, several at a time, because only a decoded picture
tells reliably how large it is shown: Pillow's header sizes of turned TIFF files differ between its versions.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.image_files import ImageError, load_image
from molmo_edge.system.cores import available_cores
from molmo_edge.system.files import FileNameError, find_file, printable

NAMED = 10  # pictures, rows or shapes that a message lists
_DISTORTED = 0.02  # a size in the annotations may be that much off in shape
_DECODERS = 8  # pictures that are decoded at once: each takes three bytes a pixel
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class PointsError(MolmoEdgeError):
    """A folder that cannot be trained on. The message names the file and the line or item at fault."""


@dataclass(frozen=True)
class Frame:
    """The size that annotations give for a picture, which their pixels count in."""

    width: float | None  # None: not given, so that the other has to be the shown picture's
    height: float | None
    where: str


@dataclass(frozen=True)
class Mark:
    """A point as it was read."""

    label: str
    x: float
    y: float
    frame: Frame | str  # PERCENT, SHOWN (pixels of the shown picture), or the size that pixels count in
    where: str


PERCENT, SHOWN = "percent", "shown"


@dataclass
class Page:
    """What was read about one picture."""

    name: str  # as the annotations have it
    path: Path
    is_there: bool
    frames: list[Frame] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    none: dict[str, str] = field(default_factory=dict)  # label -> the place that says that there are none
    unsure: set[str] = field(default_factory=set)  # labels that are in the picture, but not all of them marked
    questions: list[tuple[str, str]] = field(default_factory=list)  # and answers
    seen: set[tuple[Any, ...]] = field(default_factory=set)  # what was read, to notice what is said twice


@dataclass
class Book:
    """All pictures that a folder's files name."""

    folder: Path
    pages: list[Page] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _by_path: dict[str, Page] = field(default_factory=dict)
    _by_likeness: dict[str, list[Page]] = field(default_factory=dict)
    _repeated: list[str] = field(default_factory=list)
    _skipped: list[str] = field(default_factory=list)

    def page(self, name: Any, where: str, beside: Path | None = None) -> Page:
        """The page of the picture `name`, which `where` names.

        beside: the folder of the annotation file, if it is not the points folder. Raises PointsError.
        """
        if not isinstance(name, str) or not name.strip():
            raise PointsError(f'{where} names no picture: "image" is empty')
        name = _unicode(name, where, "the picture's name").strip().replace("\\", "/")  # LabelMe writes Windows paths
        roots = (beside or self.folder, self.folder, self.folder / "images")
        exact = next((root / name for root in roots if os.path.isfile(root / name)), None)
        try:
            path = exact or next(filter(None, (find_file(root, name) for root in roots)), None)
        except FileNameError as error:
            raise PointsError(f"{where}: {error}") from None
        key = os.path.normpath(path or roots[0] / name)
        if key not in self._by_path:
            self._by_path[key] = self._alike(key) or self._new_page(name, key, is_there=path is not None)
        return self._by_path[key]

    def _alike(self, key: str) -> Page | None:
        """The page of the same file by another spelling, where a file system takes several for one name."""
        alike = self._by_likeness.get(_likeness(key), ())
        return next((page for page in alike if _same_file(page.path, Path(key))), None)

    def _new_page(self, name: str, key: str, *, is_there: bool) -> Page:
        page = Page(name, Path(key), is_there)
        self.pages.append(page)
        self._by_likeness.setdefault(_likeness(key), []).append(page)
        return page

    def frame(self, page: Page, width: Any, height: Any, where: str) -> Frame | str:
        """What the pixels of `where` count in: the size that it gives, or the shown picture's where it gives none."""
        w, h = (number(value, where, name) if value else None for value, name in ((width, "width"), (height, "height")))
        if w is None and h is None:
            return SHOWN
        if (w is not None and w <= 0) or (h is not None and h <= 0):
            raise PointsError(f"{where} is about a picture of {_sides(w, h)} pixels: correct its width and height")
        page.frames.append(Frame(w, h, where))
        return page.frames[-1]

    def add(
        self, page: Page, label: Any, xy: tuple[float, float], frame: Frame | str, where: str, shape: tuple[Any, ...]
    ) -> None:
        """A point. `shape`: what it is the middle of: the same one with the same label counts once."""
        name = label_of(label, where)
        if self._is_new(page, ("point", name, *shape), where):
            page.marks.append(Mark(name, *xy, frame, where))

    def add_none(self, page: Page, label: Any, where: str) -> None:
        """A label that is nowhere in the picture."""
        name = label_of(label, where)
        if self._is_new(page, ("none", name), where):
            page.none[name] = where

    def add_question(self, page: Page, question: str, answer: str, where: str) -> None:
        if self._is_new(page, ("question", question, answer), where):
            page.questions.append((question, answer))

    def crowd(self, page: Page, label: Any, where: str) -> None:
        """A label that is in the picture too often to tell its instances apart."""
        page.unsure.add(label_of(label, where))

    def skip(self, page: Page, label: Any, where: str, why: str) -> None:
        """Something of `label` that has no point. Neither its number nor "there are none" would then be true."""
        name = label_of(label, where)
        page.unsure.add(name)
        self._skipped.append(f'{where} {why}: it is skipped, and nothing is asked about "{name}" in {page.name}')

    def _is_new(self, page: Page, key: tuple[Any, ...], where: str) -> bool:
        if key in page.seen:
            self._repeated.append(f"{where} ({page.name})")
            return False
        page.seen.add(key)
        return True

    def finish(self) -> None:
        """Decode the pictures and turn all marks into percent.

        Raises PointsError where pictures are missing or damaged, a size is wrong or a point lies outside.
        """
        sizes, missing = self._sizes()
        if missing:
            said = f"{len(missing)} of the {len(self.pages)} pictures that {self.folder} names are of no use"
            raise PointsError(f"{said}: {_listed(missing)}")
        for page, size in zip(self.pages, sizes, strict=True):
            for frame in page.frames:
                _check_shape(frame, page, size)
            page.marks = [_in_percent(mark, page, size) for mark in page.marks]
        if self._repeated:
            self.notes.append(f"read before, so it counts once: {_listed(self._repeated)}")
        self.notes += self._skipped[:NAMED]
        if len(self._skipped) > NAMED:
            self.notes.append(f"{len(self._skipped) - NAMED} more shapes are skipped for such reasons")

    def _sizes(self) -> tuple[list[tuple[int, int]], list[str]]:
        """(width and height of each page's picture as it is shown, what is wrong with pictures)."""

        def size(page: Page) -> tuple[int, int] | str:
            if not page.is_there:
                return f"{printable(page.name)} is not there"
            try:
                height, width = load_image(page.path).shape[:2]
            except ImageError as error:
                return f"{printable(page.name)} is no picture that can be read: {error}"
            return width, height

        with ThreadPoolExecutor(min(_DECODERS, available_cores())) as pool:
            found = list(pool.map(size, self.pages))
        return [each for each in found if not isinstance(each, str)], [each for each in found if isinstance(each, str)]


def _likeness(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def _same_file(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def _listed(things: list[str]) -> str:
    more = f" and {len(things) - NAMED} more" if len(things) > NAMED else ""
    return ", ".join(things[:NAMED]) + more


def _check_shape(frame: Frame, page: Page, size: tuple[int, int]) -> None:
    """A picture that was scaled since it was annotated keeps its shape; one that was turned or cut does not."""
    if frame.width and frame.height:
        change = (frame.width / frame.height) / (size[0] / size[1])
    else:
        change = frame.width / size[0] if frame.width else (frame.height or 0) / size[1]
    if not abs(change - 1) <= _DISTORTED:
        found = f"{page.path.name} is shown with {size[0]} x {size[1]}: was it turned or cut afterwards?"
        raise PointsError(
            f"{frame.where} is about a picture of {_sides(frame.width, frame.height)} pixels, but {found}"
        )


def _sides(width: float | None, height: float | None) -> str:
    return " x ".join("?" if side is None else f"{side:g}" for side in (width, height))


def _in_percent(mark: Mark, page: Page, size: tuple[int, int]) -> Mark:
    """The same point in percent. Raises PointsError outside of the picture, in the unit that it was read in."""
    width, height = (100.0, 100.0) if mark.frame == PERCENT else map(float, size)
    if isinstance(mark.frame, Frame) and mark.frame.width and mark.frame.height:
        width, height = mark.frame.width, mark.frame.height
    if not (0 <= mark.x <= width and 0 <= mark.y <= height):
        unit = "percent" if mark.frame == PERCENT else "pixels"
        sides = "" if mark.frame == PERCENT else f", {width:g} x {height:g} pixels"
        at = f"it is at {mark.x:.6g} and {mark.y:.6g} {unit}"
        raise PointsError(f"{mark.where} has a point outside of {page.path.name}{sides}: {at}")
    if mark.frame == PERCENT:
        return mark
    x, y = 100 * mark.x / width, 100 * mark.y / height
    return Mark(mark.label, min(x, 100.0), min(y, 100.0), PERCENT, mark.where)  # rounding may exceed 100 by a little


# --- values -----------------------------------------------------------------------------------------------------------


def label_of(label: Any, where: str) -> str:
    """A label as prompts have it: "Cup" and "cup" are one. Raises PointsError."""
    if label is not None and not isinstance(label, str):
        raise PointsError(f"{where} has the label {shown(label)}, which is not a text")
    if not label or not label.strip():
        raise PointsError(f"{where} has no label: name what the point is on")
    name = _unicode(label, where, "the label").strip()
    if "<" in name or ">" in name:  # an answer is written in tags
        raise PointsError(f"{where} has the label {shown(name)}: leave out < and >")
    if not all(map(_is_of_a_line, name)):
        raise PointsError(f"{where} has the label {shown(name)}: a label is one line of text")
    return name.lower()


def _is_of_a_line(character: str) -> bool:
    return unicodedata.category(character) not in ("Cc", "Zl", "Zp")


def text_of(value: Any, where: str, what: str) -> str:
    """A text that says something. Raises PointsError."""
    if not isinstance(value, str) or not value.strip():
        raise PointsError(f"{where} needs {what}")
    return _unicode(value, where, "a text").strip()


def _unicode(text: str, where: str, what: str) -> str:
    """`text`, unless it has half of a surrogate pair or a NUL, which neither files nor tokenizers take."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise PointsError(f"{where}: {what} is damaged, {shown(text)} has characters that no text has")
    return text


def number(value: Any, where: str, name: str) -> float:
    """A finite number, or a text that is exactly one. Raises PointsError."""
    text = value.strip() if isinstance(value, str) else None
    try:
        if not isinstance(value, bool) and (text is None or _NUMBER.fullmatch(text)):
            found = float(value)
            if math.isfinite(found):
                return found
    except (TypeError, ValueError, OverflowError):
        pass
    hint = ": write decimals with a point" if text and re.fullmatch(r"[+-]?\d*,\d+", text) else ""
    raise PointsError(f"{where}: {name} is {shown(value)}, not a number{hint}")


def shown(value: Any) -> str:
    """A value for an error: ASCII escapes for what cannot be printed, and not too long."""
    text = repr(value)
    text = text if text.isprintable() else ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


Reader = Callable[[Path, Book], None]
