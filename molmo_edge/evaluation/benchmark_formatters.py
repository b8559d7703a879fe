"""Turn a row of each academic benchmark into a question, with the prompt and scores of the reference.

Sources: olmo/data/academic_datasets.py and pixmo_datasets.py for questions, olmo/data/data_formatter.py for prompts
(templates "uber_model", system prompt "demo_or_style"), launch_scripts/utils.py::get_evaluator and
olmo/eval/evaluators.py for scores.
"""

from __future__ import annotations

import functools
import io
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge.data.ai2d import letter_names, prune
from molmo_edge.data.rows import Row, Rows, RowsError, fetch_image, number_in, text_in, text_list
from molmo_edge.evaluation.mmmu import mmmu_score
from molmo_edge.evaluation.pointing import point_count_score, score_in_masks
from molmo_edge.evaluation.questions import Question, Score
from molmo_edge.evaluation.text_scores import (
    anls,
    clean_answer,
    exact_match,
    math_vista_score,
    real_world_qa_score,
    relaxed_correctness,
    select_option,
    vqa_score,
)
from molmo_edge.frontend.image_files import load_image
from molmo_edge.frontend.prompts import count_question, point_question
from molmo_edge.system.cache import cache_directory

_LETTERS = "ABCDEFG"  # as in the reference: options after the seventh are not shown


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's rows are, and how to format them."""

    name: str
    hub_id: str  # a repository of Parquet files: no code is run
    split: str  # the default split
    question: Callable[[Benchmark, Row], Question | None]  # None if the reference leaves the row out
    style: str = ""  # the style tag before the question; "": none, or chosen by row
    configs: tuple[str, ...] = ()
    max_crops: int = 36  # of the published figures; 12 for pointing and counting, where more crops do harm (PAPER)
    max_new_tokens: int = 12
    official: Callable[[Path, str], Rows | None] | None = None  # reads the authors' files, if a folder has them


def _question(
    benchmark: Benchmark,
    row: Row,
    text: str,
    score: Score,
    truth: Any,
    *,
    style: str | None = None,
    id: object = None,
    image_id: object = None,
    image: Callable[[], Any] | None = None,
    kind: str = "task",
    words_alone: bool = False,
) -> Question:
    """`id`: of the data set; None: the row's number."""
    style = benchmark.style if style is None else style
    name = f"{benchmark.name}/{row.index:06d}" if id is None else f"{benchmark.name}/{id}"
    return Question(
        id=name,
        group=benchmark.name,
        kind=kind,
        image_id=name if image_id is None else f"{benchmark.name}/{image_id}",
        image=image or functools.partial(row.image, "image"),
        text=f"{style}: {text}" if style else text,
        score=score,
        max_new_tokens=benchmark.max_new_tokens,
        words_alone=words_alone,
        truth=truth,
    )


def _scored(answers: Sequence[str], metrics: dict[str, Callable[[Sequence[str], str], float]]) -> Score:
    """Scores of the cleaned answer; none if the true answers are not public."""

    def score(text: str) -> dict[str, float]:
        cleaned = clean_answer(text)
        return {name: float(metric(answers, cleaned)) for name, metric in metrics.items()} if answers else {}

    return score


def _best(metric: Callable[[str, str], float]) -> Callable[[Sequence[str], str], float]:
    return lambda answers, predicted: max(metric(answer, predicted) for answer in answers)


def with_options(question: str, options: Sequence[str]) -> str:
    """The question, a line "A: ..." for each option, and a final newline. Reference: `format_options`."""
    lines = [f"{letter}: {option}" for letter, option in zip(_LETTERS, options, strict=False)]
    return "\n".join([question, *lines, ""])


def chart_qa(benchmark: Benchmark, row: Row) -> Question:
    """ChartQA: relaxed correctness, also by part (human or augmented), and exact match."""
    answers = text_list(row, "label")
    # A class label: 0 is human, 1 is machine. The reference takes 1 for human, so its two parts differ from these.
    part = "human" if row["human_or_machine"] in (0, "human") else "augmented"
    relaxed = _best(relaxed_correctness)
    score = _scored(answers, {"relaxed": relaxed, f"relaxed_{part}": relaxed, "em": exact_match})
    return _question(benchmark, row, _text(row, "query"), score, answers)


