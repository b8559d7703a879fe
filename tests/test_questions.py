"""Questions have answers that follow from the annotation, in Molmo's grammar."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from molmo_edge.data.drawn.sprite_names import COCO_LABELS, SYNONYMS, overlapping, sprite_sources
from molmo_edge.data.english import counted, listed, plural, with_article
from molmo_edge.data.grounded_questions import QA, describe, grounded_names, region_of, write_questions
from molmo_edge.frontend.answer_points import without_absent
from molmo_edge.frontend.points import NONE, parse_count, parse_points

VOCABULARY = sorted(set(sprite_sources()) | COCO_LABELS)


def item(label: str, *boxes: tuple[float, float, float, float], **more: Any) -> dict[str, Any]:
    points = [[round((b[0] + b[2]) / 2, 1), round((b[1] + b[3]) / 2, 1)] for b in boxes]
    return {"label": label, "boxes": [list(b) for b in boxes], "points": points, **more}


def scene(*objects: dict[str, Any], **more: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {"texts": [], "clocks": [], "maybe_present": [], "backdrop": "plain", "source": "scene"}
    return {**empty, "objects": list(objects), **more}


def ask(annotation: dict[str, Any], rounds: int = 200, seed: int = 0) -> list[QA]:
    rng = np.random.default_rng(seed)
    return [
        qa for _ in range(rounds) for qa in write_questions(annotation, rng, max_questions=8, vocabulary=VOCABULARY)
    ]


DOGS = item("dog", (70, 60, 90, 80), (10, 70, 30, 90), (10, 10, 30, 30))
CUP = item("cup", (40, 40, 60, 60))


def test_absent_names_are_answered_by_text_or_by_a_tag_without_points() -> None:
    asked = {}
    for tags in (False, True):
        rng = np.random.default_rng(0)
        asked[tags] = [
            qa
            for _ in range(50)
            for qa in write_questions(scene(CUP), rng, max_questions=8, vocabulary=VOCABULARY, empty_tags=tags)
        ]
    assert [qa.question for qa in asked[False]] == [qa.question for qa in asked[True]]
    kinds = set()
    for plain, tagged in zip(asked[False], asked[True], strict=True):
        if plain.kind != "negative":
            assert plain.answer == tagged.answer
            continue
        assert plain.answer == NONE
        found = re.fullmatch(r'(Counting the )?<points alt="(.+)">(.+)</points>( shows a total of 0\.)?', tagged.answer)
        assert found, tagged.answer
        assert found[2] == found[3]
        assert found[2] in plain.question
        assert bool(found[1]) == bool(found[4])
        assert parse_count(without_absent(tagged.answer)) == 0
        kinds.add(without_absent(tagged.answer) == NONE)
    assert kinds == {True, False}


def test_points_counts_and_boxes_agree() -> None:
    asked = [qa for qa in ask(scene(DOGS, CUP)) if qa.kind in ("point", "count")]
    assert {qa.kind for qa in asked} == {"point", "count"}
    expected = {3: [(20, 20), (20, 80), (80, 70)], 1: [(50, 50)]}  # by x, then by y
    for qa in asked:
        points = parse_points(qa.answer)
        assert [(p.x, p.y) for p in points] == expected[len(points)]
        assert qa.target_boxes is not None
        assert qa.target_boxes.dtype == np.float32
        assert qa.target_boxes.shape == (len(points), 4)
        for point, box in zip(points, qa.target_boxes, strict=True):
            assert box[0] <= point.x <= box[2]
            assert box[1] <= point.y <= box[3]
        label = points[0].label
        assert label in ("dog", "dogs", "cup", "cups")
        assert label in qa.question
        if qa.kind == "count":
            assert parse_count(qa.answer) == len(points)
            assert qa.answer.startswith("Counting the <point")
            assert qa.answer.endswith(f"a total of {len(points)}.")


def test_the_sdk_asks_as_training_did() -> None:
    from molmo_edge.frontend.prompts import caption_question, count_question, point_question

    asked = [qa.question for qa in ask(scene(DOGS))]
    for own, kinds in ((point_question("dog"), "point"), (count_question("dogs"), "count")):
        assert asked.count(own) > 0.3 * 200, kinds
    assert asked.count(caption_question()) > 0.3 * 200


def test_crowds_and_backdrops_are_neither_counted_nor_denied() -> None:
    annotation = scene(
        item("person", (1, 1, 9, 20), crowd=True), CUP, maybe_present=["cat", "traffic light"], backdrop="photo"
    )
    questions = ask(annotation, 400)
    forbidden = {"person", "cat", "traffic light", "green traffic light"}
    assert {qa.kind for qa in questions} >= {"point", "count", "negative", "caption"}
    for qa in questions:
        if qa.kind != "caption":
            assert not any(re.search(rf"\b({f}|{plural(f)})\b", qa.question) for f in forbidden), qa
    assert describe(annotation) == "A photo with a cup and many people."


def test_too_many_and_too_small_are_not_asked_for() -> None:
    many = item("ant", *[(x, 10, x + 5, 15) for x in range(0, 91, 7)])
    assert len(many["boxes"]) == 13
    tiny = item("bee", (40, 40, 60, 60), (10, 10, 11, 12))
    asked = ask(scene(many, tiny))
    assert {qa.kind for qa in asked} == {"negative", "caption", "what", "yes_no"}
    assert {qa.answer for qa in asked if qa.kind == "yes_no"} == {"No."}


def test_only_what_is_absent_is_denied() -> None:
    annotation = scene(item("owl", (10, 10, 40, 40)), item("truck", (50, 50, 90, 90)))
    present = {"owl", "truck"} | overlapping("owl") | overlapping("truck")
    assert {"bird", "car"} <= present
    rng = np.random.default_rng(0)
    for _ in range(50):
        asked = write_questions(annotation, rng, max_questions=20, vocabulary=present)
        assert asked
        assert "negative" not in {qa.kind for qa in asked}
    denied = [qa for qa in ask(annotation, 400) if qa.kind == "negative"]
    assert len({qa.question for qa in denied}) > 100
    assert {qa.answer for qa in denied} == {"There are none."}
    assert all(qa.target_boxes is None for qa in denied)


@pytest.mark.parametrize(
    ("annotation", "allowed"),
    [
        ({"source": "coco"}, set()),  # not annotated: nothing is known to be absent
        ({"source": "coco", "objects": [item("dog", (1, 1, 50, 50))]}, {"giraffe", "penguin", "fork"}),
        ({"source": "bccd", "objects": [item("platelet", (1, 1, 50, 50))]}, {"giraffe", "penguin"}),
    ],
)
def test_photographs_deny_what_their_source_settles(annotation: dict[str, Any], allowed: set[str]) -> None:
    rng = np.random.default_rng(0)
    names = ["giraffe", "penguin", "fork", "shoe", "tree", "dog"]  # shoes are everywhere and never labelled
    denied = set()
    for _ in range(300):
        for qa in write_questions(annotation, rng, max_questions=9, vocabulary=names):
            if qa.kind == "negative":
                denied |= {n for n in names if n in qa.question}
    assert denied == allowed


def test_an_emptied_label_is_absent_but_a_cut_one_is_not() -> None:
    gone = {"source": "coco", "objects": [item("cat"), item("fork", crowd=True)]}
    rng = np.random.default_rng(0)
    asked = [
        qa.question for _ in range(50) for qa in write_questions(gone, rng, max_questions=9, vocabulary=["cat", "fork"])
    ]
    assert asked
    assert all("cat" in q for q in asked)


@pytest.mark.parametrize(
    ("box", "region"),
    [
        ((0, 0, 20, 20), "top left"),
        ((40, 0, 60, 20), "top"),
        ((80, 0, 100, 20), "top right"),
        ((0, 40, 20, 60), "left"),
        ((0, 0, 100, 100), "center"),
        ((90, 45, 100, 55), "right"),
        ((0, 90, 10, 100), "bottom left"),
        ((45, 80, 55, 100), "bottom"),
        ((100, 100, 100, 100), "bottom right"),
        ((20, 0, 46, 20), None),  # its centre is on the border of left and middle
    ],
)
def test_regions(box: tuple[float, ...], region: str | None) -> None:
    assert region_of(box) == region


def test_places_are_asked_of_unique_things_only() -> None:
    questions = ask(scene(DOGS, CUP, item("glasses", (70, 5, 95, 25))))
    places = {qa.answer for qa in questions if qa.kind == "where"}
    assert places == {"The cup is in the center.", "The glasses are at the top right."}
    assert "Where are the glasses?" in {qa.question for qa in questions}
    what = {(qa.question, qa.answer) for qa in questions if qa.kind == "what"}
    assert ("What is at the top left?", "A dog.") in what
    assert ("What is in the center?", "A cup.") in what
    on_photo = ask(scene(CUP, backdrop="photo"))
    assert not any(qa.kind == "what" for qa in on_photo), "other things may be there"


def test_texts_and_clocks_are_read() -> None:
    texts = [{"text": "EXIT", "box": [2, 2, 28, 12]}, {"text": "42", "box": [70, 80, 95, 95]}]
    clocks = [{"time": "3:25", "box": [40, 40, 60, 60]}]
    questions = ask(scene(item("clock", (40, 40, 60, 60)), texts=texts, clocks=clocks))
    read = {qa.question: qa.answer for qa in questions if qa.kind == "read"}
    assert read["What does the text say?"] == "EXIT\n42"
    assert read["What is written at the top left?"] == "EXIT"
    assert read["What is written at the bottom right?"] == "42"
    assert {qa.answer for qa in questions if qa.kind == "clock"} == {"3:25"}
    cut = ask(scene(texts=texts, texts_cut=True, clocks=[*clocks, *clocks]))
    assert not {"read", "clock"} & {qa.kind for qa in cut}


def test_captions() -> None:
    text = {"text": "OPEN", "box": [0, 0, 20, 10]}
    assert describe(scene(CUP, DOGS, texts=[text])) == 'A photo with three dogs, a cup and the text "OPEN".'
    assert describe(scene()) == ""
    human = {"source": "coco", "captions": ["A dog. ", "One dog."], "objects": [CUP]}
    assert {qa.answer for qa in ask(human) if qa.kind == "caption"} == {"A dog.", "One dog."}
    garment = {"source": "clothing", "fields": {"class": "outwear"}}
    assert {qa.answer for qa in ask(garment) if qa.kind == "caption"} == {"A jacket."}
    receipt = {"source": "receipts", "fields": {"total": "9.30", "date": "", "company": "ACME"}}
    assert {qa.answer for qa in ask(receipt) if qa.kind == "read"} == {"9.30", "ACME"}


def test_no_question_comes_twice_and_none_too_many() -> None:
    rng = np.random.default_rng(1)
    for limit in (0, 1, 3, 50):
        asked = write_questions(scene(DOGS, CUP), rng, max_questions=limit, vocabulary=VOCABULARY)
        assert len(asked) <= limit
        assert not limit or asked
        keys = [(qa.kind, qa.question) for qa in asked]
        assert len(keys) == len(set(keys))


def test_grounded_names_lists_every_instance() -> None:
    names = grounded_names(scene(DOGS, item("person", (1, 1, 2, 2), crowd=True)))
    assert [n for n, _ in names] == ["dog", "dog", "dog", "person"]
    assert names[0][1] == [70, 60, 90, 80]
    assert grounded_names({"source": "coco"}) == []


@pytest.mark.parametrize(
    ("noun", "many"),
    [
        ("dog", "dogs"), ("bus", "buses"), ("box", "boxes"), ("wine glass", "wine glasses"), ("cherry", "cherries"),
        ("toy", "toys"), ("person", "people"), ("kitchen knife", "kitchen knives"), ("sheep", "sheep"),
        ("scissors", "scissors"), ("toothbrush", "toothbrushes"), ("tennis racket", "tennis rackets"),
        ("computer mouse", "computer mice"), ("watch", "watches"), ("french fries", "french fries"),
    ],
)  # fmt: skip
def test_plurals(noun: str, many: str) -> None:
    assert plural(noun) == many


def test_articles_numbers_and_lists() -> None:
    assert [with_article(n) for n in ("dog", "apple", "unicorn", "umbrella", "bread", "skis", "ufo")] == [
        "a dog", "an apple", "a unicorn", "an umbrella", "some bread", "skis", "a ufo",
    ]  # fmt: skip
    assert [counted("dog", n) for n in (1, 2, 12, 13)] == ["a dog", "two dogs", "twelve dogs", "many dogs"]
    assert [listed(list(p)) for p in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]


def test_synonyms_are_not_names_of_other_things() -> None:
    others = {word for words in SYNONYMS.values() for word in words}
    assert not others & set(VOCABULARY)


def test_more_questions_about_absent_labels_can_be_asked_for() -> None:
    names = ["cat", "horse", "zebra", "bear", "sheep", "cow", "goat"]

    def share(absent: int) -> tuple[float, int]:
        asked = [
            write_questions(
                scene(DOGS, CUP), np.random.default_rng(seed), max_questions=8, vocabulary=names, absent=absent
            )
            for seed in range(100)
        ]
        found = [sum(qa.kind == "negative" for qa in each) for each in asked]
        assert all(len({qa.question for qa in each}) == len(each) for each in asked)
        return sum(found) / sum(map(len, asked)), max(found)

    few, most = share(2)
    assert most == 2
    more, most = share(5)
    assert 2 < most <= 5
    assert more > 1.5 * few
