"""Folders of plain photos, as prompts: what `--calibrate` rounds with, and what a loss may be measured on.

Nothing here needs PyTorch.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from molmo_edge.frontend.prompts import build_prompt, caption_question
from molmo_edge.quantize import QuantizeError
from molmo_edge.system.files import FileNameError, find_file, printable

PROMPTS = "prompts.jsonl"
# For photos about which nothing is known; the last names the kinds of answer that Molmo was trained to give.
QUESTIONS = (
    caption_question(),
    "Point to the main object.",
    "How many people are there?",
    "What is written in this image?",
    "Point to everything that a person could pick up.",
)
_PHOTOS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Prompt:
    image: Path
    question: str
    answer: str = ""  # where there is one, its tokens are seen as well


def photos_in(folder: Path) -> list[Path]:
    """The photos in a folder and in those inside it, in a fixed order, without hidden files (macOS's "._photo.jpg")."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in _PHOTOS and not path.name.startswith("."))
    return sorted(path for path in found if os.path.isfile(path))


def read_prompts(listed: Path) -> list[Prompt]:
    """A prompts.jsonl: a line {"image": path in the folder, "question": ..., "answer": ...} each, the answer optional.

    Raises QuantizeError, which names the line, and PromptError for an empty question. Pictures are not opened.
    """
    try:
        lines = listed.read_text("utf-8").split("\n")
    except UnicodeDecodeError:
        raise QuantizeError(f"{listed} is not in UTF-8") from None
    prompts = [_parse(listed, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for prompt in prompts:
        build_prompt(prompt.question)
    return prompts


def _parse(file: Path, number: int, line: str) -> Prompt:
    try:
        entry = json.loads(line)
        name = entry["image"]
        prompt = Prompt(file.parent / name, entry["question"], entry.get("answer") or "")
        if not isinstance(prompt.question, str) or not isinstance(prompt.answer, str):
            raise TypeError("question and answer are texts")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise QuantizeError(
            f'{file}, line {number}: expected {{"image": ..., "question": ..., "answer": ...}}: {error}'
        ) from None
    try:
        found = find_file(file.parent, name)
    except FileNameError as error:
        raise QuantizeError(f"{file}, line {number}: {error}") from None
    if found is None:
        raise QuantizeError(f"{file}, line {number}: there is no {printable(prompt.image)}")
    return Prompt(found, prompt.question, prompt.answer)
