"""A folder of a user's own pictures, with points on them or with questions about them, as data sets to train on.

What the folder holds is told by its files, one way of saying where things are, and questions.jsonl beside it or alone:

    points.csv            image,label,x,y: pixels of the picture as it is shown, its EXIF orientation applied; or
                          image,label,x_percent,y_percent. A row without x and y says that there are none.
    rows.jsonl            PixMo-Points' columns: {"image": ..., "label": ..., "points": [{"x": ..., "y": ...}]}, percent
    COCO instances        annotations.json, _annotations.coco.json or instances*.json; a point is the middle of a box
    LabelMe               a .json for each picture, with points, rectangles, polygons and circles, and their middles
    questions.jsonl       {"image": ..., "question": ..., "answer": ...}

Paths of pictures are relative to the folder, or to its folder "images". All that is said about one is one example.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.points import parse_points
from molmo_edge.training.examples import Annotation, Example
from molmo_edge.training.prompts import counting, pointing, without_points

POINTS, ROWS, QUESTIONS = "points.csv", "rows.jsonl", "questions.jsonl"
_COCO = ("annotations.json", "_annotations.coco.json", "instances*.json")
_PIXELS, _PERCENT = ("x", "y"), ("x_percent", "y_percent")
_ORIENTATION = 0x0112  # the EXIF tag; from 5 on a picture lies on its side
_NAMED = 10  # pictures in an error
_ABSENT = 2  # labels of other pictures, that an example asks about
_DISTORTED = 0.02  # an annotation's size of a picture may be that much off in shape


class PointsError(MolmoEdgeError):
    """A folder that cannot be trained on, with the file and the line that are in the way."""


@dataclass(frozen=True)
class Picture:
    """A file and what is known about it."""

    path: Path
    points: dict[str, tuple[tuple[float, float], ...]]  # by label, percent; of none, that there are none
    unsure: frozenset[str]  # labels that are in it, nobody says where
    questions: tuple[tuple[str, str], ...]  # and answers


@dataclass(frozen=True, eq=False)
class PointsFolder:
    """A DataSet. Which annotations of a picture an epoch shows is drawn: all in turn would make sequences long."""

    name: str
    pictures: tuple[Picture, ...]
    labels: tuple[str, ...]  # of the whole folder where what has no point is not there; else empty
    max_annotations: int

    def __len__(self) -> int:
        return len(self.pictures)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """See DataSet. Every label is pointed at or counted before one is both."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        picture = self.pictures[index]
        absent = _absent(picture, self.labels)
        asked = [*picture.points.items(), *((absent[i], ()) for i in rng.permutation(len(absent))[:_ABSENT])]
        first: list[Callable[[], Annotation]] = [partial(_question, *each, rng) for each in picture.questions]
        second: list[Callable[[], Annotation]] = []
        for number, (label, points) in enumerate(asked):
            one, other = (pointing, counting) if rng.integers(2) else (counting, pointing)
            first.append(partial(one, label, points, rng))
            if number < len(picture.points):
                second.append(partial(other, label, points, rng))
        order = [*(first[i] for i in rng.permutation(len(first))), *(second[i] for i in rng.permutation(len(second)))]
        return Example(picture.path, tuple(make() for make in order[: self.max_annotations]))


def open_points(
    folder: Path, *, validation: float = 0.1, seed: int = 0, complete: bool | None = None, max_annotations: int = 8
) -> tuple[PointsFolder, PointsFolder]:
    """The folder's pictures to train on, and those to validate with, which `seed` picks: a share `validation` of them.

    complete: whether a label of the folder that a picture does not have is not to be seen in it, so that it may be
    asked for; None: in COCO's format, which says so. max_annotations: of a picture at a time. Raises PointsError.
    """
    if not folder.is_dir():
        raise PointsError(f"there is no folder {folder}: check the path")
    if not 0 <= validation < 1 or max_annotations < 1:
        raise PointsError("validation is a share below 1 of the pictures, and an example has at least one annotation")
    book, found = _Book(folder), _formats(folder)
    if len(found) > 1:
        raise PointsError(f"{folder} says where things are in several ways, {', '.join(found)}: keep one of them")
    for read, file in ((read, file) for read, files in found.values() for file in files):
        read(file, book)
    if (folder / QUESTIONS).is_file():
        _read_questions(folder / QUESTIONS, book)
    elif not found:
        known = f"{POINTS}, {ROWS}, {QUESTIONS}, COCO's annotations.json or LabelMe's files"
        raise PointsError(f"{folder} holds nothing that says what is where: it needs {known}")
    pictures = book.finish()
    whole = _read_coco in (read for read, _ in found.values()) if complete is None else complete
    labels = tuple(dict.fromkeys(label for picture in pictures for label in picture.points)) if whole else ()
    pictures = [p for p in pictures if p.points or p.questions or _absent(p, labels)]
    if not pictures:
        raise PointsError(f"{folder} has no picture with a point or a question")
    held_back = _held_back([os.path.relpath(p.path, folder) for p in pictures], validation, seed)
    sides = ([p for p, held in zip(pictures, held_back, strict=True) if held is side] for side in (False, True))
    # A run is not taken up with other annotations: they are part of what its data are called.
    digest = hashlib.sha256(repr([(str(p.path), p.points, p.questions) for p in pictures]).encode()).hexdigest()
    name = f"points of {folder.resolve().name}, {digest[:12]}"
    train, other = (PointsFolder(name, tuple(side), labels, max_annotations) for side in sides)
    return train, other


