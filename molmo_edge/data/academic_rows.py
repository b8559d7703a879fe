"""Questions and answers from the rows of the academic training sets, worded as in the reference.

Sources: olmo/data/academic_datasets.py for the questions, olmo/data/data_formatter.py for the choice of an answer
(select_answer "best"). A row has one of three layouts:
- one question, in the columns of the set's hub repository: the functions from `short` on;
- a picture with all its questions, as read from the authors' files or a rows.jsonl: `listed`;
- the same in the wording of The Cauldron, which `cauldron_rows` reverts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from molmo_edge.data.ai2d import letter_names, prune
from molmo_edge.data.annotation_prompts import multiple_choice
from molmo_edge.data.choices import pick
from molmo_edge.data.examples import Annotation
from molmo_edge.data.rows import Row, Rows, RowsError, text_in, text_list, written_out

# With these weights, the sums over human and machine questions are equal, as in the reference's loader of the authors'
# files. Its loader of the hub's files intends the same but takes the label 1 ("machine") for human.
_HUMAN, _MACHINE = 7398, 20901  # questions of the training split
HUMAN_WEIGHT = 2 * _MACHINE / (_HUMAN + _MACHINE)  # 1.477
MACHINE_WEIGHT = 2 * _HUMAN / (_HUMAN + _MACHINE)  # 0.523


@dataclass(frozen=True)
class Asked:
    """A question with people's answers, or with options."""

    question: str
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    right: int = 0  # index of the correct option
    style: str = ""  # "": that of the data set
    weight: float = 1.0


def annotate(asked: Asked, style: str, rng: np.random.Generator) -> Annotation:
    """`style`: for questions without a style."""
    style = asked.style or style
    if asked.options:
        return multiple_choice(asked.question, asked.options, asked.right, style)
    return Annotation(style, (asked.question, best_answer(asked.answers, rng)), asked.weight)


def best_answer(answers: Sequence[str], rng: np.random.Generator) -> str:
    """The most frequent answer; a random one of several."""
    counts = Counter(answers)
    most = max(counts.values())
    return pick(rng, [answer for answer, count in counts.items() if count == most])


# --- rows of one question -------------------------------------------------------------------------------------------


def short(row: Row) -> list[Asked]:
    """`answers`: texts, or dicts as in VQAv2 and OK-VQA."""
    return [Asked(row.text("question"), _answers(row, "answers"))]


def okvqa(row: Row) -> list[Asked]:
    """Unstemmed answers. Copies whose `answers` are stemmed have the others in `answers_original`."""
    return [Asked(row.text("question"), _answers(row, "answers_original" if "answers_original" in row else "answers"))]


def chart_qa(row: Row) -> list[Asked]:
    """Columns `query` and `label`, the answers."""
    return [Asked(row.text("query"), _answers(row, "label"))]


def chart_qa_weighted(row: Row) -> list[Asked]:
    """`chart_qa` with HUMAN_WEIGHT for questions written by people and MACHINE_WEIGHT for the others."""
    human = row["human_or_machine"] in (0, "human")
    return [Asked(row.text("query"), _answers(row, "label"), weight=HUMAN_WEIGHT if human else MACHINE_WEIGHT)]


def a_okvqa_mc(row: Row) -> list[Asked]:
    """The multiple choice task of A-OKVQA: `choices` and `correct_choice_idx`."""
    return [_choice(row, row.text("question"), text_list(row, "choices"), row["correct_choice_idx"])]


def a_okvqa_da(row: Row) -> list[Asked]:
    """The direct answer task of A-OKVQA: `direct_answers`."""
    return [Asked(row.text("question"), _answers(row, "direct_answers"))]


def science_qa(row: Row) -> list[Asked]:
    """The hint, if any, precedes the question. (The reference writes the hint twice and drops the question.)"""
    hint = row["hint"]
    question = row.text("question")
    if hint is not None and text_in(row, hint, "hint", blank=True):
        question = f"{hint}\n{question}"
    return [_choice(row, question, text_list(row, "choices"), row["answer"])]


