"""Rows without texts, or with coordinates that are not numbers, are refused: "None" and "nan" never reach a prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo_edge.data.academic import open_academic
from molmo_edge.data.android import action_words
from molmo_edge.data.examples import DataSet
from molmo_edge.data.pixmo import open_pixmo
from molmo_edge.data.rows import RowsError, rows_of
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.evaluation.benchmarks import benchmark_questions

NAN, INF = math.nan, math.inf
Write = Callable[..., Path]


@pytest.fixture
def copy(tmp_path: Path) -> Write:
    """A folder with rows.jsonl, with a picture for each row."""

    def write(*rows: dict[str, Any]) -> Path:
        Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
        lines = [json.dumps({"image": "a.png", **row}) for row in rows]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        return tmp_path

    return write


def texts(data: DataSet, index: int = 0) -> list[str]:
    return [m for each in data.example(index, np.random.default_rng(0)).annotations for m in each.messages]


POINT = {"x": 50.0, "y": 20.0}
POINTED: dict[str, Any] = {"label": "cup", "points": [POINT], "count": 1, "collection_method": "pointing",
                           "image_url": "https://example.org/1.jpg"}  # fmt: skip
EXPLAINED: dict[str, Any] = {
    "question": "What is open?", "parsed_response": "The <|POINT|> is.", "points": [[[50.0, 20.0]]],
    "inline_text": ["door"], "alt_text": ["open door"], "image_url": "https://example.org/1.jpg",
}  # fmt: skip
PIXMO = [
    *(("pixmo_points", POINTED, {"points": [{"x": x, "y": 5.0}]}) for x in (NAN, INF, -INF, None, "five", True)),
    ("pixmo_points", POINTED, {"points": [{"x": 5.0, "y": NAN}]}),
    ("pixmo_points", POINTED, {"points": {"x": [1.0, NAN], "y": [1.0, 1.0]}}),
    *(("pixmo_points", POINTED, {"label": label}) for label in ("", "  ", None, NAN, 5)),
    ("pixmo_points", POINTED, {"points": None, "count": None}),
    ("pixmo_points_counting", POINTED, {"points": [{"x": NAN, "y": NAN}]}),
    ("pixmo_count", POINTED, {"points": {"x": [NAN], "y": [1.0]}}),
    ("pixmo_count", POINTED, {"label": None}),
    *(("pixmo_point_explanations", EXPLAINED, {name: [value]})
      for name in ("inline_text", "alt_text") for value in (None, "", NAN)),
    ("pixmo_point_explanations", EXPLAINED, {"inline_text": [None], "points": [[]]}),
    ("pixmo_point_explanations", EXPLAINED, {"points": [[[NAN, 20.0]]]}),
    ("pixmo_point_explanations", EXPLAINED, {"question": None}),
    ("pixmo_point_explanations", EXPLAINED, {"parsed_response": NAN}),
    *(("pixmo_cap", {"caption": "A cup."}, {"caption": value}) for value in (None, "", NAN)),
    ("pixmo_cap_with_transcripts", {"caption": "A cup.", "transcripts": ["um"]}, {"transcripts": [None]}),
    *(("pixmo_ask_model_anything", {"question": "Why?", "answer": "So.", "image_url": "u"}, {name: value})
      for name in ("question", "answer") for value in (None, " ", NAN, 5)),
    ("pixmo_cap_qa", {"messages": ["Why?", "So."], "image_url": "u"}, {"messages": ["Why?", None]}),
    ("pixmo_cap_qa", {"question": "Why?", "answer": "So.", "image_url": "u"}, {"answer": None}),
    ("pixmo_docs_charts", {"questions": [{"question": "Why?", "answer": "So."}]},
     {"questions": [{"question": "Why?", "answer": None}]}),
    *(("pixmo_clocks", {"text": "8:15"}, {"text": value}) for value in (None, NAN)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "change"), PIXMO)
def test_pixmo_rows_without_words_or_places_are_refused(
    copy: Write, name: str, row: dict[str, Any], change: dict[str, Any]
) -> None:
    split = "validation" if name == "pixmo_clocks" else "train"
    whole = open_pixmo(name, local=copy(row), images=Path(), split=split)
    assert not any("None" in text or "nan" in text for text in texts(whole))
    with pytest.raises(RowsError, match="row 0 of "):
        texts(open_pixmo(name, local=copy({**row, **change}), images=Path(), split=split))


def test_an_empty_list_still_says_that_there_are_none(copy: Write) -> None:
    for change in ({"points": [], "count": 0}, {"points": [], "count": None}, {"points": None, "count": 0}):
        data = open_pixmo("pixmo_points", local=copy({**POINTED, **change}), images=Path())
        assert texts(data)[1] == "There are none."


def test_a_name_that_no_file_can_have_is_a_missing_picture(copy: Write) -> None:
    data = open_pixmo("pixmo_points", local=copy({**POINTED, "image": "a" * 300}), images=Path())
    with pytest.raises(RowsError, match=r"row 0 of .* has no picture .*aaa"):
        texts(data)


def test_the_trainer_draws_another_row_and_says_why(copy: Write) -> None:
    pytest.importorskip("torch")
    from molmo_edge.data.mixture import Draw
    from molmo_edge.training.loader import Samples

    bad = {**POINTED, "points": [{"x": NAN, "y": 1.0}], "image_url": "https://example.org/0.jpg"}
    data = open_pixmo("pixmo_points", local=copy(bad, POINTED), images=Path())
    samples = Samples([data], lambda example, _rng: example, 0)  # type: ignore[arg-type]
    example, replaced = samples[Draw(0, 0, 0, 0)]
    assert "cup" in example.annotations[0].messages[1]  # type: ignore[attr-defined]
    assert len(replaced) == 1
    assert "row 0 of " in replaced[0]
    assert "nan as x of a point" in replaced[0]


ASKED = {"question": "What?", "answers": ["tea"]}
CHOICE = {"question": "What?", "choices": ["tea", "cake"], "correct_choice_idx": 1, "difficult_direct_answer": False}
SCIENCE = {"question": "What?", "hint": "", "choices": ["tea", "cake"], "answer": 1}
LISTED = {"questions": [{"question": "What?", "answer": "tea"}]}
STEP = {"ll_instruction": "tap it", "hl_instruction": "make tea", "target_action": "Click(1.0, 2.0)"}
TRAINED = [
    *(("text_vqa", ASKED, {"question": value}) for value in (None, "", NAN, 5)),
    *(("text_vqa", ASKED, {"answers": value}) for value in ([None], [NAN], ["", " "], 5, [[]])),
    ("chart_qa", {"query": "What?", "label": ["tea"]}, {"query": None}),
    ("chart_qa_weighted", {"query": "What?", "label": ["tea"], "human_or_machine": 0}, {"label": [NAN]}),
    *(("a_okvqa_mc", CHOICE, {"choices": value}) for value in ([None, "cake"], [NAN, "cake"], "['tea', None]", 5)),
    ("a_okvqa_mc", CHOICE, {"question": None}),
    ("science_qa_img", SCIENCE, {"hint": NAN}),
    ("science_qa_img", SCIENCE, {"hint": "A hint.", "question": None}),
    ("science_qa_img", SCIENCE, {"choices": ["tea", None]}),
    ("tally_qa", LISTED, {"questions": [{"question": None, "answer": "tea"}]}),
    ("tally_qa", LISTED, {"questions": [{"question": "What?", "answer": NAN}]}),
    ("tally_qa", LISTED, {"questions": [{"question": "What?", "answer": " "}]}),
    ("tally_qa", LISTED, {"questions": [{"question": " ", "answer": "tea"}]}),
    ("tally_qa", LISTED, {"questions": ["What?"]}),
    ("tally_qa", LISTED, {"questions": [{"question": "What?", "options": ["tea", None], "right": 0}]}),
    *(("android_control", STEP, {name: None}) for name in STEP),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "change"), TRAINED)
def test_academic_rows_without_words_are_refused(
    copy: Write, name: str, row: dict[str, Any], change: dict[str, Any]
) -> None:
    assert not any("None" in text or "nan" in text for text in texts(open_academic(name, local=copy(row))))
    with pytest.raises(RowsError, match="row 0 of "):
        texts(open_academic(name, local=copy({**row, **change})))


def test_only_the_question_without_an_answer_is_left_out(copy: Write) -> None:
    row = {"questions": [{"question": "What?", "answer": 3}, {"question": "Who?", "answers": ["", ""]}]}
    assert texts(open_academic("tally_qa", local=copy(row))) == ["What?", "3"]
    assert texts(open_academic("text_vqa", local=copy({"question": "What?", "answers": ["", "", "tea"]})))[1] == "tea"


def test_a_click_at_no_place_is_refused() -> None:
    for x in (NAN, INF):
        with pytest.raises(RowsError, match="action 'click' is at "):
            action_words({"action_type": "click", "x": x, "y": 1}, b"")
    with pytest.raises(RowsError, match="is not an image"):
        action_words({"action_type": "click", "x": 1, "y": 1}, b"\x89PNG\r\n\x1a\n and no more")


VQA = {"question": "What?", "answers": [{"answer": "tea"}], "question_id": 1, "image_id": 1}
TEXT = {"question": "What?", "answers": ["tea"], "question_id": 1, "image_id": 1}
MATH = {"question": "What?", "choices": ["1", "2"], "answer": "1", "question_type": "multi_choice",
        "answer_type": "text", "precision": None, "pid": "1", "decoded_image": "a.png"}  # fmt: skip
EVALUATED = [
    *(("vqa2", VQA, {"question": value}) for value in (None, NAN, "", 5)),
    ("vqa2", VQA, {"answers": [{"answer": None}]}),
    ("text_vqa", TEXT, {"answers": [None]}),
    ("text_vqa", TEXT, {"question": None}),
    ("chart_qa", {"query": "What?", "label": ["1"], "human_or_machine": 0}, {"query": None}),
    ("chart_qa", {"query": "What?", "label": ["1"], "human_or_machine": 0}, {"label": [NAN]}),
    ("math_vista", MATH, {"choices": ["1", None]}),
    ("math_vista", MATH, {"precision": NAN}),
    ("ai2d", {"question": "What?", "options": ["tea", "cake"], "answer": "1"}, {"answer": None}),
    ("ai2d", {"question": "What?", "options": ["tea", "cake"], "answer": "1"}, {"options": ["tea", None]}),
    ("pixmo_count", {"label": "cup", "count": 1}, {"label": None}),
    ("pixmo_count", {"label": "cup", "count": 1}, {"count": None}),
    ("pixmo_count", {"label": "cup", "count": 1}, {"count": NAN}),
    *(("pixmo_points", {"label": "cup", "points": [POINT], "masks": []}, {"points": [{"x": x, "y": 1.0}]})
      for x in (NAN, INF, None)),
    ("pixmo_points", {"label": "cup", "points": [POINT], "masks": []}, {"points": None}),
    ("pixmo_points", {"label": "cup", "points": [POINT], "masks": []}, {"label": " "}),
]  # fmt: skip


@pytest.mark.parametrize(("task", "row", "change"), EVALUATED)
def test_benchmark_rows_without_words_or_places_are_refused(
    copy: Write, task: str, row: dict[str, Any], change: dict[str, Any]
) -> None:
    def asked(**changed: Any) -> list[str]:
        return [q.text for q in benchmark_questions(task, local=copy({**row, **changed}), on_skipped=pytest.fail)]

    (text,) = asked()
    assert "None" not in text
    assert "nan" not in text
    with pytest.raises(MolmoEdgeError, match="row 0 of "):
        asked(**change)


def test_lines_that_are_not_text_or_too_deep_are_named(copy: Write) -> None:
    folder = copy(POINTED)
    line = (folder / "rows.jsonl").read_bytes()
    for damage, message in (
        (b"caf\xe9", "cannot be read as UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{", "is not JSON"),
    ):
        (folder / "rows.jsonl").write_bytes(line + b"\n\n" + damage)
        with pytest.raises(RowsError, match=rf"line 3 of .*rows\.jsonl .*{message}"):
            open_pixmo("pixmo_points", local=folder, images=Path())
    (folder / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + line)
    assert len(open_pixmo("pixmo_points", local=folder, images=Path())) == 1


def test_rows_in_memory_are_named_too(tmp_path: Path) -> None:
    from molmo_edge.data.rows import number_in, text_in

    row = rows_of(tmp_path, [{"a": 1}, {"a": None}])[1]
    with pytest.raises(RowsError, match=r"row 1 of .* has no label: a text is required"):
        text_in(row, row["a"], "label")
    assert number_in(row, "5", "x") == 5
