"""AI2D from its authors' files: diagrams, questions, and letters drawn over labels.

A third of the questions refer to letters that must be drawn over the labels, in an opaque box, or in a transparent one
through which the label can be read. The latter is much easier, and is what the paper's table reports (MolmoE-1B: 86.4;
75.7 with opaque boxes). Reference: olmo/hf_datasets/ai2d.py, except for the font: Arial, which is not free, is replaced
by Pillow's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from molmo_edge.data.json_files import read_json
from molmo_edge.data.rows import Row, Rows, RowsError, rows_of

TEST_IDS = "ai2d_test_ids.csv"
_VALIDATION = 384  # images that the reference holds out of training
_CYAN = (25, 249, 255)
_HALF = 127  # alpha of a transparent box


def official_rows(folder: Path, split: str) -> Rows | None:
    """Rows of the official archive (`questions`, `annotations`, `images`); None if `folder` has another layout.

    These folders are in `folder` or `folder`/ai2d, with ai2d_test_ids.csv beside one of them. `split`: "test", "train"
    or "validation" (images that the reference holds out of training). A question about letters gives a row for each
    kind of box. Columns besides the hub's (question, options, answer, image): question_id, image_id, abc_label,
    has_transparent_box, letters (of the diagram). Raises RowsError.
    """
    root = next((path for path in (folder, folder / "ai2d") if (path / "questions").is_dir()), None)
    if root is None:
        return None
    names = _images(root, folder, split)
    listed = [row for name in names for row in _rows(root, name)]
    plain = rows_of(folder, listed)
    cell = functools.partial(_cell, root, listed)  # not a closure: rows are pickled for worker processes
    return Rows(plain.where, folder, (*plain.columns, "image"), len(listed), cell)


def _cell(root: Path, listed: Sequence[Mapping[str, Any]], index: int, column: str) -> Any:
    return _picture(root, listed[index]) if column == "image" else listed[index].get(column)


def _images(root: Path, folder: Path, split: str) -> list[str]:
    """Names of the split's images, sorted by number."""
    by_number = {
        int(path.name.split(".")[0]): path.name[: -len(".json")] for path in (root / "questions").glob("*.json")
    }
    ids = next((path / TEST_IDS for path in (folder, root, root.parent) if (path / TEST_IDS).is_file()), None)
    if ids is None:
        raise RowsError(
            f"{folder} has no {TEST_IDS}, the list of test images: download "
            "https://s3-us-east-2.amazonaws.com/prior-datasets/ai2d_test_ids.csv into it"
        )
    test = {int(line) for line in ids.read_text(encoding="utf-8").split()}
    if split == "test":
        numbers = sorted(test & by_number.keys())
    elif split in ("train", "validation"):
        numbers = sorted(by_number.keys() - test)
        np.random.RandomState(5961).shuffle(numbers)
        numbers = numbers[_VALIDATION:] if split == "train" else numbers[:_VALIDATION]
    else:
        raise RowsError(f'"{split}" is not a split of AI2D (splits: train, validation, test)')
    return [by_number[number] for number in numbers]


def _rows(root: Path, name: str) -> list[dict[str, Any]]:
    """Rows of one image: without boxes, with opaque ones, with transparent ones."""
    asked = read_json(root / "questions" / f"{name}.json", RowsError)["questions"]
    boxes: Mapping[str, Any] = {}
    if any(each["abcLabel"] for each in asked.values()):
        boxes = read_json(root / "annotations" / f"{name}.json", RowsError)["text"]
    letters = [box["replacementText"] for box in boxes.values()]
    found = []
    for kind in ("", "/opaque", "/transparent"):
        for question, each in asked.items():
            if each["abcLabel"] == bool(kind):
                transparent = kind == "/transparent"
                found.append(
                    {
                        "question": question,
                        "options": each["answerTexts"],
                        "answer": each["correctAnswer"],
                        "question_id": each["questionId"] + ("_transparent" if transparent else ""),
                        "image_id": name + kind,
                        "abc_label": bool(kind),
                        "has_transparent_box": transparent,
                        "letters": letters,
                    }
                )
    return found


def prune(options: Sequence[str], answer: int) -> tuple[list[str], int]:
    """(options without empty ones ("{}") and repetitions, the new index of the answer)."""
    kept = list(dict.fromkeys(option for option in options if option != "{}"))
    return kept, kept.index(options[answer])


def letter_names(row: Row, options: Sequence[str]) -> list[str] | None:
    """Names of the (pruned) options of a question about letters in the diagram: the letters themselves.

    None: another question, whose options are named A, B, C.
    """
    labelled = "abc_label" in row
    # The hub's rows do not tell whether options are letters of the picture: single letters are assumed to be.
    letters = row["letters"] if labelled else ascii_uppercase
    named = [option.upper() in letters and (labelled or len(option) == 1) for option in options]
    enough = sum(named) >= max(len(options) - 1, 0 if labelled else 2)
    if not enough or (labelled and not row["abc_label"]):
        return None
    return [option.upper() if name else option for option, name in zip(options, named, strict=True)]


def _picture(root: Path, row: Mapping[str, Any]) -> Any:
    name, _, kind = row["image_id"].partition("/")
    path = root / "images" / name
    if not kind:
        return path
    boxes = read_json(root / "annotations" / f"{name}.json", RowsError)["text"]
    with Image.open(path) as image:
        return draw_letters(image.convert("RGB"), boxes.values(), transparent=kind == "transparent")


def draw_letters(image: Image.Image, boxes: Any, *, transparent: bool) -> Image.Image:
    """Draw a letter for each label on `image` (RGB, modified in place), and return it.

    `boxes`: AI2D's annotations, each with "rectangle" ([[x0, y0], [x1, y1]], pixels) and "replacementText".
    """
    draw = ImageDraw.Draw(image, "RGBA" if transparent else "RGB")
    for box in boxes:
        (x0, y0), (x1, y1) = box["rectangle"]
        if y0 == y1:
            continue
        left, right, top, bottom = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
        draw.rectangle((left, top, right, bottom), fill=(*_CYAN, _HALF) if transparent else _CYAN)
        letter = box["replacementText"]
        if transparent:  # on a white tag at the top left corner of the box
            font = _font(min(max(16, min(image.size) // 50), 32))
            corner = max(left - 12, 0), max(top - 10, 0)
            draw.rectangle(draw.textbbox(corner, letter, font=font), fill="white")
            draw.text(corner, letter, fill="black", font=font)
        else:  # centred, as large as the box allows
            font, (x, y, width, height) = _fitting(draw, letter, bottom - top)
            draw.text(
                ((left + right - width) / 2 - x, (top + bottom - height) / 2 - y), letter, fill="black", font=font
            )
    return image


def _fitting(draw: ImageDraw.ImageDraw, letter: str, height: float) -> tuple[Any, tuple[float, float, float, float]]:
    """(a font of at most 22 pixels, the bounding box of the letter: x, y, width, height)."""
    for size in range(22, 0, -1):
        font = _font(size)
        x0, y0, x1, y1 = draw.textbbox((0, 0), letter, font=font)
        if y1 - y0 <= height or height <= 4 or size == 1:
            # Horizontally, the reference includes the space before the letter.
            return font, (0, y0, x1 - x0, y1 - y0)
    raise AssertionError("unreachable: the last size returns")


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
