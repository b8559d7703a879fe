"""Scores of an answer's text, from 0 to 1.

They equal the reference's, quirks included, because published figures were computed with these quirks; libraries that
differ in them cannot replace this code. Except where noted, functions take the result of `clean_answer`, which the
reference (olmo/eval/evaluators.py::VqaEval) applies first.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from molmo_edge.errors import MolmoEdgeError

# The correct spellings in the VQA metric's table of contractions, which maps spellings without one of the apostrophes
# to these. Entries with "I" never match: answers are lower-cased first.
_CONTRACTION_TABLE = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am might've mightn't mightn't've
    must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
    we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
    who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've
    you'll you're you've
"""
_RIGHT_SPELLING = {
    word[:i] + word[i + 1 :]: word
    for word in _CONTRACTION_TABLE.split()
    for i, letter in enumerate(word)
    if letter == "'"
} | {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}  # the last is the table's own mistake

_VQA_DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_VQA_MARKS = ';/[]"{}()=+\\_-><@`,?!'


def edit_distance(a: str, b: str) -> int:
    """The Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def character_error(answer: str, truth: str) -> float:
    """Edit distance / length of the truth, at most 1. Case and surrounding spaces are ignored."""
    a, b = answer.strip().lower(), truth.strip().lower()
    return min(1.0, edit_distance(a, b) / max(1, len(b)))


def clean_answer(text: str) -> str:
    """The part of an answer that is scored: the text after "Answer:", else the most frequent line, the first on a tie.

    Runs of spaces become one space, except after "Answer:". Reference: olmo/eval/evaluators.py::VqaEval.
    """
    text = text.strip()
    if "Answer:" in text:
        return text.split("Answer:")[1].strip()
    lines = [" ".join(line.split()) for line in text.split("\n")]
    return Counter(lines).most_common(1)[0][0]


def vqa_score(targets: str | Sequence[str], prediction: str) -> float:
    """A third for each equal human answer, at most 1. Reference: olmo/eval/vqa.py::vqa_score.

    A single target, given as a string, is not normalised: it must equal the normalised prediction.
    """
    predicted = _normalise(prediction)
    if isinstance(targets, str):
        return float(predicted == targets)
    return min(sum(_normalise(target) == predicted for target in targets) / 3.0, 1.0)


def _normalise(answer: str) -> str:
    """The VQA metric's form of an answer. Reference: olmo/eval/vqa.py::preprocess_answer."""
    answer = answer.replace("\n", " ").replace("\t", " ").lower().strip()
    # If any comma is between digits, all marks are deleted, not only that comma.
    number = re.search(r"\d,\d", answer) is not None
    bare = answer
    for mark in _VQA_MARKS:
        vanishes = number or f"{mark} " in answer or f" {mark}" in answer
        bare = bare.replace(mark, "" if vanishes else " ")
    # The reference mistypes a lookbehind as "(?!<=\d)", which always matches, and passes re.UNICODE, 32, as the count:
    # the first 32 periods that no digit follows are deleted, whatever is before them.
    bare = re.sub(r"\.(?!\d)", "", bare, count=32)
    words = (_VQA_DIGITS.get(word, word) for word in bare.split())
    return " ".join(_RIGHT_SPELLING.get(word, word) for word in words if word not in ("a", "an", "the"))