def vqa2(benchmark: Benchmark, row: Row) -> Question:
    """VQAv2: VQA score. Without scores where the answers are not public."""
    answers = [text_in(row, each["answer"], "answer", blank=True) for each in row["answers"] or ()]
    score = _scored(answers, {"vqa": vqa_score})
    return _question(
        benchmark, row, _text(row, "question"), score, answers, id=row["question_id"], image_id=row["image_id"]
    )


def text_vqa(benchmark: Benchmark, row: Row) -> Question:
    """TextVQA: VQA score. Without scores in the test split."""
    answers = text_list(row, "answers")
    if not any(answers):  # empty texts in the test split
        answers = []
    score = _scored(answers, {"vqa": vqa_score})
    return _question(
        benchmark, row, _text(row, "question"), score, answers, id=row["question_id"], image_id=row["image_id"]
    )


def doc_qa(benchmark: Benchmark, row: Row) -> Question:
    """DocVQA and InfographicVQA: ANLS and exact match."""
    answers = text_list(row, "answers")
    if benchmark.name == "doc_qa":
        image_id = f"{row['ucsf_document_id']}_{row['ucsf_document_page_no']}"
    else:
        image_id = row["image_url"]
    score = _scored(answers, {"anls": _best(anls), "em": exact_match})
    return _question(benchmark, row, _text(row, "question"), score, answers, id=row["questionId"], image_id=image_id)


def real_world_qa(benchmark: Benchmark, row: Row) -> Question:
    """RealWorldQA: accuracy of short answers and of options. Raises RowsError for an unknown instruction."""
    text, answer = _text(row, "question"), _text(row, "answer")
    short = "Please answer directly with a single word or number." in text
    if not short and "Please answer directly with only the letter of the correct option and nothing else." not in text:
        raise RowsError(f"row {row.index} of {row.rows.where} has neither of the two known instructions: {text!r}")
    # "no_instruction" removes the instruction only for short answers, not for options.
    return _question(
        benchmark,
        row,
        text.split("\n")[0] if short else text,
        lambda predicted: {"accuracy": real_world_qa_score(answer, clean_answer(predicted), not short)},
        answer,
        style="vqa2" if short else "a_okvqa_mc",
    )


def mmmu(benchmark: Benchmark, row: Row) -> Question:
    """MMMU: accuracy. Shows the first image only, or none where several options are images."""
    id, question, answer, kind = row["id"], _text(row, "question"), row["answer"], row["question_type"]
    options = text_list(row, "options")
    # Rows on the hub write "<image 2>" for an option that is an image, which the reference does not look for: it then
    # asks about image_1. Images after image_1 are never shown.
    pictures = sum(re.match("<img='(.*?)'>", option) is not None for option in options) > 1
    mentioned = {int(number) for number in re.findall(r"<image (\d)>", "\n".join([question, *options]))}
    multiple = kind == "multiple-choice"

    def score(text: str) -> dict[str, float]:
        if answer in (None, "", "?"):  # in the test split
            return {}
        # The reference has one generator for all questions; with one per question, a run can be resumed.
        rng = random.Random(id)
        cleaned = clean_answer(text)
        return {"accuracy": float(mmmu_score([answer], cleaned, question_type=kind, options=options, rng=rng))}

    return _question(
        benchmark,
        row,
        with_options(question, options) if multiple else question,
        score,
        {"answer": answer, "images_not_shown": sorted(mentioned if pictures else mentioned - {1})},
        style="a_okvqa_mc" if multiple else "vqa2",
        id=id,
        image=(lambda: None) if pictures else functools.partial(row.image, "image_1"),
        words_alone=pictures,
    )


def _text(row: Row, column: str) -> str:
    return text_in(row, row[column], column)


def math_vista(benchmark: Benchmark, row: Row) -> Question:
    """MathVista: accuracy as in the reference, and with numbers rounded. Without scores in the test split."""
    answer, kind = row["answer"], row["question_type"]
    choices = None if row["choices"] is None else text_list(row, "choices")
    text = _text(row, "question").split("Question:")[-1].split("Hint:")[0].strip()
    multiple = kind == "multi_choice"
    known = {
        "answer": answer,
        "question_type": kind,
        "answer_type": row["answer_type"],
        "choices": choices,
    }
    digits = None if row["precision"] is None else number_in(row, row["precision"], "precision")

    def score(text: str) -> dict[str, float]:
        if not answer:  # in the test split
            return {}
        # The hub has 1.0 for one decimal. Python's round() refuses a float, so the reference counts every float answer
        # as wrong; "accuracy_rounded" rounds.
        given = {"accuracy": digits if digits is None else float(digits)}
        given["accuracy_rounded"] = digits if digits is None else int(digits)
        return {name: float(math_vista_score(text.strip(), precision=d, **known)) for name, d in given.items()}

    return _question(
        benchmark,
        row,
        with_options(text, choices or ()) if multiple else text,
        score,
        answer,
        style="a_okvqa_mc" if multiple else "vqa2",
        id=row["pid"],
        image=functools.partial(row.image, "decoded_image"),
    )


