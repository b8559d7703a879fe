"""Scores of one answer's text, from 0 to 1, equal to the reference's with all its quirks.

Published figures were made with these quirks: none is mended here. `clean_answer` comes first in the reference
(olmo/eval/evaluators.py::VqaEval), and its result is what the other functions expect, unless they say otherwise.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from molmo_edge.errors import MolmoEdgeError

# The right spellings of the public VQA metric's table of contractions. It leads from a spelling without one of its
# apostrophes to the right one. Answers are lower-cased before, so that the entries with "I" are never met.
_CONTRACTIONS = [
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "couldn't've",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hadn't've",
    "hasn't",
    "haven't",
    "he'd",
    "he'd've",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "I'd've",
    "I'm",
    "I've",
    "isn't",
    "it'd",
    "it'd've",
    "it'll",
    "ma'am",
    "might've",
    "mightn't",
    "mightn't've",
    "must've",
    "mustn't",
    "needn't",
    "not've",
    "o'clock",
    "oughtn't",
    "'ow's'at",
    "shan't",
    "she'd've",
    "should've",
    "shouldn't",
    "shouldn't've",
    "somebody'd've",
    "somebody'll",
    "somebody's",
    "someone'd",
    "someone'd've",
    "someone'll",
    "someone's",
    "something'd",
    "something'd've",
    "something'll",
    "that's",
    "there'd",
    "there'd've",
    "there're",
    "there's",
    "they'd",
    "they'd've",
    "they'll",
    "they're",
    "they've",
    "'twas",
    "wasn't",
    "we'd've",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "what've",
    "when's",
    "where'd",
    "where's",
    "where've",
    "who'd",
    "who'd've",
    "who'll",
    "who's",
    "who've",
    "why'll",
    "why're",
    "why's",
    "won't",
    "would've",
    "wouldn't",
    "wouldn't've",
    "y'all",
    "y'all'd've",
    "y'all'll",
    "you'd",
    "you'd've",
    "you'll",
    "you're",
    "you've",
]
_RIGHT_SPELLING = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS for i, letter in enumerate(word) if letter == "'"
} | {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}  # the last is the table's own mistake

_VQA_DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_VQA_MARKS = ';/[]"{}()=+\\_-><@`,?!'


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest characters put in, taken out or replaced that make `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def character_error(answer: str, truth: str) -> float:
    """Edit distance over the truth's length, 1 at most. Case and spaces at the ends are ignored."""
    a, b = answer.strip().lower(), truth.strip().lower()
    return min(1.0, edit_distance(a, b) / max(1, len(b)))


def clean_answer(text: str) -> str:
    """What is scored of an answer: what follows "Answer:", else its most frequent line, the first of these on a tie.

    Runs of spaces become one, except after "Answer:". Reference: olmo/eval/evaluators.py::VqaEval.
    """
    text = text.strip()
    if "Answer:" in text:
        return text.split("Answer:")[1].strip()
    lines = [" ".join(line.split()) for line in text.split("\n")]
    return Counter(lines).most_common(1)[0][0]


def vqa_score(targets: str | Sequence[str], prediction: str) -> float:
    """A third for each of the people's answers that says the same, 1 at most. Reference: olmo/eval/vqa.py::vqa_score.

    A single target, given as a string, must be the normalised prediction itself, as it is not normalised.
    """
    said = _normalise(prediction)
    if isinstance(targets, str):
        return float(said == targets)
    return min(sum(_normalise(target) == said for target in targets) / 3.0, 1.0)


def _normalise(answer: str) -> str:
    """The VQA metric's form of an answer. Reference: olmo/eval/vqa.py::preprocess_answer."""
    answer = answer.replace("\n", " ").replace("\t", " ").lower().strip()
    # Digits around any comma make every mark vanish, not that comma alone.
    number = re.search(r"\d,\d", answer) is not None
    bare = answer
    for mark in _VQA_MARKS:
        vanishes = number or f"{mark} " in answer or f" {mark}" in answer
        bare = bare.replace(mark, "" if vanishes else " ")
    # The reference looks behind the period with a mistyped "(?!<=\d)", which always holds, and gives re.UNICODE, 32,
    # as the count: the first 32 periods without a digit after them go, whatever is before them.
    bare = re.sub(r"\.(?!\d)", "", bare, count=32)
    words = (_VQA_DIGITS.get(word, word) for word in bare.split())
    return " ".join(_RIGHT_SPELLING.get(word, word) for word in words if word not in ("a", "an", "the"))


def anls(target: str, prediction: str, threshold: float = 0.5) -> float:
    """1 less the edit distance over the longer text's length, 0 from `threshold` on; 1 where both texts are empty.

    DocVQA and InfoVQA take the best over all targets. Average normalised Levenshtein similarity: arXiv 1907.00490,
    equation 1. Reference: olmo/eval/vqa.py::anls_metric.
    """
    longer = max(len(target), len(prediction))
    distance = edit_distance(target.lower(), prediction.lower()) / longer if longer else 0.0
    return 1 - distance if distance < threshold else 0.0


def relaxed_correctness(target: str, prediction: str) -> float:
    """1 for a number within 5 percent of the target, or for the same text whatever its case.

    A target of 0 is compared as text. ChartQA takes the best over all targets. arXiv 2203.10244, section 5.1.
    Reference: olmo/eval/vqa.py::relaxed_correctness.
    """
    said, truth = _number(prediction), _number(target)
    if said is not None and truth:
        return float(abs(said - truth) / abs(truth) <= 0.05)
    return float(prediction.lower() == target.lower())