def anls(target: str, prediction: str, threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity: 1 - edit distance / longer length, 0 if the distance reaches `threshold`.

    1 if both texts are empty. DocVQA and InfoVQA take the best over all targets. arXiv 1907.00490, equation 1.
    Reference: olmo/eval/vqa.py::anls_metric.
    """
    longer = max(len(target), len(prediction))
    distance = edit_distance(target.lower(), prediction.lower()) / longer if longer else 0.0
    return 1 - distance if distance < threshold else 0.0


def relaxed_correctness(target: str, prediction: str) -> float:
    """1 for a number within 5 percent of the target, or for the same text, ignoring case.

    A target of 0 is compared as text. ChartQA takes the best over all targets. arXiv 2203.10244, section 5.1.
    Reference: olmo/eval/vqa.py::relaxed_correctness.
    """
    predicted, truth = _number(prediction), _number(target)
    if predicted is not None and truth:
        return float(abs(predicted - truth) / abs(truth) <= 0.05)
    return float(prediction.lower() == target.lower())


def _number(text: str) -> float | None:
    percent = text.endswith("%")
    try:
        return float(text.rstrip("%")) / 100.0 if percent else float(text)
    except ValueError:
        return None


def exact_match(targets: Sequence[str], prediction: str) -> float:
    """1 if the prediction is one of the targets, ignoring case. Reference: VqaEval's "em"."""
    return float(prediction.lower() in [target.lower() for target in targets])


def select_option(prediction: str, options: Sequence[str]) -> int:
    """The index of the equal option, else of the only one that contains the prediction, else of the nearest.

    Raises MolmoEdgeError without options, or if two are equal except for case and surrounding spaces.
    Reference: olmo/eval/vqa.py::select_mc_option.
    """
    predicted = prediction.lower().strip()
    plain = [option.lower().strip() for option in options]
    if not plain or len(set(plain)) != len(plain):
        raise MolmoEdgeError(
            f"a question has the options {list(options)!r}: there must be at least one, and they must differ in more "
            "than case. Correct the question's options"
        )
    if predicted in plain:
        return plain.index(predicted)
    containing = [i for i, option in enumerate(plain) if predicted in option]
    if len(containing) == 1:
        return containing[0]
    distances = [edit_distance(option, predicted) for option in plain]
    return distances.index(min(distances))


def real_world_qa_score(target: str, prediction: str, multiple_choice: bool) -> float:
    """RealWorldQA: the right letter of A to D, or equal words. Reference: olmo/eval/vqa.py::real_world_qa_score."""
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
    """MathVista without extraction of answers by GPT-4, with which published figures are higher.

    `response` is the whole answer, without `clean_answer`; the other arguments are columns of the data set.
    Reference: olmo/eval/vqa.py::math_vista_score with use_api=False, olmo/eval/math_vista_utils.py.
    """
    if question_type == "multi_choice":
        assert choices is not None
        letters = [chr(ord("A") + i) for i in range(len(choices))]
        return float(_extract_choice(choices[select_option(response, letters)], choices, letters) == answer)
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
    # The data set has a precision of 1.0 or 2.0, which Python's round() refuses: in the reference all of these
    # questions are wrong. The official metric uses int(precision).
    return float(not isinstance(precision, float) and str(round(number, precision)) == answer)


def _extract_choice(choice: str, choices: Sequence[str], letters: Sequence[str]) -> str:
    """The choice after MathVista's extraction, which is meant for a model's text.

    A choice that is one of the letters, or has a letter before a colon, is taken as that letter.
    """
    choice = choice.strip()
    letter = re.search(r"([a-zA-Z]):", choice)
    if letter:
        choice = letter.group(1).upper()
    if choice in letters:
        return choices[letters.index(choice)]
    return min(choices, key=lambda other: edit_distance(choice, other))


def token_f1(prediction: str, truth: str) -> float:
    """F1 of the words of two texts, ignoring order and case: 2 * shared / (words in one + words in the other).

    As in SQuAD (arXiv 1606.05250, section 6.1), except that articles count. 1 if neither text has words.
    """
    predicted, known = (Counter(re.findall(r"\w+", text.lower())) for text in (prediction, truth))
    total = predicted.total() + known.total()
    return 2 * (predicted & known).total() / total if total else 1.0


def clock_score(prediction: str, hour: int, minute: int) -> dict[str, float]:
    """{"exact", "close"}: the answer is the right time, or at most 3 minutes off in the same hour.

    `prediction` is the whole answer, `hour` is 0 to 23. If hour and minute are -1 the clock is not readable, and an
    answer without a colon is right. "PM" adds 12 to the stated hour even if it is 12: "12:10 PM" is never right.
    Seconds are ignored. Reference: olmo/eval/evaluators.py::ClockEval with is_test=False, for clocks without seconds.
    """
    text = prediction.strip()
    if hour < 0 and minute < 0:
        declined = float(":" not in text)
        return {"exact": declined, "close": declined}
    before, _, after = text.partition(":")
    stated_hour = read_integer("".join(before.split()[-1:]))
    stated_minute = read_integer("".join(after.split(":")[0].split()[:1]))
    if stated_hour is None or stated_minute is None:
        return {"exact": 0.0, "close": 0.0}
    if "PM" in text:
        stated_hour += 12
    right_hour = stated_hour == hour or (hour == 0 and stated_hour == 12)
    return {
        "exact": float(right_hour and stated_minute == minute),
        "close": float(right_hour and abs(stated_minute - minute) <= 3),
    }


def read_integer(text: str) -> int | None:
    """int(text), or None if it raises ValueError."""
    try:
        return int(text)
    except ValueError:
        return None
