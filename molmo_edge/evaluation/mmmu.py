"""The score of MMMU, equal to the reference's copy of the official parser, quirks included.

An answer that names no option counts as a random letter, as in the official parser.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from string import ascii_uppercase

_BEFORE_AN_ANSWER = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")

# Matched in lower-cased answers. Several of these can match the same text.
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,200
    re.compile(r"-?\d+(?:\.\d+)?e[+-]?\d+"),  # 1.2e3
    re.compile(r"-?(?:\d*\.\d+|\d+\b)(?!e[+-]?\d|,|\d)"),  # 1200
)


def mmmu_score(
    target: str | Sequence[str],
    response: str,
    *,
    question_type: str,
    options: Sequence[str],
    rng: random.Random,
) -> float:
    """1 if `response`, the result of `clean_answer`, gives one of the targets.

    Reference: olmo/eval/vqa.py::mmmu_score, which uses one generator for all questions, seeded with 42.

    Args:
        target: Of "multiple-choice" questions a letter, A for the first option.
        options: Of "multiple-choice" questions; not used for others.
        rng: Draws one letter for each response that names no option.
    """
    targets = [target] if isinstance(target, str) else list(target)
    if question_type == "multiple-choice":
        return float(_letter(response, [option for option in options if option], rng) in targets)
    known = [form for each in targets for form in _forms(each)]
    return float(any(_agree(form, known) for text in _answers(response) for form in _forms(text)))


def _letter(response: str, options: Sequence[str], rng: random.Random) -> str:
    """The last letter as "(B)", else as " B ", else, in more than five words, the last text of an option."""
    for mark in ",.!?;:'":
        response = response.strip(mark)
    response = f" {response} "
    letters = ascii_uppercase[: len(options)]
    places = _last_places(response, {letter: f"({letter})" for letter in letters})
    if not places:
        places = _last_places(response, {letter: f" {letter} " for letter in letters})
    if not places and len(response.split()) > 5:
        texts = {letter: option.lower() for letter, option in zip(letters, options, strict=False)}
        places = _last_places(response.lower(), texts)
    return max(places, key=places.__getitem__) if places else rng.choice(letters)


def _last_places(text: str, signs: dict[str, str]) -> dict[str, int]:
    """The last index of each sign in the text, without signs that do not occur."""
    places = {letter: text.rfind(sign) for letter, sign in signs.items()}
    return {letter: place for letter, place in places.items() if place >= 0}


def _answers(response: str) -> list[str]:
    """Ends of lines that can be the answer, or the whole response if there are none, and the numbers in these."""
    # The reference also splits at sentences, but never does: it looks for capitals in lower-cased text.
    lines = response.strip().strip(".").lower().split("\n")
    ends = list(_ends(lines)) or ["\n".join(lines)]
    return ends + [number for end in ends for pattern in _NUMBERS for number in pattern.findall(end)]


def _ends(lines: Sequence[str]) -> Iterator[str]:
    for i, line in enumerate(lines):
        signs = (*_BEFORE_AN_ANSWER, "=") if i == len(lines) - 1 else _BEFORE_AN_ANSWER
        shortest = ""
        for sign in signs:
            if sign in line:
                end = line.split(sign)[-1].strip()
                # An empty end does not count as the shortest, but discards the end before it.
                if not shortest or len(end) < len(shortest):
                    shortest = end
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            yield shortest


def _forms(text: str) -> list[str | float]:
    """A number rounded to two decimals, or lower-cased text; one character becomes two texts, " x" and "x "."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _agree(answer: str | float, known: Sequence[str | float]) -> bool:
    """Whether a number is among the known forms, or a text contains one of them."""
    if isinstance(answer, str):
        return any(isinstance(form, str) and form in answer for form in known)
    return answer in known
