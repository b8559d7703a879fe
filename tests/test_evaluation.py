"""Scores by hand, and nano's validation on a model that knows every answer."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from molmo_edge.evaluation.annotated_pictures import Picture
from molmo_edge.evaluation.pointing import Pointing, score_points
from molmo_edge.evaluation.text_scores import character_error
from molmo_edge.frontend.points import Point
from recipes.nano.score_answers import evaluate, minutes_apart, picture_case


def test_points_and_boxes_are_matched_one_to_one() -> None:
    wide, narrow = [0, 0, 50, 50], [10, 10, 20, 20]
    # The first point fits both boxes, the second only the wide one: greedy matching could waste it.
    assert score_points([Point(15, 15), Point(40, 40)], [wide, narrow]).hits == 2
    assert score_points([Point(15, 15), Point(16, 16)], [narrow]) == Pointing(hits=1, points=2, boxes=1)
    assert score_points([Point(60, 60)], [wide, narrow]).f1 == 0
    assert score_points([Point(20, 20)], [narrow]).f1 == 1, "the edge belongs to the box"
    assert score_points([], []).f1 == 1
    assert Pointing(hits=1, points=2, boxes=1).f1 == pytest.approx(2 / 3)


def test_character_error_is_edit_distance_over_length() -> None:
    assert character_error("Stop ", "stop") == 0
    assert character_error("shop", "stop") == pytest.approx(0.25)
    assert character_error("", "stop") == 1
    assert character_error("something else", "a") == 1, "never more than 1"


class Knowing:
    """Answers from the annotation; if `wrong`, it points at the corner and miscounts."""

    def __init__(self, annotation: dict[str, Any], wrong: bool = False):
        self.boxes = {o["label"]: o["boxes"] for o in annotation["objects"]}
        self.annotation, self.wrong = annotation, wrong

    def encode(self, rgb: np.ndarray) -> np.ndarray:
        return rgb

    def point(self, _scene: Any, label: str) -> Any:
        if self.wrong:
            return SimpleNamespace(points=(Point(0, 0),))
        return SimpleNamespace(points=[Point((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in self.boxes.get(label, [])])

    def count(self, _scene: Any, label: str) -> Any:
        return SimpleNamespace(count=None if self.wrong else len(self.boxes[label]))

    def caption(self, _scene: Any) -> Any:
        return SimpleNamespace(text="Two dogs run.")

    def ask(self, _scene: Any, question: str) -> Any:
        return SimpleNamespace(text=" Stop" if "text" in question else "3:25")


@pytest.mark.parametrize("wrong", [False, True])
def test_validation_of_a_model_that_knows_and_of_one_that_does_not(wrong: bool) -> None:
    annotation = {
        "source": "scene",
        "objects": [
            {"label": "dog", "boxes": [[40, 40, 60, 60], [70, 70, 90, 90]]},
            {"label": "people", "boxes": [[1, 1, 2, 2]], "crowd": True},
        ],
        "texts": [{"text": "stop", "box": [0, 0, 10, 10]}],
        "clocks": [{"time": "3:25", "box": [10, 10, 20, 20]}],
        "captions": ["Grass.", "Dogs run away."],
    }
    case = Picture("scenes", lambda: np.zeros((4, 4, 3), np.uint8), annotation)
    asked = picture_case(case, 3)
    assert [question.name for question in asked.questions if question.boxes] == ["dog"], "a crowd is not asked about"
    report = evaluate(Knowing(annotation, wrong), [asked], progress=lambda _: None)  # type: ignore[arg-type]
    pointing, counting = report["pointing"]["scenes"], report["counting"]["scenes"]
    assert (pointing["f1"]["value"], pointing["f1"]["n"]) == (0 if wrong else 1, 1)
    assert pointing["centre_f1"]["value"] == pytest.approx(2 / 3, abs=1e-3)
    assert counting["exact"]["value"] == (0 if wrong else 1)
    assert report["none"]["scenes"]["right"]["value"] == (0 if wrong else 1)
    assert report["reading"]["anls"]["value"] == report["reading"]["exact"]["value"] == 1
    assert report["clocks"]["close"]["value"] == 1
    captions = report["captions"]
    assert captions["token_f1"]["value"] == pytest.approx(2 / 3, abs=1e-3), "of the nearest caption"
    assert captions["names"]["value"] == 1
    assert captions["usual_names"]["value"] == 0


def test_minutes_on_a_dial() -> None:
    assert minutes_apart("3:25", "3:20") == 5
    assert minutes_apart("12:58", "1:02") == 4
    assert minutes_apart("11:58", "12:02") == 4
    assert minutes_apart("a quarter", "12:02") == 360


def test_names_are_mentioned_as_whole_words_and_nothing_asked_gives_no_score() -> None:
    dogs = [{"label": "dog", "boxes": [[40, 40, 60, 60]]}, {"label": "do", "boxes": [[1, 1, 9, 9]]}]
    annotation = {"source": "scene", "objects": dogs, "captions": ["Two dogs run."]}
    case = picture_case(Picture("scenes", lambda: np.zeros((4, 4, 3), np.uint8), annotation), 3)
    report = evaluate(Knowing(annotation), [case], progress=lambda _: None)  # type: ignore[arg-type]
    assert report["captions"]["names"]["value"] == 0.5, "dogs, and not do"
    assert report["reading"] == report["clocks"] == {}
    json.dumps(report, allow_nan=False)