def _absent(picture: Picture, labels: Sequence[str]) -> list[str]:
    return [label for label in labels if label not in picture.points and label not in picture.unsure]


def _held_back(names: Sequence[str], share: float, seed: int) -> list[bool]:
    """Those with the smallest hashes: a picture that is added later moves few others from one side to the other."""
    count = round(share * len(names)) or int(share > 0 and len(names) > 1)
    hashes = [hashlib.sha256(f"{seed}:{Path(name).as_posix()}".encode()).digest() for name in names]
    smallest = set(sorted(hashes)[: min(count, len(names) - 1)])
    return [each in smallest for each in hashes]


def _question(question: str, answer: str, rng: np.random.Generator) -> Annotation:
    asked = question if parse_points(answer) else without_points(question, rng)
    return Annotation("user_qa", (asked, answer))


# --- what all formats share -----------------------------------------------------------------------------------------


@dataclass
class _Page:
    """A picture, while its folder is read."""

    path: Path
    size: tuple[int, int] = (0, 0)  # width and height as it is shown; 0: it is missing, or no picture
    points: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    none: dict[str, str] = field(default_factory=dict)  # label -> where it is said that there are none
    unsure: set[str] = field(default_factory=set)
    questions: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class _Book:
    """All pictures of a folder, and what is wrong with some of them."""

    folder: Path
    pages: dict[str, _Page] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def page(self, name: Any, where: str, beside: Path | None = None) -> _Page:
        """That of the picture `name`, which `where` names. `beside`: the folder of the file that does, if not ours."""
        if not isinstance(name, str) or not name.strip():
            raise PointsError(f'{where} names no picture: "image" is empty')
        name = name.strip().replace("\\", "/")  # LabelMe writes paths as Windows does
        roots = (beside or self.folder, self.folder, self.folder / "images")
        path = next((root / name for root in roots if (root / name).is_file()), roots[0] / name)
        key = os.path.normpath(path)
        if key not in self.pages:
            page = self.pages[key] = _Page(Path(key))
            try:
                page.size = _shown_size(page.path)
            except Exception as error:  # hostile headers make Pillow's parsers raise nearly anything
                why = "is not there" if isinstance(error, FileNotFoundError) else "is no picture that can be read"
                self.missing.append(f"{name} {why}")
        return self.pages[key]

    def add(self, page: _Page, label: Any, xy: tuple[float, float] | None, where: str) -> None:
        """A point in percent, or None for a label that is nowhere in the picture."""
        name = _label(label, where)
        if xy is None:
            page.none.setdefault(name, where)
            return
        if not all(0 <= value <= 100 for value in xy):
            size, at = f"{page.size[0]} x {page.size[1]} pixels", f"{xy[0]:.6g} and {xy[1]:.6g} percent"
            raise PointsError(f"{where} has a point outside of {page.path.name}, {size}: it is at {at}")
        page.points.setdefault(name, []).append(xy)

    def finish(self) -> list[Picture]:
        """Raises PointsError where pictures are missing, or contradict themselves."""
        if self.missing:
            more = f" and {len(self.missing) - _NAMED} more" if len(self.missing) > _NAMED else ""
            said = f"{len(self.missing)} of the {len(self.pages)} pictures that {self.folder} names are of no use"
            raise PointsError(f"{said}: {', '.join(self.missing[:_NAMED])}{more}")
        made = []
        for page in self.pages.values():
            for label, where in page.none.items():
                if label in page.points:
                    raise PointsError(f'{where} says that {page.path.name} has no "{label}", and other rows have some')
            points = {label: tuple(xy) for label, xy in page.points.items() if label not in page.unsure}
            points |= dict.fromkeys(page.none, ())
            made.append(Picture(page.path, points, frozenset(page.unsure), tuple(page.questions)))
        return made


