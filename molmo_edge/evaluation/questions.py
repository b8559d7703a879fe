"""The questions that `molmo-edge eval` and `molmo-edge loss` ask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

Score = Callable[[str], dict[str, float]]
"""Answer text -> {name: score from 0 to 1}, without scores that do not apply."""

UNSCORED = "unscored"  # the kind of questions without a known answer: compared, not scored


@dataclass(frozen=True, eq=False)
class Question:
    """A question about an image. The image is opened when needed and not kept."""

    id: str  # unique in a suite, the same in every run
    group: str  # scores are averaged by group: "ai2d", "point/coco"
    kind: str  # "point", "count", "absent", "read", "clock", "caption", "task" or UNSCORED
    image_id: str  # questions about the same image share it and are neighbours
    image: Callable[[], Any]  # returns an image for `Molmo.ask`; None if `words_alone`
    text: str  # the prompt, style tag included
    score: Score
    max_new_tokens: int = 192
    words_alone: bool = False  # asked without an image
    truth: Any = field(default=None, repr=False)  # for people to read, JSON

    def __post_init__(self) -> None:
        assert self.text.strip(), self.id


def by_image(questions: Iterable[Question]) -> Iterator[list[Question]]:
    """Group neighbouring questions about the same image, so that it is encoded once."""
    for _, some in groupby(questions, key=lambda question: question.image_id):
        yield list(some)
