"""Answers that a teacher writes: what is asked, what is stored, continued, left out and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo_edge import Molmo
from molmo_edge.data.examples import Annotation, Example
from molmo_edge.data.written_answers import ANSWERS, AnswersError, open_answers
from molmo_edge.training.teacher_answers import AnswerSettings, Written, write_answers

Saying = Callable[..., Molmo]


class Pictures:
    """Two pictures, one in memory and one in a file, with questions."""

    name = "pictures"

    def __init__(self, folder: Path):
        self.path = folder / "photo.png"
        Image.fromarray(self.rgb(1)).save(self.path)

    def rgb(self, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return 2

    def example(self, index: int, _rng: np.random.Generator) -> Example:
        asked = (
            Annotation("user_qa", ("What is it?", "unused", "And this?", "unused")),
            Annotation("vqa2", ("Color?", "unused")),
        )
        return Example(self.path if index else self.rgb(0), asked)


def write(molmo: Molmo, folder: Path, data: Pictures, pictures: int = 2, **settings: Any) -> Written:
    return write_answers(
        molmo,
        "teacher-1",
        [data],
        folder,
        pictures=pictures,
        settings=AnswerSettings(**{"max_new_tokens": 8, **settings}),
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / ANSWERS).read_text().splitlines()]


def test_answers_are_stored_beside_their_images(saying: Saying, tmp_path: Path) -> None:
    data, out = Pictures(tmp_path), tmp_path / "out"
    assert write(saying("a cup"), out, data) == Written(4, 0, 0)
    found = rows(out)
    assert [row["messages"] for row in found[:2]] == [
        ["What is it?", "a cup", "And this?", "a cup"],
        ["Color?", "a cup"],
    ]
    assert [row["from"] for row in found] == [["pictures", i, j] for i in (0, 1) for j in (0, 1)]
    sets = open_answers(out)
    assert len(sets) == 2
    example = sets.example(0, np.random.default_rng(0))
    np.testing.assert_array_equal(np.asarray(Image.open(example.image)), data.rgb(0))
    assert example.annotations[1] == Annotation("vqa2", ("Color?", "a cup"))
    assert sets.example(1, np.random.default_rng(0)).image.resolve() == data.path.resolve()


def test_questions_are_asked_as_the_student_reads_them(saying: Saying, tmp_path: Path) -> None:
    molmo = saying("a cup")
    asked: list[tuple[str, list]] = []
    ask = molmo.ask

    def watched(scene: Any, question: str, **options: Any) -> Any:
        asked.append((question, list(options["history"])))
        return ask(scene, question, **options)

    molmo.ask = watched  # type: ignore[method-assign]
    write(molmo, tmp_path / "out", Pictures(tmp_path), pictures=1)
    assert asked == [("What is it?", []), ("And this?", [("What is it?", "a cup")]), ("vqa2: Color?", [])]


def test_an_interrupted_call_is_continued(saying: Saying, tmp_path: Path) -> None:
    data, out = Pictures(tmp_path), tmp_path / "out"
    write(saying("a cup"), out, data, pictures=1)
    whole = (out / ANSWERS).read_bytes()
    (out / ANSWERS).write_bytes(whole[:-10])  # killed while the last line was written
    assert write(saying("a cup"), out, data) == Written(3, 1, 0)
    assert len(rows(out)) == 4
    assert write(saying("a cup"), out, data) == Written(0, 4, 0)


def asking(molmo: Molmo, seen: list[Any]) -> Molmo:
    """The model, with the options of every question in `seen`."""
    ask = molmo.ask

    def watched(scene: Any, question: str, **options: Any) -> Any:
        seen.append((question, options["seed"]))
        return ask(scene, question, **options)

    molmo.ask = watched  # type: ignore[method-assign]
    return molmo


def test_every_question_has_random_numbers_of_its_own(saying: Saying, tmp_path: Path) -> None:
    data, other = Pictures(tmp_path), Pictures(tmp_path)
    other.name = "others"
    both: list[Any] = []
    alone: list[Any] = []
    settings = AnswerSettings(max_new_tokens=8)  # greedy: sampled answers may be left out before the second turn
    for sets, seen in (([data, other], both), ([other], alone)):
        molmo, out = asking(saying("a cup"), seen), tmp_path / f"out {len(sets)}"
        write_answers(molmo, "teacher-1", sets, out, pictures=2, settings=settings)
    seeds = [seed for _, seed in both]
    assert len(seeds) == 12, "2 sets of 2 pictures with 3 questions"
    assert len(set(seeds)) == 12
    assert alone == both[6:], "whatever other data sets there are"


def test_answers_without_an_end_are_left_out(saying: Saying, tmp_path: Path) -> None:
    long = "two dogs and a red cup on a table in the garden"
    assert write(saying(long), tmp_path / "out", Pictures(tmp_path), max_new_tokens=3) == Written(0, 0, 4)
    seen: list[Any] = []
    again = write(asking(saying(long), seen), tmp_path / "out", Pictures(tmp_path), max_new_tokens=3)
    assert again == Written(0, 0, 4)
    assert not seen, "not generated again"
    with pytest.raises(AnswersError, match="has no answers"):
        open_answers(tmp_path / "out")


def test_other_teachers_and_damaged_folders_are_refused(saying: Saying, tmp_path: Path) -> None:
    data, out = Pictures(tmp_path), tmp_path / "out"
    write(saying("a cup"), out, data, pictures=1)
    with pytest.raises(AnswersError, match="answers with another temperature: use the same, or another folder"):
        write(saying("a cup"), out, data, temperature=0.5)
    with pytest.raises(AnswersError, match="answers with another teacher"):
        write_answers(saying("a cup"), "teacher-2", [data], out, pictures=1, settings=AnswerSettings(max_new_tokens=8))
    for line, message in (
        ('{"image": "a.png"}', "lacks an image, a style or messages"),
        ('{"image": "a.png", "style": "demo", "messages": ["a"]}', "a question and an answer in turn"),
        ("nothing", "is not JSON"),
    ):
        (out / ANSWERS).write_text(line + "\n")
        with pytest.raises(AnswersError, match=message):
            open_answers(out)
    with pytest.raises(AnswersError, match="cannot be read"):
        open_answers(tmp_path / "nowhere")
