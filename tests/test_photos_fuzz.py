"""Annotated photos with random damage are refused by line, or give questions whose correct answer scores 1."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from points_damage import damage_value

from molmo_edge.data.annotated_photos import PhotoError
from molmo_edge.evaluation.suites import load_suite
from molmo_edge.frontend.points import format_count, format_points

SCENE: dict[str, Any] = {
    "image": "a.png", "source": "scene", "width": 40, "height": 30, "split": "val",
    "objects": [
        {"label": "dog", "boxes": [[10, 10, 20, 20], [60, 60, 80, 80]], "points": [[15, 15], [70, 70]]},
        {"label": "people", "boxes": [[1, 1, 2, 2]], "points": [[1.5, 1.5]], "crowd": True},
    ],
    "texts": [{"text": "stop", "box": [0, 0, 10, 10]}],
    "clocks": [{"time": "12:25", "box": [10, 10, 20, 20]}],
}  # fmt: skip
RECEIPT: dict[str, Any] = {
    "image": "a.png",
    "source": "receipts",
    "fields": {"total": "9.50", "date": "", "company": "A"},
}
PHOTOS = 300


def test_damaged_annotations_are_refused_or_can_be_answered(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    accepted = refused = 0
    for seed in range(PHOTOS):
        rng = random.Random(seed)
        changed, how = damage_value(rng, copy.deepcopy(rng.choice([SCENE, RECEIPT])))
        (tmp_path / "annotations.jsonl").write_text(f"{json.dumps(SCENE)}\n{json.dumps(changed)}\n")
        try:
            asked = load_suite(f"photos:{tmp_path}")
        except PhotoError as error:
            check_message(str(error), (seed, how, error))
            refused += 1
            continue
        accepted += 1
        for question in asked:
            question.text.encode()
            right = {"absent": "There are none.", "read": question.truth, "clock": question.truth, "caption": ""}
            if question.kind == "point":
                middles = [((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in question.truth]
                right["point"] = format_points(middles, "thing")
            if question.kind == "count":
                right["count"] = format_count([(1, 1)] * question.truth, "things")
            scores = question.score(right[question.kind])
            assert all(score == 1 for score in scores.values()), (seed, how, question, scores)
            assert question.image().shape == (30, 40, 3)
    assert min(accepted, refused) > PHOTOS / 10, (accepted, refused)


def check_message(message: str, about: object) -> None:
    assert "line 2 of " in message, about
    assert "\n" not in message, about
    message.encode()  # it can be printed


@pytest.mark.parametrize("time", ["25:00", "12:60", "1:5", "１２:25"])
def test_impossible_times_are_refused(tmp_path: Path, time: str) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "annotations.jsonl").write_text(json.dumps({"image": "a.png", "clocks": [{"time": time}]}))
    with pytest.raises(PhotoError, match="the time of a clock must be written as"):
        load_suite(f"photos:{tmp_path}")
