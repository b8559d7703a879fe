"""Suites of questions by name, and the questions about an annotated image.

nano-val            scenes drawn from the embedded sprites
nano-val:DIR        these, and the validation photos of DIR
photos:DIR          the photos of DIR, with annotations (molmo_edge.data.annotated_photos) or without; without them
                    answers can be compared (loss) but not scored (eval)
ai2d, chart_qa, ... the benchmarks of molmo_edge.evaluation.benchmarks; `academic` stands for all of them
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from molmo_edge.data.annotated_photos import ANNOTATIONS
from molmo_edge.data.english import plural
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.evaluation.annotated_pictures import RECEIPTS, Picture, embedded_scenes, photo_pictures, plain_pictures
from molmo_edge.evaluation.pointing import Box, is_valid_point_answer, score_points
from molmo_edge.evaluation.questions import UNSCORED, Question
from molmo_edge.evaluation.text_scores import anls, clock_score
from molmo_edge.frontend.points import parse_count, parse_points
from molmo_edge.frontend.prompts import caption_question, count_question, point_question

_Thing = TypeVar("_Thing")

SCENES = 60  # in nano-val
PER_PICTURE = 3  # number of labels per image in questions
_FIELDS = {"total": "What is the total?", "date": "What is the date?", "company": "Which company is this from?"}
_POINTS = 256  # max_new_tokens for answers with points: twelve points take about 200


class SuiteError(MolmoEdgeError):
    """A suite that does not exist or has no questions."""


def load_suite(
    name: str,
    *,
    data: Path | None = None,
    limit: int | None = None,
    on_skipped: Callable[[str], None] = lambda _: None,
) -> list[Question]:
    """The questions of a suite, in a fixed order. Images are opened when their questions are asked.

    Args:
        data: A folder with local copies of benchmarks, DATA/NAME each.
        limit: The most images, or questions of a benchmark, taken evenly from all of them.
        on_skipped: Called with the reason for each row that is left out.

    Raises:
        SuiteError: The suite does not exist or has no questions.
        PhotoError: Photos or their annotations cannot be read.
        RowsError: The rows of a benchmark cannot be read.
    """
    kind, _, folder = name.partition(":")
    if kind in ("nano-val", "photos"):
        if kind == "photos" and not folder:
            raise SuiteError("photos needs a folder: photos:DIR, with the photos and their annotations.jsonl")
        pictures = embedded_scenes(SCENES) if kind == "nano-val" else []
        if folder and not Path(folder).is_dir():
            raise SuiteError(f"{name}: the folder {folder} does not exist")
        if folder:
            pictures += folder_pictures(Path(folder))
        return _some_questions(name, evenly(pictures, limit))
    from molmo_edge.evaluation.benchmarks import TASKS, benchmark_questions

    if name not in TASKS:
        raise SuiteError(f'"{name}" is not a known suite (known: nano-val, photos:DIR, {", ".join(TASKS)})')
    local = data / name if data is not None and (data / name).exists() else None
    found = list(benchmark_questions(name, local=local, limit=limit, on_skipped=on_skipped))
    if not found:
        raise SuiteError(f"{name} has no questions")
    return found


def folder_pictures(folder: Path) -> list[Picture]:
    """The annotated photos of a folder, or all photos of one without annotations. Raises PhotoError."""
    return list(photo_pictures(folder)) if (folder / ANNOTATIONS).exists() else plain_pictures(folder)


def expand(names: Sequence[str]) -> list[str]:
    """The names without repetitions, with `academic` replaced by all benchmarks."""
    from molmo_edge.evaluation.benchmarks import TASKS

    return list(dict.fromkeys(one for name in names for one in (TASKS if name == "academic" else (name,))))


def _some_questions(name: str, pictures: Sequence[Picture]) -> list[Question]:
    found = [question for picture in pictures for question in picture_questions(picture)]
    if not found:
        raise SuiteError(f"{name} has no questions: check that photos are annotated, and some belong to the split val")
    return found


def evenly(things: Sequence[_Thing], limit: int | None) -> list[_Thing]:
    """At most `limit` of `things`, at even distances."""
    if limit is None or limit >= len(things):
        return list(things)
    return [things[i * len(things) // limit] for i in range(limit)]


def picture_questions(picture: Picture, per_picture: int = PER_PICTURE) -> Iterator[Question]:
    """Pointing and counting for some labels, an absent label, a text, a clock, the fields of a receipt, and a caption.

    A picture without annotations has only its `asked` questions, without scores.
    """
    if picture.asked:
        for number, text in enumerate(picture.asked):
            yield _question(picture, UNSCORED, str(number), text, _unscored, None)
        return
    for label, boxes in picture.labels()[:per_picture]:
        yield _question(picture, "point", label, point_question(label), _point_score(boxes), boxes)
        counted = count_question(plural(label))
        yield _question(picture, "count", label, counted, _count_score(len(boxes)), len(boxes))
    if absent := picture.absent():
        yield _question(picture, "absent", absent, point_question(absent), _absent_score, [])
    texts, clocks = picture.annotation.get("texts", ()), picture.annotation.get("clocks", ())
    if picture.group == RECEIPTS:
        fields = picture.annotation.get("fields", {})
        for key, text in _FIELDS.items():
            if truth := fields.get(key, "").strip():  # answers are compared without surrounding spaces
                yield _question(picture, "read", key, text, _read_score(truth), truth)
    elif len(texts) == 1 and (text := texts[0]["text"].strip()):
        yield _question(picture, "read", "text", "What does the text say?", _read_score(text), text)
    if len(clocks) == 1:
        time = clocks[0]["time"]
        yield _question(picture, "clock", "time", "What time is it?", _clock_score(time), time)
    yield _question(picture, "caption", "caption", caption_question(), _unscored, None)


def _question(
    picture: Picture, kind: str, about: str, text: str, score: Callable[[str], dict[str, float]], truth: object
) -> Question:
    return Question(
        id=f"{picture.id}/{kind}/{about}",
        group=f"{kind}/{picture.group}",
        kind=kind,
        image_id=picture.id,
        image=picture.rgb,
        text=text,
        score=score,
        max_new_tokens=_POINTS if kind in ("point", "count", UNSCORED) else 64,
        truth=truth,
    )


def _point_score(boxes: Sequence[Box]) -> Callable[[str], dict[str, float]]:
    def score(text: str) -> dict[str, float]:
        found = score_points(parse_points(text), boxes)
        return {
            "precision": found.hits / found.points if found.points else 0.0,
            "recall": found.hits / found.boxes,
            "f1": found.f1,
            "format": float(is_valid_point_answer(text)),
        }

    return score


def _count_score(truth: int) -> Callable[[str], dict[str, float]]:
    def score(text: str) -> dict[str, float]:
        count = parse_count(text)
        return {"exact": float(count == truth), "close": float(count is not None and abs(count - truth) <= 1)}

    return score


def _absent_score(text: str) -> dict[str, float]:
    return {"refused": float(not parse_points(text))}


def _read_score(truth: str) -> Callable[[str], dict[str, float]]:
    return lambda text: {"anls": anls(truth, text.strip()), "exact": float(text.strip().lower() == truth.lower())}


def _clock_score(time: str) -> Callable[[str], dict[str, float]]:
    hour, minute = (int(part) for part in time.split(":"))
    return functools.partial(clock_score, hour=hour % 12, minute=minute)


def _unscored(_text: str) -> dict[str, float]:
    """Captions are compared with the reference's (molmo_edge.evaluation.comparison); plain photos have no scores."""
    return {}


def unique(questions: Iterable[Question]) -> list[Question]:
    """The questions with distinct ids: suites can share photos."""
    return list({question.id: question for question in questions}.values())