def _number(text: str) -> float | None:
    percent = text.endswith("%")
    try:
        return float(text.rstrip("%")) / 100.0 if percent else float(text)
    except ValueError:
        return None


def exact_match(targets: Sequence[str], prediction: str) -> float:
    """1 if the prediction is one of the targets, whatever its case. Reference: VqaEval's "em"."""
    return float(prediction.lower() in [target.lower() for target in targets])


def select_option(prediction: str, options: Sequence[str]) -> int:
    """The place of the option that is meant: the same, else the only one that holds the prediction, else the nearest.

    Raises MolmoEdgeError where two options are the same but for case and spaces at the ends, or where there is none.
    Reference: olmo/eval/vqa.py::select_mc_option.
    """
    said = prediction.lower().strip()
    plain = [option.lower().strip() for option in options]
    if not plain or len(set(plain)) != len(plain):
        raise MolmoEdgeError(
            f"The options of a question are {list(options)!r}, but they must be one or more and differ from each "
            "other, whatever their case. Correct the question's options."
        )
    if said in plain:
        return plain.index(said)
    holding = [i for i, option in enumerate(plain) if said in option]
    if len(holding) == 1:
        return holding[0]
    distances = [edit_distance(option, said) for option in plain]
    return distances.index(min(distances))


def real_world_qa_score(target: str, prediction: str, multiple_choice: bool) -> float:
    """RealWorldQA: the right letter of A to D, or the same words. Reference: olmo/eval/vqa.py::real_world_qa_score."""
    if multiple_choice:
        return float("ABCD"[select_option(prediction, "ABCD")] == target)
    return float(_normalise(prediction) == _normalise(target))


def math_vista_score(
    response: str,
    *,
    answer: str,
    question_type: str,
    answer_type: str,
    choices: Sequence[str] | None,
    precision: float | None,
) -> float:
    """MathVista, its answers found without OpenAI's help. `response` is the whole answer, not cleaned.

    Published figures had GPT-4 find them, so they are higher. `answer` and the rest are columns of the data set.
    Reference: olmo/eval/vqa.py::math_vista_score with use_api=False, olmo/eval/math_vista_utils.py.
    """
    if question_type == "multi_choice":
        assert choices is not None
        letters = [chr(ord("A") + i) for i in range(len(choices))]
        return float(_settle(choices[select_option(response, letters)], choices, letters) == answer)
    if answer_type not in ("integer", "float"):
        return float(response.strip() == answer)
    try:
        number = float(response)
    except ValueError:
        return 0.0
    if not math.isfinite(number):
        return 0.0
    if answer_type == "integer":
        return float(str(int(number)) == answer)
    # The data set's column holds 1.0 and 2.0, and Python's round() refuses such a precision: the reference then has
    # no answer, and all of these questions are wrong. int(precision) is the official metric's.
    return float(not isinstance(precision, float) and str(round(number, precision)) == answer)


def _settle(choice: str, choices: Sequence[str], letters: Sequence[str]) -> str:
    """The choice again, after MathVista's clean-up, which was made for a model's text.

    A choice that is one of the letters, or has a letter before a colon, is taken for that letter.
    """
    choice = choice.strip()
    letter = re.search(r"([a-zA-Z]):", choice)
    if letter:
        choice = letter.group(1).upper()
    if choice in letters:
        return choices[letters.index(choice)]
    return min(choices, key=lambda other: edit_distance(choice, other))


def token_f1(prediction: str, truth: str) -> float:
    """How far two texts have the same words, whatever their order and case: 2 * shared / (words + words).

    As in SQuAD (arXiv 1606.05250, section 6.1), but articles count. 1 where neither text has a word.
    """
    said, known = (Counter(re.findall(r"\w+", text.lower())) for text in (prediction, truth))
    total = said.total() + known.total()
    return 2 * (said & known).total() / total if total else 1.0


def clock_score(prediction: str, hour: int, minute: int) -> dict[str, float]:
    """Whether an answer tells the time: "exact", and "close" where the minute may be 3 off (59 and 1 are 58 apart).

    `prediction` is the whole answer, `hour` 0 to 23. Where both are -1 the time cannot be told, and an answer without
    a colon is right. "PM" adds 12 to the hour said, to 12 as well: "12:10 PM" is never right. Seconds are ignored.
    Reference: olmo/eval/evaluators.py::ClockEval, not is_test, for clocks without seconds.
    """
    text = prediction.strip()
    if hour < 0 and minute < 0:
        declined = float(":" not in text)
        return {"exact": declined, "close": declined}
    before, _, after = text.partition(":")
    said_hour = read_integer("".join(before.split()[-1:]))
    said_minute = read_integer("".join(after.split(":")[0].split()[:1]))
    if said_hour is None or said_minute is None:
        return {"exact": 0.0, "close": 0.0}
    if "PM" in text:
        said_hour += 12
    right_hour = said_hour == hour or (hour == 0 and said_hour == 12)
    return {
        "exact": float(right_hour and said_minute == minute),
        "close": float(right_hour and abs(said_minute - minute) <= 3),
    }


def read_integer(text: str) -> int | None:
    """`text` as Python's int() reads it, None if it does not."""
    try:
        return int(text)
    except ValueError:
        return None
