"""What the formats of a points folder share: records of its pictures, and checks of values.

Files are read first, line by line. Then the pictures are decoded in parallel, because only decoding gives their
displayed size reliably: for rotated TIFF files, the header sizes that Pillow reports differ between its versions.
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

NAMED = 10  # pictures, rows or shapes listed in a message
_DISTORTED = 0.02  # tolerance of the aspect ratio given in annotations
_DECODERS = 8  # pictures decoded at once; each takes three bytes per pixel
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class PointsError(MolmoEdgeError):
    """A folder cannot be used for training. The message names the file and the line or item."""


@dataclass(frozen=True)
class Frame:
    """The size of a picture according to the annotations, to which their pixels refer."""

    width: float | None  # None: not given; the other side must then equal the displayed one
    height: float | None
    where: str


@dataclass(frozen=True)
class Mark:
    """A point as read."""

    label: str
    x: float
    y: float
    frame: Frame | str  # PERCENT, SHOWN (pixels of the displayed picture), or the size that pixels refer to
    where: str


PERCENT, SHOWN = "percent", "shown"


@dataclass
class PictureRecord:
    """Everything read about one picture."""

    name: str  # as in the annotations
    path: Path
    is_there: bool
    frames: list[Frame] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    none: dict[str, str] = field(default_factory=dict)  # absent label -> the line that states so
    unsure: set[str] = field(default_factory=set)  # present labels without a point for every instance
    questions: list[tuple[str, str]] = field(default_factory=list)  # and answers
    seen: set[tuple[Any, ...]] = field(default_factory=set)  # to detect repetitions


@dataclass
class Records:
    """The records of all pictures that the files of a folder name."""

    folder: Path
    pictures: list[PictureRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _by_path: dict[str, PictureRecord] = field(default_factory=dict)
    _by_likeness: dict[str, list[PictureRecord]] = field(default_factory=dict)
    _repeated: list[str] = field(default_factory=list)
    _skipped: list[str] = field(default_factory=list)

    def picture(self, name: Any, where: str, beside: Path | None = None) -> PictureRecord:
        """The record of the picture `name`, named at `where`.

        `beside`: the folder of the annotation file, if it is not the points folder. Raises PointsError.
        """
        if not isinstance(name, str) or not name.strip():
            raise PointsError(f'{where} does not name a picture: "image" is empty')
        name = _unicode(name, where, "the picture's name").strip().replace("\\", "/")  # LabelMe writes Windows paths
        roots = (beside or self.folder, self.folder, self.folder / "images")
        exact = next((root / name for root in roots if os.path.isfile(root / name)), None)
        try:
            path = exact or next(filter(None, (find_file(root, name) for root in roots)), None)
        except FileNameError as error:
            raise PointsError(f"{where}: {error}") from None
        key = os.path.normpath(path or roots[0] / name)
        if key not in self._by_path:
            self._by_path[key] = self._alike(key) or self._new_picture(name, key, is_there=path is not None)
        return self._by_path[key]

    def _alike(self, key: str) -> PictureRecord | None:
        """The record of the same file under another spelling, on file systems that ignore case or Unicode forms."""
        alike = self._by_likeness.get(_likeness(key), ())
        return next((picture for picture in alike if _same_file(picture.path, Path(key))), None)

    def _new_picture(self, name: str, key: str, *, is_there: bool) -> PictureRecord:
        picture = PictureRecord(name, Path(key), is_there)
        self.pictures.append(picture)
        self._by_likeness.setdefault(_likeness(key), []).append(picture)
        return picture

    def frame(self, picture: PictureRecord, width: Any, height: Any, where: str) -> Frame | str:
        """What the pixels at `where` refer to: the given size, or the displayed picture if there is none."""
        w, h = (number(value, where, name) if value else None for value, name in ((width, "width"), (height, "height")))
        if w is None and h is None:
            return SHOWN
        if (w is not None and w <= 0) or (h is not None and h <= 0):
            raise PointsError(f"{where} gives a picture size of {_sides(w, h)} pixels: correct its width and height")
        picture.frames.append(Frame(w, h, where))
        return picture.frames[-1]

    def add(
        self,
        picture: PictureRecord,
        label: Any,
        xy: tuple[float, float],
        frame: Frame | str,
        where: str,
        shape: tuple[Any, ...],
    ) -> None:
        """Add a point. `shape`: identifies the annotated shape: the same one with the same label counts once."""
        name = label_of(label, where)
        if self._is_new(picture, ("point", name, *shape), where):
            picture.marks.append(Mark(name, *xy, frame, where))

    def add_none(self, picture: PictureRecord, label: Any, where: str) -> None:
        """Add a label that is not in the picture."""
        name = label_of(label, where)
        if self._is_new(picture, ("none", name), where):
            picture.none[name] = where

    def add_question(self, picture: PictureRecord, question: str, answer: str, where: str) -> None:
        """Add a question about a picture, unless the picture has the same question with the same answer."""
        if self._is_new(picture, ("question", question, answer), where):
            picture.questions.append((question, answer))

    def crowd(self, picture: PictureRecord, label: Any, where: str) -> None:
        """Add a label with too many instances to tell apart."""
        picture.unsure.add(label_of(label, where))

    def skip(self, picture: PictureRecord, label: Any, where: str, why: str) -> None:
        """Skip an instance of `label` that has no point. The label can then be neither counted nor called absent."""
        name = label_of(label, where)
        picture.unsure.add(name)
        self._skipped.append(f'{where} {why}: it is skipped, and nothing is asked about "{name}" in {picture.name}')

    def _is_new(self, picture: PictureRecord, key: tuple[Any, ...], where: str) -> bool:
        if key in picture.seen:
            self._repeated.append(f"{where} ({picture.name})")
            return False
        picture.seen.add(key)
        return True

    def finish(self) -> None:
        """Decode the pictures and convert all points to percent.

        Raises PointsError if pictures are missing or damaged, a size is wrong, or a point is outside its picture.
        """
        sizes, missing = self._sizes()
        if missing:
            count = f"{len(missing)} of the {len(self.pictures)} pictures named in {self.folder} cannot be used"
            raise PointsError(f"{count}: {_listed(missing)}")
        for picture, size in zip(self.pictures, sizes, strict=True):
            for frame in picture.frames:
                _check_shape(frame, picture, size)
            picture.marks = [_in_percent(mark, picture, size) for mark in picture.marks]
        if self._repeated:
            self.notes.append(f"repeated annotations, counted once: {_listed(self._repeated)}")
        self.notes += self._skipped[:NAMED]
        if len(self._skipped) > NAMED:
            self.notes.append(f"{len(self._skipped) - NAMED} more shapes are skipped for similar reasons")

    def _sizes(self) -> tuple[list[tuple[int, int]], list[str]]:
        """(displayed width and height of each picture, errors)."""

        def size(picture: PictureRecord) -> tuple[int, int] | str:
            if not picture.is_there:
                return f"{printable(picture.name)} does not exist"
            try:
                height, width = load_image(picture.path).shape[:2]
            except ImageError as error:
                return f"{printable(picture.name)} cannot be read: {error}"
            return width, height

        with ThreadPoolExecutor(min(_DECODERS, available_cores())) as pool:
            found = list(pool.map(size, self.pictures))
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


def _check_shape(frame: Frame, picture: PictureRecord, size: tuple[int, int]) -> None:
    """Raise PointsError if the picture was rotated or cropped after it was annotated. Scaling is allowed."""
    if frame.width and frame.height:
        change = (frame.width / frame.height) / (size[0] / size[1])
    else:
        change = frame.width / size[0] if frame.width else (frame.height or 0) / size[1]
    if not abs(change - 1) <= _DISTORTED:
        found = f"{picture.path.name} is displayed with {size[0]} x {size[1]}: was it rotated or cropped afterwards?"
        raise PointsError(
            f"{frame.where} gives a picture size of {_sides(frame.width, frame.height)} pixels, but {found}"
        )


def _sides(width: float | None, height: float | None) -> str:
    return " x ".join("?" if side is None else f"{side:g}" for side in (width, height))


def _in_percent(mark: Mark, picture: PictureRecord, size: tuple[int, int]) -> Mark:
    """The point in percent. Raises PointsError, in the unit of the annotation, if it is outside the picture."""
    width, height = (100.0, 100.0) if mark.frame == PERCENT else map(float, size)
    if isinstance(mark.frame, Frame) and mark.frame.width and mark.frame.height:
        width, height = mark.frame.width, mark.frame.height
    if not (0 <= mark.x <= width and 0 <= mark.y <= height):
        unit = "percent" if mark.frame == PERCENT else "pixels"
        sides = "" if mark.frame == PERCENT else f", {width:g} x {height:g} pixels"
        at = f"it is at {mark.x:.6g} and {mark.y:.6g} {unit}"
        raise PointsError(f"{mark.where} has a point outside of {picture.path.name}{sides}: {at}")
    if mark.frame == PERCENT:
        return mark
    x, y = 100 * mark.x / width, 100 * mark.y / height
    return Mark(mark.label, min(x, 100.0), min(y, 100.0), PERCENT, mark.where)  # rounding may slightly exceed 100


# --- values -----------------------------------------------------------------------------------------------------------


def label_of(label: Any, where: str) -> str:
    """A label in lower case, as in prompts. Raises PointsError."""
    if label is not None and not isinstance(label, str):
        raise PointsError(f"{where} has the label {shown(label)}, which is not a text")
    if not label or not label.strip():
        raise PointsError(f"{where} has no label: name the object")
    name = _unicode(label, where, "the label").strip()
    if "<" in name or ">" in name:  # answers contain tags
        raise PointsError(f"{where} has the label {shown(name)}: leave out < and >")
    if not all(map(_is_of_a_line, name)):
        raise PointsError(f"{where} has the label {shown(name)}: a label is one line of text")
    return name.lower()


def _is_of_a_line(character: str) -> bool:
    return unicodedata.category(character) not in ("Cc", "Zl", "Zp")


def text_of(value: Any, where: str, what: str) -> str:
    """A text that is not blank. Raises PointsError."""
    if not isinstance(value, str) or not value.strip():
        raise PointsError(f"{where} needs {what}")
    return _unicode(value, where, "a text").strip()


def _unicode(text: str, where: str, what: str) -> str:
    """`text`. Raises PointsError for lone surrogates and NUL, which file systems and tokenizers reject."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise PointsError(f"{where}: {what} is damaged: {shown(text)} has invalid characters")
    return text


def number(value: Any, where: str, name: str) -> float:
    """A finite number, or the number that a text states. Raises PointsError."""
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
    """A value for a message: shortened, unprintable characters escaped."""
    text = repr(value)
    text = text if text.isprintable() else ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


Reader = Callable[[Path, Records], None]
