"""Training sets from a folder of a user's pictures with points or questions.

The folder has annotations in one of the first four formats, questions.jsonl, or both:

    points.csv            image,label,x,y: pixels of the picture after EXIF rotation; or
                          image,label,x_percent,y_percent. A row without x and y: the label is absent.
    rows.jsonl            PixMo-Points' columns: {"image": ..., "label": ..., "points": [{"x": ..., "y": ...}]}, percent
    COCO instances        annotations.json, _annotations.coco.json or instances*.json; points are middles of boxes
    LabelMe               a .json file per picture: points, and middles of rectangles, polygons, circles and masks.
                          Other shapes (lines) are skipped with a note, and so is their label
    questions.jsonl       {"image": ..., "question": ..., "answer": ...}

Paths of pictures are relative to the folder or its subfolder "images". A picture with all its annotations is one
example; repeated annotations count once. points_tables.py and points_boxes.py read the formats into the records of
points_records.py.
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
from molmo_edge.data.points_records import PictureRecord, PointsError, Reader, Records
from molmo_edge.data.points_tables import read_csv, read_questions, read_rows
from molmo_edge.frontend.points import parse_points
from molmo_edge.system.log import logger

POINTS, ROWS, QUESTIONS = "points.csv", "rows.jsonl", "questions.jsonl"
_COCO = ("annotations.json", "_annotations.coco.json", "instances*.json")
_ABSENT = 2  # absent labels that an example asks about

__all__ = ["Picture", "PointsError", "PointsFolder", "open_points"]


@dataclass(frozen=True)
class Picture:
    """A picture file and its annotations."""

    path: Path
    points: dict[str, tuple[tuple[float, float], ...]]  # by label, percent; empty: absent
    unsure: frozenset[str]  # labels that are in it at unknown positions
    questions: tuple[tuple[str, str], ...]  # and answers


@dataclass(frozen=True, eq=False)
class PointsFolder:
    """A `DataSet`. Each example has a random choice of the annotations, to limit the sequence length."""

    name: str
    pictures: tuple[Picture, ...]
    labels: tuple[str, ...]  # of the whole folder, if annotations are complete; else empty
    max_annotations: int

    def __len__(self) -> int:
        return len(self.pictures)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """See DataSet. Each label is either pointed at or counted, before any label is used for both."""
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
    """Read a folder into (training set, validation set). Every picture is decoded once, to check its size.

    Args:
        validation: share of the pictures in the validation set, which `seed` selects.
        complete: whether annotations are exhaustive, so that a picture does not contain labels that it has no points
            for, and training also asks for them. None: only for COCO, whose format requires it.
        max_annotations: per example.
        note: called with notes about annotations that are not used: repetitions, shapes without a single position.

    Raises PointsError, which names the file and the line or item.
    """
    if not folder.is_dir():
        raise PointsError(f"there is no folder {folder}: check the path")
    if not 0 <= validation < 1 or max_annotations < 1:
        raise PointsError(
            f"validation must be at least 0 and below 1, not {validation}, and max_annotations at least 1, not "
            f"{max_annotations}"
        )
    records, found = Records(folder), _formats(folder)
    if len(found) > 1:
        raise PointsError(f"{folder} has annotations in several formats, {', '.join(found)}: keep one of them")
    for read, file in ((read, file) for read, files in found.values() for file in files):
        read(file, records)
    if (folder / QUESTIONS).is_file():
        read_questions(folder / QUESTIONS, records)
    elif not found:
        known = f"{POINTS}, {ROWS}, {QUESTIONS}, COCO's annotations.json or LabelMe's files"
        raise PointsError(f"{folder} holds no annotations: it needs {known}")
    records.finish()
    for each in records.notes:
        note(each)
    pictures = [_picture(picture) for picture in records.pictures]
    whole = read_coco in (read for read, _ in found.values()) if complete is None else complete
    labels = tuple(dict.fromkeys(label for picture in pictures for label in picture.points)) if whole else ()
    pictures = [p for p in pictures if p.points or p.questions or _absent(p, labels)]
    if not pictures:
        raise PointsError(f"{folder} has no picture with a point or a question")
    held_back = _held_back([os.path.relpath(p.path, folder) for p in pictures], validation, seed)
    sides = ([p for p, held in zip(pictures, held_back, strict=True) if held is side] for side in (False, True))
    # The name includes a hash of the annotations, so that a run is not resumed with other ones.
    digest = hashlib.sha256(repr([(str(p.path), p.points, p.questions) for p in pictures]).encode()).hexdigest()
    name = f"points of {folder.resolve().name}, {digest[:12]}"
    train, other = (PointsFolder(name, tuple(side), labels, max_annotations) for side in sides)
    return train, other


def _absent(picture: Picture, labels: Sequence[str]) -> list[str]:
    return [label for label in labels if label not in picture.points and label not in picture.unsure]


def _held_back(names: Sequence[str], share: float, seed: int) -> list[bool]:
    """The pictures with the smallest hashes: adding pictures moves few others between the sets."""
    count = round(share * len(names)) or int(share > 0 and len(names) > 1)
    hashes = [hashlib.sha256(f"{seed}:{Path(name).as_posix()}".encode()).digest() for name in names]
    smallest = set(sorted(hashes)[: min(count, len(names) - 1)])
    return [each in smallest for each in hashes]


def _question(question: str, answer: str, rng: np.random.Generator) -> Annotation:
    asked = question if parse_points(answer) else without_points(question, rng)
    return Annotation("user_qa", (asked, answer))


def _formats(folder: Path) -> dict[str, tuple[Reader, list[Path]]]:
    """The annotation formats in the folder: name for messages -> (reader, files)."""
    found: dict[str, tuple[Reader, list[Path]]] = {}
    for name, read in ((POINTS, read_csv), (ROWS, read_rows)):
        if (folder / name).is_file():
            found[name] = (read, [folder / name])
    if coco := sorted({path for pattern in _COCO for path in folder.glob(pattern)}):
        found[coco[0].name] = (read_coco, coco)
    others = sorted({*folder.glob("*.json"), *folder.glob("images/*.json")} - set(coco))
    # Beside another format, a file that only resembles LabelMe's is ignored.
    if shapes := [path for path in others if is_labelme(path, whole=bool(found))]:
        found[f"LabelMe's {shapes[0].name}"] = (read_labelme, shapes)
    return found


def _picture(picture: PictureRecord) -> Picture:
    """Raises PointsError if annotations contradict each other."""
    points: dict[str, list[tuple[float, float]]] = {}
    for mark in picture.marks:
        points.setdefault(mark.label, []).append((mark.x, mark.y))
    for label, where in picture.none.items():
        if label in points:
            raise PointsError(
                f'{where} states that {picture.path.name} has no "{label}", but other rows have points for it'
            )
    known = {label: tuple(xy) for label, xy in points.items() if label not in picture.unsure}
    return Picture(
        picture.path, known | dict.fromkeys(picture.none, ()), frozenset(picture.unsure), tuple(picture.questions)
    )