def _label(label: Any, where: str) -> str:
    if not isinstance(label, str) or not label.strip():
        raise PointsError(f"{where} has no label: name what the point is on")
    if "<" in label or ">" in label:  # an answer is written in tags
        raise PointsError(f'{where} has the label "{label}": leave out < and >')
    return label.strip().lower()  # as prompts have it: "Cup" and "cup" are one


def _shown_size(path: Path) -> tuple[int, int]:
    """Width and height with the EXIF orientation applied; of the header alone. A page may be large, and folders too."""
    with Image.open(path) as image:
        width, height = image.size
        try:
            turned = 5 <= int(image.getexif().get(_ORIENTATION, 1)) <= 8
        except Exception:  # damaged EXIF counts as upright, as in load_image
            turned = False
    return (height, width) if turned else (width, height)


def _percent(x: float, y: float, size: tuple[int, int]) -> tuple[float, float]:
    width, height = size
    return (100 * x / width, 100 * y / height) if width else (0.0, 0.0)  # of a picture that is missing: said at the end


def _number(value: Any, where: str, name: str) -> float:
    try:
        if math.isfinite(number := float(value)):
            return number
    except (TypeError, ValueError):
        pass
    raise PointsError(f"{where}: {name} is {value!r}, not a number")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets begin it with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise PointsError(f"{path} cannot be read as UTF-8: {error}") from None