def ai2d(benchmark: Benchmark, row: Row) -> Question:
    """AI2D: multiple choice accuracy; for the authors' files also by opaque and transparent boxes."""
    options, answer = prune(text_list(row, "options"), int(row["answer"]))
    full = "abc_label" in row  # the authors' files, with both kinds of boxes
    names = letter_names(row, options)
    if names is not None:
        style, text = "ai2_diagram_no_letter", "\n".join([_text(row, "question"), *names, ""])
    else:
        style, names = "ai2_diagram", list(_LETTERS[: len(options)])
        text = with_options(_text(row, "question"), options)
    scores = ["mc"]
    if full:  # a question without letters counts for both kinds of boxes
        scores += ["mc_opaque"] if not row["has_transparent_box"] else []
        scores += ["mc_transparent"] if row["has_transparent_box"] or not row["abc_label"] else []
    return _question(
        benchmark,
        row,
        text,
        lambda predicted: dict.fromkeys(scores, float(select_option(clean_answer(predicted), names) == answer)),
        names[answer],
        style=style,
        id=row["question_id"] if full else None,
        image_id=row["image_id"] if full else None,
    )


def countbench_qa(benchmark: Benchmark, row: Row) -> Question | None:
    """CountBenchQA: scores of the count. None for missing images and those with a single channel."""
    from PIL import Image

    data = row.image("image")
    if data is None:
        return None
    load_image(data)  # raises ImageError if it is damaged
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
        if len(image.getbands()) == 1:
            return None
    score = functools.partial(point_count_score, count=int(row["number"]))
    return _question(benchmark, row, _text(row, "question"), score, int(row["number"]), kind="count")


def pixmo_count(benchmark: Benchmark, row: Row) -> Question:
    """PixMo-Count: scores of the count. Raises FetchError if the image cannot be downloaded."""
    count = int(row["count"])
    image, image_id = _pixmo_image(row)
    return _question(
        benchmark,
        row,
        count_question(_text(row, "label").lower()),
        functools.partial(point_count_score, count=count),
        count,
        image_id=image_id,
        image=image,
        kind="count",
    )


def pixmo_points(benchmark: Benchmark, row: Row) -> Question:
    """PixMo-Points: scores of points in masks, see `score_in_masks`. Raises FetchError as `pixmo_count`."""
    points = [(number_in(row, point["x"], "x"), number_in(row, point["y"], "y")) for point in row["points"]]
    image, image_id = _pixmo_image(row)

    def score(text: str) -> dict[str, float]:
        height, width = load_image(image()).shape[:2]
        masks = [np.asarray(mask, bool) for mask in row["masks"] or ()]
        pixels = [(x * width / 100, y * height / 100) for x, y in points]
        # The points are percent, despite the data set's card. The reference matches them with pixels, and published
        # figures include that; "f1_pixels" matches pixels with pixels.
        return {
            **score_in_masks(text, points, masks, width, height),
            "f1_pixels": score_in_masks(text, pixels, masks, width, height)["f1"],
        }

    return _question(
        benchmark,
        row,
        point_question(_text(row, "label").lower()),
        score,
        [list(point) for point in points],
        image_id=image_id,
        image=image,
        kind="point" if points else "absent",
    )


def _pixmo_image(row: Row) -> tuple[Callable[[], Any], object]:
    """The image and its id: the column "image" of a local copy if it has one, else the download."""
    if "image" in row and row.image("image") is not None:
        return functools.partial(row.image, "image"), row.get("image_url")
    # Hosts send placeholders for removed images, so hashes are checked, which the reference omits for pixmo-count.
    path = fetch_image(row["image_url"], row["image_sha256"], cache_directory() / "images")
    return (lambda: path), row["image_url"]
