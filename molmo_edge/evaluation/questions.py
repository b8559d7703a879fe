"""A question with a known answer: what `molmo-edge eval` and `molmo-edge loss` ask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

Score = Callable[[str], dict[str, float]]
"""The text of an answer -> its scores by name, each 0 to 1; a name that does not apply to it is left out."""

UNSCORED = "unscored"  # the kind of questions whose right answer nobody knows: they are compared, not scored


@dataclass(frozen=True, eq=False)
class Question:
    """One question about one image. The image is opened when it is asked for, and not kept."""

    id: str  # unique among what is asked together, the same at every run
    group: str  # what its scores are averaged with: "ai2d", "pointing/coco"
    kind: str  # "point", "count", "absent", "read", "clock", "caption", "task", UNSCORED: what is said of its answer
    image_id: str  # questions about one image share it, and stand side by side
    image: Callable[[], Any]  # gives what `Molmo.ask` takes; None where `words_alone`
    text: str  # as asked, style tag included
    score: Score
    max_new_tokens: int = 192
    words_alone: bool = False  # asked without its image
    truth: Any = field(default=None, repr=False)  # for people to read: JSON

    def __post_init__(self) -> None:
        assert self.text.strip(), self.id


def by_image(questions: Iterable[Question]) -> Iterator[list[Question]]:
    """Neighbours about one image together, so that it is encoded once."""
    for _, some in groupby(questions, key=lambda question: question.image_id):
        yield list(some)
