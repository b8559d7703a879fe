"""A folder of a user's own pictures, with points on them or with questions about them, as data sets to train on.

What the folder holds is told by its files, one way of saying where things are, and questions.jsonl beside it or alone:

    points.csv            image,label,x,y: pixels of the picture as it is shown, its EXIF orientation applied; or
                          image,label,x_percent,y_percent. A row without x and y says that there are none.
    rows.jsonl            PixMo-Points' columns: {"image": ..., "label": ..., "points": [{"x": ..., "y": ...}]}, percent
    COCO instances        annotations.json, _annotations.coco.json or instances*.json; a point is the middle of a box
    LabelMe               a .json for each picture, with points, and the middles of rectangles, polygons, circles and
                          masks; other shapes (lines) are skipped with a note, and their label with them
    questions.jsonl       {"image": ..., "question": ..., "answer": ...}

Paths of pictures are relative to the folder, or to its folder "images". All that is said about one is one example, and
what is said twice counts once. Formats are read by points_tables.py and points_boxes.py, into points_book.py.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from molmo_edge.data.annotation_prompts import counting, pointing, without_points
from molmo_edge.data.examples import Annotation, Example
from molmo_edge.data.points_boxes import is_labelme, read_coco, read_labelme
from molmo_edge.data.points_records import Book, Page, PointsError, Reader
from molmo_edge.data.points_tables import read_csv, read_questions, read_rows
from molmo_edge.frontend.points import parse_points
from molmo_edge.system.log import logger

POINTS, ROWS, QUESTIONS = "points.csv", "rows.jsonl", "questions.jsonl"
_COCO = ("annotations.json", "_annotations.coco.json", "instances*.json")
_ABSENT = 2  # labels of other pictures, that an example asks about

__all__ = ["Picture", "PointsError", "PointsFolder", "open_points"]


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
    folder: Path,
    *,
    validation: float = 0.1,
    seed: int = 0,
    complete: bool | None = None,
    max_annotations: int = 8,
    note: Callable[[str], None] = logger.warning,
) -> tuple[PointsFolder, PointsFolder]:
    """The folder's pictures to train on, and those to validate with, which `seed` picks: a share `validation` of them.

    complete: whether a label of the folder that a picture does not have is not to be seen in it, so that it may be
    asked for; None: in COCO's format, which says so. max_annotations: of a picture at a time. note: hears what was read
    but left out: what is said twice, and shapes that are at no one place. Every picture is decoded once, for the size
    that it is shown with. Raises PointsError, which names the file and the line or item.
    """
    if not folder.is_dir():
        raise PointsError(f"there is no folder {folder}: check the path")
    if not 0 <= validation < 1 or max_annotations < 1:
        raise PointsError("validation is a share below 1 of the pictures, and an example has at least one annotation")
    book, found = Book(folder), _formats(folder)
    if len(found) > 1:
        raise PointsError(f"{folder} says where things are in several ways, {', '.join(found)}: keep one of them")
    for read, file in ((read, file) for read, files in found.values() for file in files):
        read(file, book)
    if (folder / QUESTIONS).is_file():
        read_questions(folder / QUESTIONS, book)
    elif not found:
        known = f"{POINTS}, {ROWS}, {QUESTIONS}, COCO's annotations.json or LabelMe's files"
        raise PointsError(f"{folder} holds nothing that says what is where: it needs {known}")
    book.finish()
    for each in book.notes:
        note(each)
    pictures = [_picture(page) for page in book.pages]
    whole = read_coco in (read for read, _ in found.values()) if complete is None else complete
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


def _formats(folder: Path) -> dict[str, tuple[Reader, list[Path]]]:
    """What says where things are: a name for people -> how it is read, and its files."""
    found: dict[str, tuple[Reader, list[Path]]] = {}
    for name, read in ((POINTS, read_csv), (ROWS, read_rows)):
        if (folder / name).is_file():
            found[name] = (read, [folder / name])
    if coco := sorted({path for pattern in _COCO for path in folder.glob(pattern)}):
        found[coco[0].name] = (read_coco, coco)
    others = sorted({*folder.glob("*.json"), *folder.glob("images/*.json")} - set(coco))
    # Beside another format, a file that only resembles LabelMe's is somebody else's.
    if shapes := [path for path in others if is_labelme(path, whole=bool(found))]:
        found[f"LabelMe's {shapes[0].name}"] = (read_labelme, shapes)
    return found


def _picture(page: Page) -> Picture:
    """Raises PointsError where the files contradict each other."""
    points: dict[str, list[tuple[float, float]]] = {}
    for mark in page.marks:
        points.setdefault(mark.label, []).append((mark.x, mark.y))
    for label, where in page.none.items():
        if label in points:
            raise PointsError(f'{where} says that {page.path.name} has no "{label}", and other rows have some')
    known = {label: tuple(xy) for label, xy in points.items() if label not in page.unsure}
    return Picture(page.path, known | dict.fromkeys(page.none, ()), frozenset(page.unsure), tuple(page.questions))