def _json(text: str, where: str | Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise PointsError(f"{where} is not JSON: {error}") from None


# --- formats --------------------------------------------------------------------------------------------------------


def _formats(folder: Path) -> dict[str, tuple[Callable[[Path, _Book], None], list[Path]]]:
    """What says where things are: a name for people -> how it is read, and its files."""
    found: dict[str, tuple[Callable[[Path, _Book], None], list[Path]]] = {}
    for name, read in ((POINTS, _read_csv), (ROWS, _read_rows)):
        if (folder / name).is_file():
            found[name] = (read, [folder / name])
    if coco := sorted({path for pattern in _COCO for path in folder.glob(pattern)}):
        found[coco[0].name] = (_read_coco, coco)
    others = sorted({*folder.glob("*.json"), *folder.glob("images/*.json")} - set(coco))
    if shapes := [path for path in others if _is_labelme(path)]:
        found[f"LabelMe's {shapes[0].name}"] = (_read_labelme, shapes)
    return found


def _is_labelme(path: Path) -> bool:
    content = _json(_text(path), path)
    return isinstance(content, dict) and {"shapes", "imagePath"} <= set(content)


def _read_csv(path: Path, book: _Book) -> None:
    text = _text(path)
    head = text.partition("\n")[0]
    rows = csv.DictReader(io.StringIO(text), delimiter=";" if head.count(";") > head.count(",") else ",")
    rows.fieldnames = columns = [name.strip() for name in rows.fieldnames or ()]
    unit = next((unit for unit in (_PIXELS, _PERCENT) if set(unit) <= set(columns)), None)
    if unit is None or not {"image", "label"} <= set(columns):
        raise PointsError(f"{path} begins with {head.strip()!r}: its first line has to be image,label,x,y")
    for row in rows:
        where = f"line {rows.line_num} of {path}"
        page = book.page(row["image"], where)
        values = [(row[name] or "").strip() for name in unit]
        if any(values) and not all(values):
            raise PointsError(f"{where} has one of {unit[0]} and {unit[1]}: give both, or none to say there is nothing")
        if not any(values):
            book.add(page, row["label"], None, where)
            continue
        x, y = (_number(value, where, name) for value, name in zip(values, unit, strict=True))
        book.add(page, row["label"], (x, y) if unit == _PERCENT else _percent(x, y, page.size), where)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of each line that is not empty."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            where = f"line {number} of {path}"
            row = _json(line, where)
            if not isinstance(row, dict):
                raise PointsError(f"{where} is not a JSON object")
            yield where, row


def _read_rows(path: Path, book: _Book) -> None:
    for where, row in _lines(path):
        page, points, label = book.page(row.get("image"), where), row.get("points"), row.get("label")
        if not isinstance(points, list):
            raise PointsError(f'{where} has no list "points": give [] to say that there are none')
        if not points and row.get("count"):
            raise PointsError(f"{where} counts {row['count']} and has no points")
        if not points:
            book.add(page, label, None, where)
        for each in points:
            if not isinstance(each, dict):
                raise PointsError(f'{where}: a point is {{"x": ..., "y": ...}} in percent, not {each!r}')
            x, y = (_number(each.get(name), where, name) for name in _PIXELS)
            book.add(page, label, (x, y), where)


def _read_questions(path: Path, book: _Book) -> None:
    for where, row in _lines(path):
        page = book.page(row.get("image"), where)
        asked = row.get("question"), row.get("answer")
        if not all(isinstance(text, str) and text.strip() for text in asked):
            raise PointsError(f'{where} needs a "question" and an "answer", both texts')
        page.questions.append((str(asked[0]).strip(), str(asked[1]).strip()))


def _read_coco(path: Path, book: _Book) -> None:
    content, pages, where = _json(_text(path), path), {}, str(path)
    try:
        labels = {each["id"]: each["name"] for each in content["categories"]}
        for image in content["images"]:
            where = f"image {image['id']} of {path}"
            page = book.page(image["file_name"], where)
            pages[image["id"]] = page, _declared(page, image.get("width"), image.get("height"), where)
        for each in content["annotations"]:
            where = f"annotation {each['id']} of {path}"
            (page, size), label = pages[each["image_id"]], _label(labels[each["category_id"]], where)
            if each.get("iscrowd"):  # too many to tell apart: neither "there are none" nor a count would be true
                page.unsure.add(label)
            else:
                book.add(page, label, _percent(*_middle(_coco_corners(each, where), where), size), where)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PointsError(f"{where} is not as COCO has it, {error!r}: is a list cut short, or an id unknown?") from None


def _coco_corners(each: dict[str, Any], where: str) -> list[tuple[Any, Any]]:
    """Of an annotation's box, else its outline's points, else the key points that are there."""
    if box := each.get("bbox"):
        x, y, width, height = (_number(value, where, "bbox") for value in box)
        return [(x, y), (x + width, y + height)]
    outline = each.get("segmentation")
    if isinstance(outline, list) and outline:
        return [pair for part in outline for pair in zip(part[::2], part[1::2], strict=True)]
    keys = each.get("keypoints") or []
    return [(x, y) for x, y, seen in zip(keys[::3], keys[1::3], keys[2::3], strict=True) if seen]


def _read_labelme(path: Path, book: _Book) -> None:
    content = _json(_text(path), path)
    page = book.page(content["imagePath"], str(path), beside=path.parent)
    size = _declared(page, content.get("imageWidth"), content.get("imageHeight"), str(path))
    for number, shape in enumerate(content["shapes"] or (), 1):
        where = f"shape {number} of {path}"
        try:
            label, kind = shape["label"], shape.get("shape_type") or "polygon"
            corners = [(x, y) for x, y in shape["points"]]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise PointsError(f"{where} is not as LabelMe has it: it needs a label and points") from None
        if kind not in ("point", "rectangle", "polygon", "circle"):
            raise PointsError(f'{where} is a "{kind}", which is at no one place: use a point, rectangle or polygon')
        corners = corners[:1] if kind in ("point", "circle") else corners  # a circle's second point is on its rim
        book.add(page, label, _percent(*_middle(corners, where), size), where)


def _middle(corners: Sequence[tuple[Any, Any]], where: str) -> tuple[float, float]:
    """Of the box around `corners`."""
    if not corners:
        raise PointsError(f"{where} has neither a box nor an outline nor points")
    xs, ys = ([_number(corner[axis], where, "xy"[axis]) for corner in corners] for axis in (0, 1))
    return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2


def _declared(page: _Page, width: Any, height: Any, where: str) -> tuple[int, int]:
    """The size that coordinates count in: the file's own, or another of the same shape that the annotations name."""
    if not width or not height or not page.size[0]:
        return page.size
    w, h = (_number(value, where, name) for value, name in ((width, "width"), (height, "height")))
    shape = (w / h) / (page.size[0] / page.size[1])
    if abs(shape - 1) > _DISTORTED:
        found = f"{page.path.name} is shown with {page.size[0]} x {page.size[1]}: was it turned or cut afterwards?"
        raise PointsError(f"{where} is about a picture of {w:g} x {h:g} pixels, but {found}")
    return int(w), int(h)
