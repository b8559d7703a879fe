"""The score of MMMU, equal to that of its official parser as the reference has it.

An answer that names no option counts as a letter drawn at random, as MMMU's authors have it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from string import ascii_uppercase

_BEFORE_AN_ANSWER = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")

# Answers are lower-cased before numbers are looked for. One piece of text may be found by several of these.
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
    """1 if `response`, as `clean_answer` leaves it, gives one of the targets.

    A "multiple-choice" target is a letter, A for the first option; `options` is not used for others. `rng` is asked
    once for each choice that names no option: the reference has one generator for all questions, seeded with 42.
    Reference: olmo/eval/vqa.py::mmmu_score.
    """
    targets = [target] if isinstance(target, str) else list(target)
    if question_type == "multiple-choice":
        return float(_letter(response, [option for option in options if option], rng) in targets)
    known = [form for each in targets for form in _forms(each)]
    return float(any(_agree(form, known) for text in _answers(response) for form in _forms(text)))


def _letter(response: str, options: Sequence[str], rng: random.Random) -> str:
    """The letter that stands last: "(B)", else " B ", else, in more than five words, the text of an option."""
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
    """Where each sign stands last; signs that are not in the text are left out."""
    places = {letter: text.rfind(sign) for letter, sign in signs.items()}
    return {letter: place for letter, place in places.items() if place >= 0}


def _answers(response: str) -> list[str]:
    """The ends of lines that may be the answer, and the numbers in them; the whole response if no line has one."""
    # The reference would also divide at sentences, but looks for their capitals in lower-cased text.
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
                # An end without text does not count as the shortest, but discards the one before it.
                if not shortest or len(end) < len(shortest):
                    shortest = end
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            yield shortest


def _forms(text: str) -> list[str | float]:
    """A number to two decimals, or lower-cased text; one character alone is two texts, with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _agree(said: str | float, known: Sequence[str | float]) -> bool:
    """A number must be among the known forms, a text must hold one of them."""
    if isinstance(said, str):
        return any(isinstance(form, str) and form in said for form in known)
    return said in known