def ai2d(row: Row) -> list[Asked]:
    """Options without empty and repeated ones; options which are letters in the diagram keep their names."""
    options = text_list(row, "options")
    options, right = prune(options, _right(row, row["answer"], len(options)))
    return [_diagram(row, row.text("question"), options, right)]


def tabwmp(row: Row) -> list[Asked]:
    """Only the answer. Choices are not shown."""
    return [Asked(row.text("question"), (_said(row, row["answer"]),))]


def listed(row: Row) -> list[Asked]:
    """All questions about a picture: `questions`, dicts of a question with an answer, answers, or options."""
    questions = row["questions"]
    if isinstance(questions, dict):  # of lists: how `datasets` stores a Sequence of dicts
        questions = [dict(zip(questions, each, strict=True)) for each in zip(*questions.values(), strict=True)]
    return [_of_list(row, each) for each in questions or ()]


def listed_diagrams(row: Row) -> list[Asked]:
    """`listed`, except that options which are letters in the picture keep their names."""
    return [_diagram(row, each.question, *prune(each.options, each.right)) for each in listed(row)]


def _of_list(row: Row, each: dict[str, Any]) -> Asked:
    try:
        if each.get("options"):
            return _choice(row, text_in(row, each["question"], "question"), each["options"], each["right"])
        answers = each.get("answers") or [each["answer"]]
    except KeyError as error:
        raise RowsError(f"a question in {row.where} has no {error}") from None
    said = tuple(_said(row, answer) for answer in answers)
    kept = tuple(answer for answer in said if answer.strip()) or ("",)  # a question without an answer is left out
    return Asked(text_in(row, each["question"], "question", blank=True), kept)


def _answers(row: Row, column: str) -> tuple[str, ...]:
    value = row[column]
    given = text_list(row, column) if isinstance(value, str) else value
    answers = tuple(answer for answer in (_said(row, each) for each in given or ()) if answer.strip())
    if not answers:
        raise RowsError(f"{row.where} has no answers in {column}: is it of a test split?")
    return answers


def _said(row: Row, answer: Any) -> str:
    if isinstance(answer, dict):
        answer = answer.get("raw_answer") or answer.get("answer")
    if answer is None:
        raise RowsError(f"{row.where} has a question without an answer: is it of a test split?")
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
            f"{row.where} has {options} options and {right!r} as the index of the correct one: is it of a test split?"
        )
    return number


def _diagram(row: Row, question: str, options: Sequence[str], right: int) -> Asked:
    names = letter_names(row, options)
    if names is None:
        return _choice(row, question, options, right, "ai2_diagram")
    return Asked("\n".join([question, *names, ""]), (names[right],), style="ai2_diagram_no_letter")


# --- The Cauldron ---------------------------------------------------------------------------------------------------

# Its questions are "Question: ...\nChoices:\nA. ...\nB. ...\nAnswer with the letter." with the answer "Answer: B", or
# end in a line such as "Give a very brief answer." with a sentence as the answer ("Pink.").
_CHOICES = re.compile(r"Question:\s*(.*?)\s*\nChoices:\s*\n(.*?)\nAnswer with the letter\b", re.DOTALL)
_OPTION = re.compile(r"^[A-Z]\.[^\S\n]?(.*)$", re.MULTILINE)
_LETTER = re.compile(r"(?:Answer:\s*)?([A-Z])\b")


def cauldron_rows(rows: Rows, *, single: bool, plain: Callable[[str], str] = str) -> Rows:
    """Convert rows of HuggingFaceM4/the_cauldron (columns images, texts) to the columns image and questions.

    `single`: a row for each question, for sets that the reference does not group by picture. `plain` restores the
    authors' wording of an answer, after its full stop is removed.
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
    places: Sequence[tuple[int, int]] | None  # (row, question index); None: rows with all their questions
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
    """FigureQA's authors, and so the reference, answer 1 and 0."""
    return {"yes": "1", "no": "0"}.get(answer.lower(), answer)
