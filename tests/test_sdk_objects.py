"""Pickling, copying, comparing and introspecting the SDK's objects."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from molmo_edge import Answer, Molmo, Point
from molmo_edge.errors import MolmoEdgeError

IMAGE = np.full((64, 64, 3), 90, np.uint8)
SAMPLING = {
    "max_new_tokens": "int",
    "temperature": "float",
    "top_k": "int",
    "top_p": "float",
    "seed": "int | None",
}


@pytest.fixture(scope="module")
def molmo() -> Any:
    with Molmo() as molmo:
        yield molmo


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("Molmo", "path or hub id"),
        ("Scene", "pass its image on"),
        ("Chat", "`history`"),
        ("Stream", "`answer`"),
    ],
)
def test_what_belongs_to_the_process_is_not_copied(
    way: Callable[[Any], Any], kind: str, advice: str, molmo: Molmo
) -> None:
    made: dict[str, Callable[[], Any]] = {
        "Molmo": lambda: molmo,
        "Scene": lambda: molmo.encode(IMAGE),
        "Chat": lambda: molmo.chat(IMAGE),
        "Stream": lambda: molmo.stream(IMAGE, "What?"),
    }
    with pytest.raises(MolmoEdgeError, match=f"a {kind} cannot be pickled or copied.*{advice}") as caught:
        way(made[kind]())
    assert isinstance(caught.value, TypeError), "as Python raises for other objects: libraries look for it"


def test_an_answer_is_pickled_and_copied(molmo: Molmo) -> None:
    answer = molmo.ask(IMAGE, "What?", max_new_tokens=2)
    for other in (pickle.loads(pickle.dumps(answer)), copy.deepcopy(answer)):
        assert other == answer
        assert np.array_equal(other.image, answer.image)


def test_the_same_answer_twice_is_equal(molmo: Molmo) -> None:
    first, second = (molmo.ask(IMAGE, "What?", max_new_tokens=3) for _ in range(2))
    assert first.usage.seconds != second.usage.seconds
    assert first == second
    assert hash(first) == hash(second)
    assert molmo.ask(molmo.encode(IMAGE), "What?", max_new_tokens=3) == first, "prefilled before, the same answer"


def test_other_answers_are_not_equal() -> None:
    answer = Answer("a", (Point(1.0, 2.0, "a"),), 1, (3, 4))
    assert answer == replace(answer)
    for change in ({"text": "b"}, {"points": ()}, {"count": 2}, {"token_ids": (3,)}, {"complete": False}):
        assert answer != replace(answer, **change)


@pytest.mark.parametrize("name", ["ask", "point", "count", "caption", "stream", "ask_batch"])
def test_sampling_keywords_are_typed(name: str) -> None:
    parameters = inspect.signature(getattr(Molmo, name)).parameters
    assert {key: parameters[key].annotation for key in SAMPLING} == SAMPLING
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values())
    defaults = inspect.signature(Molmo.ask).parameters
    assert all(parameters[key].default == defaults[key].default for key in SAMPLING)


def test_sampling_keywords_arrive(molmo: Molmo) -> None:
    options: dict[str, Any] = {"max_new_tokens": 4, "temperature": 1.5, "top_k": 50, "top_p": 0.9, "seed": 3}
    turns = [("What?", "A cup.")]
    asked = molmo.ask(IMAGE, "Point to the cup.", **options, history=turns)
    assert molmo.point(IMAGE, "the cup", **options, history=turns).token_ids == asked.token_ids
    assert len(molmo.count(IMAGE, "cups", **options).token_ids) <= 4
    assert len(molmo.caption(IMAGE, **options).token_ids) <= 4
    for ask in (molmo.point, molmo.count):
        with pytest.raises(TypeError, match="temprature"):
            ask(IMAGE, "cup", temprature=1.0)  # type: ignore[call-arg]
