"""How a row of each academic training set becomes questions and answers, as in the reference.

Sources: olmo/data/academic_datasets.py for what is asked, olmo/data/data_formatter.py for the choice of an answer
(select_answer "best"). A row comes in one of three shapes:
- a question, in the columns of the set's own repository on the hub: the functions from `short` on;
- a picture with all its questions, as the authors' files are read and a rows.jsonl may have it: `listed`;
- the same in The Cauldron's wording, which `cauldron_rows` takes back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from molmo_edge.data.ai2d import letter_names, prune
from molmo_edge.data.annotation_prompts import multiple_choice, pick
from molmo_edge.data.examples import Annotation
from molmo_edge.data.rows import Row, Rows, RowsError, text_in, text_list, written_out

# With these weights, what people asked and what machines made count the same in all. So the reference has it in its
# loader of the authors' files, and means it in the one of the hub's; but there it takes the label 1 for people, which
# is "machine", and machines get the larger weight.
_HUMAN, _MACHINE = 7398, 20901  # questions of the training split
HUMAN_WEIGHT = 2 * _MACHINE / (_HUMAN + _MACHINE)  # 1.477
MACHINE_WEIGHT = 2 * _HUMAN / (_HUMAN + _MACHINE)  # 0.523


@dataclass(frozen=True)
class Asked:
    """A question, and what people answered or the options with the right one."""

    question: str
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    right: int = 0  # of the options
    style: str = ""  # "": the data set's
    weight: float = 1.0


def annotate(asked: Asked, style: str, rng: np.random.Generator) -> Annotation:
    """`style`: where the question has none of its own."""
    style = asked.style or style
    if asked.options:
        return multiple_choice(asked.question, asked.options, asked.right, style)
    return Annotation(style, (asked.question, best_answer(asked.answers, rng)), asked.weight)


def best_answer(answers: Sequence[str], rng: np.random.Generator) -> str:
    """The answer that most people gave; of several, one that is drawn."""
    counts = Counter(answers)
    most = max(counts.values())
    return pick(rng, [answer for answer, count in counts.items() if count == most])


# --- rows of one question -------------------------------------------------------------------------------------------


def short(row: Row) -> list[Asked]:
    """`answers`: texts, or dicts as VQAv2 and OK-VQA have them."""
    return [Asked(_text(row, "question"), _answers(row, "answers"))]


def okvqa(row: Row) -> list[Asked]:
    """Answers as they were given. `answers` of some copies are stemmed, the others are in `answers_original` then."""
    return [
        Asked(_text(row, "question"), _answers(row, "answers_original" if "answers_original" in row else "answers"))
    ]


def chart_qa(row: Row) -> list[Asked]:
    return [Asked(_text(row, "query"), _answers(row, "label"))]


def chart_qa_weighted(row: Row) -> list[Asked]:
    human = row["human_or_machine"] in (0, "human")
    return [Asked(_text(row, "query"), _answers(row, "label"), weight=HUMAN_WEIGHT if human else MACHINE_WEIGHT)]


def a_okvqa_mc(row: Row) -> list[Asked]:
    return [_choice(row, _text(row, "question"), text_list(row, "choices"), row["correct_choice_idx"])]


def a_okvqa_da(row: Row) -> list[Asked]:
    return [Asked(_text(row, "question"), _answers(row, "direct_answers"))]


def science_qa(row: Row) -> list[Asked]:
    """The hint, if there is one, stands before the question. (The reference has it twice and drops the question.)"""
    hint = row["hint"]
    question = _text(row, "question")
    if hint is not None and text_in(row, hint, "hint", blank=True):
        question = f"{hint}\n{question}"
    return [_choice(row, question, text_list(row, "choices"), row["answer"])]


def ai2d(row: Row) -> list[Asked]:
    options = text_list(row, "options")
    options, right = prune(options, _right(row, row["answer"], len(options)))
    return [_diagram(row, _text(row, "question"), options, right)]


def tabwmp(row: Row) -> list[Asked]:
    """The bare answer. A question with choices is asked without them."""
    return [Asked(_text(row, "question"), (_said(row, row["answer"]),))]


def listed(row: Row) -> list[Asked]:
    """All questions about a picture: `questions`, dicts with a question and an answer, answers, or options."""
    questions = row["questions"]
    if isinstance(questions, dict):  # of lists, as `datasets` stores a Sequence of dicts
        questions = [dict(zip(questions, each, strict=True)) for each in zip(*questions.values(), strict=True)]
    return [_of_list(row, each) for each in questions or ()]


def listed_diagrams(row: Row) -> list[Asked]:
    """`listed`, where options that are letters of the picture keep their names."""
    return [_diagram(row, each.question, *prune(each.options, each.right)) for each in listed(row)]


def _of_list(row: Row, each: dict[str, Any]) -> Asked:
    try:
        if each.get("options"):
            return _choice(row, text_in(row, each["question"], "question"), each["options"], each["right"])
        answers = each.get("answers") or [each["answer"]]
    except KeyError as error:
        raise RowsError(f"a question in row {row.index} of {row.rows.where} has no {error}") from None
    said = tuple(_said(row, answer) for answer in answers)
    kept = tuple(answer for answer in said if answer.strip()) or ("",)  # without an answer it is not asked
    return Asked(text_in(row, each["question"], "question", blank=True), kept)


def _answers(row: Row, column: str) -> tuple[str, ...]:
    value = row[column]
    given = text_list(row, column) if isinstance(value, str) else value
    answers = tuple(answer for answer in (_said(row, each) for each in given or ()) if answer.strip())
    if not answers:
        raise RowsError(f"row {row.index} of {row.rows.where} has no answers in {column}: is it of a test split?")
    return answers


def _text(row: Row, column: str) -> str:
    return text_in(row, row[column], column)


def _said(row: Row, answer: Any) -> str:
    if isinstance(answer, dict):
        answer = answer.get("raw_answer") or answer.get("answer")
    if answer is None:
        raise RowsError(f"row {row.index} of {row.rows.where} has a question without an answer: is it of a test split?")
    return written_out(row, answer, "an answer")


def _choice(row: Row, question: str, options: Sequence[str], right: Any, style: str = "") -> Asked:
    texts = tuple(written_out(row, option, "an option") for option in options)
    return Asked(question, options=texts, right=_right(row, right, len(options)), style=style)


def _right(row: Row, right: Any, options: int) -> int:
    try:
        number = int(right)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < options:
        raise RowsError(
            f"row {row.index} of {row.rows.where} has {options} options and {right!r} as the number of the right one: "
            "is it of a test split?"
        )
    return number


def _diagram(row: Row, question: str, options: Sequence[str], right: int) -> Asked:
    names = letter_names(row, options)
    if names is None:
        return _choice(row, question, options, right, "ai2_diagram")
    return Asked("\n".join([question, *names, ""]), (names[right],), style="ai2_diagram_no_letter")


# --- The Cauldron ---------------------------------------------------------------------------------------------------

# It asks "Question: ...\nChoices:\nA. ...\nB. ...\nAnswer with the letter." and hears "Answer: B"; or it says on a last
# line how to answer ("Give a very brief answer."), and hears a sentence ("Pink.").
_CHOICES = re.compile(r"Question:\s*(.*?)\s*\nChoices:\s*\n(.*?)\nAnswer with the letter\b", re.DOTALL)
_OPTION = re.compile(r"^[A-Z]\.[^\S\n]?(.*)$", re.MULTILINE)
_LETTER = re.compile(r"(?:Answer:\s*)?([A-Z])\b")


def cauldron_rows(rows: Rows, *, single: bool, plain: Callable[[str], str] = str) -> Rows:
    """Rows of HuggingFaceM4/the_cauldron (columns images and texts) with the columns image and questions.

    `single`: a row for each question, for a set that the reference does not group by picture. `plain`: what else an
    answer needs, besides losing its full stop, to be in the authors' words.
    """
    places = None
    if single:
        places = [(row, part) for row, texts in enumerate(rows.column("texts")) for part in range(len(texts))]
    cells = _Cauldron(rows, places, plain)
    length = len(rows) if places is None else len(places)
    return Rows(rows.where, rows.folder, ("image", "questions"), length, cells.cell)


@dataclass(frozen=True, eq=False)
class _Cauldron:
    rows: Rows
    places: Sequence[tuple[int, int]] | None  # (row, number of the question); None: a row with all its questions
    plain: Callable[[str], str]

    def cell(self, index: int, column: str) -> Any:
        row, part = (index, None) if self.places is None else self.places[index]
        if column == "image":
            images = self.rows.cell(row, "images")
            return images[0] if images else None
        texts = self.rows.cell(row, "texts")
        return [self._reworded(text) for text in (texts if part is None else [texts[part]])]

    def _reworded(self, text: dict[str, str]) -> dict[str, Any]:
        user, assistant = text["user"].strip(), text["assistant"].strip()
        choices = _CHOICES.search(user)
        if choices is None:
            return {
                "question": user.rpartition("\n")[0].strip() or user,
                "answer": self.plain(assistant.removesuffix(".")),
            }
        letter = _LETTER.match(assistant)
        return {
            "question": choices[1],
            "options": _OPTION.findall(choices[2]),
            "right": ord(letter[1]) - ord("A") if letter else None,
        }


def yes_is_one(answer: str) -> str:
    """FigureQA's authors, and so the reference, answer with 1 and 0."""
    return {"yes": "1", "no": "0"}.get(answer.lower(), answer)
