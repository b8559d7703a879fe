"""Answers that a teacher wrote, as a data set: FOLDER/answers.jsonl with one conversation per line.

    {"image": "images/ab12.png", "style": "user_qa", "messages": ["What is it?", "A cup."], "from": ["sets", 7, 0]}

Paths of images are relative to the folder. molmo_edge/training/teacher_answers.py writes such folders.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from molmo_edge.data.examples import Annotation, Example
from molmo_edge.data.json_files import json_lines
from molmo_edge.errors import MolmoEdgeError

ANSWERS = "answers.jsonl"


class AnswersError(MolmoEdgeError):
    """A folder of written answers that cannot be used."""


@dataclass(frozen=True, eq=False)
class WrittenAnswers:
    """The data set of a folder: all conversations about an image are one example."""

    folder: Path
    pictures: tuple[tuple[str, tuple[Annotation, ...]], ...]  # path of the image, conversations
    name: str = "teacher_answers"

    def __len__(self) -> int:
        return len(self.pictures)

    def example(self, index: int, _rng: np.random.Generator) -> Example:
        """The image number `index` with its conversations."""
        image, annotations = self.pictures[index]
        return Example(self.folder / image, annotations)


def open_answers(folder: Path) -> WrittenAnswers:
    """Read the answers in `folder`. Raises AnswersError."""
    found: dict[str, list[Annotation]] = {}
    for where, row in json_lines(folder / ANSWERS, AnswersError):
        image, style, messages = row.get("image"), row.get("style"), row.get("messages")
        if not isinstance(image, str) or not isinstance(style, str) or not isinstance(messages, list):
            raise AnswersError(f"{where} lacks an image, a style or messages")
        if not messages or len(messages) % 2 or not all(isinstance(m, str) and m.strip() for m in messages):
            raise AnswersError(f"{where}: messages must be texts, a question and an answer in turn")
        found.setdefault(image, []).append(Annotation(style, tuple(messages)))
    if not found:
        raise AnswersError(f"{folder / ANSWERS} has no answers")
    return WrittenAnswers(folder, tuple((image, tuple(each)) for image, each in found.items()))
