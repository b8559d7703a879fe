"""Benchmark rows in the hub's columns give the reference's questions and scores."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo_edge.data.rows import FetchError, RowsError
from molmo_edge.evaluation.benchmarks import TASKS, benchmark_questions
from molmo_edge.evaluation.questions import Question, by_image
from molmo_edge.frontend.crops import load_image

datasets = pytest.importorskip("datasets")
TEXT, NUMBER, SMALL = datasets.Value("string"), datasets.Value("int64"), datasets.Value("int32")
PICTURE = datasets.Image()


@pytest.fixture(scope="module", autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        datasets.disable_progress_bars()
        yield


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), 128 if mode == "L" else (200, 120, 40))


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    picture(width, height).save(file, "PNG")
    return file.getvalue()


def hub_like(folder: Path, split: str, features: dict[str, Any], *rows: dict[str, Any], inside: str = "data") -> Path:
    """A clone of a hub repository: one parquet file, named as on the hub."""
    (folder / inside).mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(list(rows), features=datasets.Features(features))
    table.to_parquet(str(folder / inside / f"{split}-00000-of-00001.parquet"))
    return folder


def asked(task: str, local: Path, **more: Any) -> list[Question]:
    """All questions; fails if a row is skipped."""
    return list(benchmark_questions(task, local=local, on_skipped=pytest.fail, **more))


def size(question: Question) -> tuple[int, int]:
    height, width = load_image(question.image()).shape[:2]
    return width, height


def test_all_benchmarks_of_the_paper_are_there_with_its_settings() -> None:
    # fmt: off
    assert list(TASKS) == [
        "ai2d", "chart_qa", "vqa2", "doc_qa", "info_qa", "text_vqa", "real_world_qa", "mmmu", "math_vista",
        "countbench_qa", "pixmo_count", "pixmo_points",
    ]
    # fmt: on
    for name, task in TASKS.items():
        pointing = name in ("countbench_qa", "pixmo_count", "pixmo_points")
        assert (task.name, task.max_crops, task.max_new_tokens) == (name, *((12, 192) if pointing else (36, 12)))
    assert len(set(TASKS["mmmu"].configs)) == 30
    with pytest.raises(RowsError, match=r'"chartqa" is not a known benchmark \(known: ai2d, chart_qa'):
        benchmark_questions("chartqa", on_skipped=pytest.fail)


CHART = {
    "image": PICTURE,
    "query": TEXT,
    "label": [TEXT],
    "human_or_machine": datasets.ClassLabel(names=["human", "machine"]),
}


def test_chart_qa_is_relaxed_and_knows_people_from_machines(tmp_path: Path) -> None:
    rows = [
        {"image": picture(60, 40), "query": "How many?", "label": ["40"], "human_or_machine": "human"},
        {"image": picture(50, 30), "query": "Which year?", "label": ["Red"], "human_or_machine": "machine"},
    ]
    first, second = asked("chart_qa", hub_like(tmp_path, "test", CHART, *rows))
    assert (first.id, first.group, first.kind, first.text) == (
        "chart_qa/000000",
        "chart_qa",
        "task",
        "chart_qa: How many?",
    )
    assert (first.truth, first.max_new_tokens, size(first), size(second)) == (["40"], 12, (60, 40), (50, 30))
    assert first.score(" 40 ") == {"relaxed": 1.0, "relaxed_human": 1.0, "em": 1.0}
    assert first.score("41.9") == {"relaxed": 1.0, "relaxed_human": 1.0, "em": 0.0}
    assert first.score("43") == {"relaxed": 0.0, "relaxed_human": 0.0, "em": 0.0}
    assert second.score("Answer: red") == {"relaxed": 1.0, "relaxed_augmented": 1.0, "em": 1.0}


def test_a_limit_takes_rows_evenly(tmp_path: Path) -> None:
    rows = [{"image": None, "query": f"{i}?", "label": ["x"], "human_or_machine": "human"} for i in range(10)]
    local = hub_like(tmp_path, "test", CHART, *rows)
    assert [q.id for q in asked("chart_qa", local, limit=3)] == [
        "chart_qa/000000",
        "chart_qa/000003",
        "chart_qa/000006",
    ]
    assert len(asked("chart_qa", local, limit=99)) == 10


VQA = {
    "question_type": TEXT,
    "multiple_choice_answer": TEXT,
    "answers": [{"answer": TEXT, "answer_confidence": TEXT, "answer_id": NUMBER}],
    "image_id": NUMBER,
    "answer_type": TEXT,
    "question_id": NUMBER,
    "question": TEXT,
    "image": PICTURE,
}
VOTES = [
    {"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(["yes"] * 8 + ["no"] * 2)
]


def test_vqa2_counts_votes_from_the_hub_and_from_the_official_files(tmp_path: Path) -> None:
    row = {"question_id": 42001, "question": "Is it?", "answers": VOTES, "image_id": 42, "image": picture(64, 48)}
    local = hub_like(tmp_path / "hub", "validation", VQA, {**dict.fromkeys(VQA), **row})
    hub_like(local, "testdev", VQA, {**dict.fromkeys(VQA), **row, "answers": None})
    (from_hub,) = asked("vqa2", local)

    folder = tmp_path / "official"
    (folder / "val2014").mkdir(parents=True)
    picture(64, 48).save(folder / "val2014" / "COCO_val2014_000000000042.jpg")
    listed = [{"image_id": 7, "question": "Who?", "question_id": 7000}]
    listed = [{"image_id": 42, "question": "Is it?", "question_id": 42001}, *listed]
    listed.append({"image_id": 42, "question": "Why?", "question_id": 42002})
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": listed}))
    with pytest.raises(RowsError, match=r"put v2_mscoco_val2014_annotations\.json into"):
        asked("vqa2", folder)
    votes = [{"question_id": each["question_id"], "answers": VOTES} for each in listed]
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": votes}))
    found = asked("vqa2", folder)
    assert [[q.id for q in group] for group in by_image(found)] == [["vqa2/42001", "vqa2/42002"], ["vqa2/7000"]]

    for question in (from_hub, found[0]):
        assert (question.id, question.image_id, question.text) == ("vqa2/42001", "vqa2/42", "vqa2: Is it?")
        assert (size(question), question.truth) == ((64, 48), ["yes"] * 8 + ["no"] * 2)
        assert question.score("Yes.") == {"vqa": 1.0}
        assert question.score("no") == {"vqa": pytest.approx(2 / 3)}
        assert question.score("maybe") == {"vqa": 0.0}
    (unknown,) = asked("vqa2", local, split="testdev")
    assert (unknown.truth, unknown.score("yes")) == ([], {})


DOC = {
    "questionId": SMALL,
    "question": TEXT,
    "question_types": [TEXT],
    "image": PICTURE,
    "docId": SMALL,
    "ucsf_document_id": TEXT,
    "ucsf_document_page_no": TEXT,
    "answers": [TEXT],
}


def test_doc_qa_takes_the_nearest_answer(tmp_path: Path) -> None:
    page = {"question_types": ["form"], "docId": 5, "ucsf_document_id": "xyz", "ucsf_document_page_no": "3"}
    row = {"questionId": 7, "question": "Who signed?", "image": picture(34, 44), "answers": ["J. Smith", "Smith"]}
    (question,) = asked("doc_qa", hub_like(tmp_path, "validation", DOC, row | page))
    assert (question.id, question.image_id) == ("doc_qa/7", "doc_qa/xyz_3")
    assert (question.text, size(question)) == ("doc_qa: Who signed?", (34, 44))
    assert question.score("smith") == {"anls": 1.0, "em": 1.0}
    assert question.score("J. Smyth") == {"anls": pytest.approx(1 - 1 / 8), "em": 0.0}
    assert question.score("Nobody") == {"anls": 0.0, "em": 0.0}


INFO = {
    "questionId": TEXT,
    "question": TEXT,
    "answers": [TEXT],
    "answer_type": [TEXT],
    "image": PICTURE,
    "image_url": TEXT,
    "operation/reasoning": [TEXT],
    "ocr": TEXT,
    "data_split": TEXT,
}


def test_info_qa_comes_from_its_config_or_from_the_official_file(tmp_path: Path) -> None:
    row = {"questionId": "98313", "question": "What share?", "answers": ["44%"], "image": picture(20, 90)}
    row |= {"image_url": "http://x/1.png"}
    hub = hub_like(tmp_path, "validation", INFO, {**dict.fromkeys(INFO), **row}, inside="InfographicVQA")
    folder = tmp_path / "official"
    (folder / "images").mkdir(parents=True)
    picture(20, 90).save(folder / "images" / "37313.jpeg")
    listed = [{"questionId": 98313, "question": "What share?", "answers": ["44%"], "image_local_name": "37313.jpeg"}]
    whole = {"dataset_name": "infographicVQA", "dataset_split": "val", "data": listed}
    (folder / "infographicsVQA_val_v1.0_withQT.json").write_text(json.dumps(whole))
    for local in (hub, folder):
        (question,) = asked("info_qa", local)
        assert (question.id, question.text) == ("info_qa/98313", "info_qa: What share?")
        assert (size(question), question.truth) == ((20, 90), ["44%"])
        assert question.score("44%") == {"anls": 1.0, "em": 1.0}
        assert question.score("45%") == {"anls": pytest.approx(2 / 3), "em": 0.0}
        assert question.score("7") == {"anls": 0.0, "em": 0.0}


TEXT_VQA = {
    **dict.fromkeys(("image_id", "question", "flickr_original_url", "flickr_300k_url", "set_name"), TEXT),
    **{name: [TEXT] for name in ("question_tokens", "answers", "image_classes", "ocr_tokens")},
    **dict.fromkeys(("question_id", "image_width", "image_height"), SMALL),
    "image": PICTURE,
}


def test_text_vqa_from_parquet_and_from_lines_of_json_is_the_same(tmp_path: Path) -> None:
    row: dict[str, Any] = {"image_id": "ab12", "question_id": 34602, "question": "what brand is it?"}
    row["answers"] = ["nous les gosses"] * 2 + ["dakota"] * 8
    hub = hub_like(tmp_path, "validation", TEXT_VQA, {**dict.fromkeys(TEXT_VQA), **row, "image": picture(30, 20)})
    lines = tmp_path / "lines"
    (lines / "pictures").mkdir(parents=True)
    picture(30, 20).save(lines / "pictures" / "ab12.png")
    (lines / "rows.jsonl").write_text(json.dumps({**row, "image": "pictures/ab12.png"}) + "\n\n")
    for local in (hub, lines):
        (question,) = asked("text_vqa", local)
        assert (question.id, question.image_id) == ("text_vqa/34602", "text_vqa/ab12")
        assert (question.text, size(question)) == ("text_vqa: what brand is it?", (30, 20))
        assert question.score("Dakota") == {"vqa": 1.0}
        assert question.score("nous les gosses") == {"vqa": pytest.approx(2 / 3)}
        assert question.score("dakotas") == {"vqa": 0.0}


def test_real_world_qa_keeps_the_instruction_of_options_only(tmp_path: Path) -> None:
    features = {"image": PICTURE, "question": TEXT, "answer": TEXT}
    choose = (
        "Which is nearer?\n\nA. The car\nB. The truck\nC. Neither\n"
        "Please answer directly with only the letter of the correct option and nothing else."
    )
    rows = [
        {"image": picture(40, 30), "question": choose, "answer": "B"},
        {
            "image": picture(40, 30),
            "question": "How many cars?\nPlease answer directly with a single word or number.",
            "answer": "Two",
        },
    ]
    letter, word = asked("real_world_qa", hub_like(tmp_path, "test", features, *rows))
    assert (letter.text, letter.truth, size(letter)) == (f"a_okvqa_mc: {choose}", "B", (40, 30))
    assert [letter.score(text) for text in ("B", "b", "A", "B.")] == [
        {"accuracy": score} for score in (1.0, 1.0, 0.0, 1.0)
    ]
    assert (word.text, word.truth, word.id) == ("vqa2: How many cars?", "Two", "real_world_qa/000001")
    assert [word.score(text)["accuracy"] for text in ("2", "two.", "3")] == [1.0, 1.0, 0.0]


MMMU = {
    **dict.fromkeys(("id", "question", "options", "explanation", "img_type", "answer", "topic_difficulty"), TEXT),
    **dict.fromkeys((f"image_{i}" for i in range(1, 8)), PICTURE),
    **dict.fromkeys(("question_type", "subfield"), TEXT),
}


def mmmu_row(id: str, question: str, options: list[str], answer: str, **more: Any) -> dict[str, Any]:
    kind = "multiple-choice" if options else "open"
    known = {"id": id, "question": question, "options": str(options), "answer": answer, "question_type": kind}
    return {**dict.fromkeys(MMMU), "image_1": picture(33, 22), **known, **more}


def test_mmmu_joins_its_subjects_and_shows_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three = replace(TASKS["mmmu"], configs=("Art", "Math", "Music"))  # all thirty are slow
    monkeypatch.setitem(TASKS, "mmmu", three)
    first = mmmu_row(
        "v_Art_1", "Compare <image 1> and <image 2>.", ["it's $5", "<image 3>"], "B", image_2=picture(9, 9)
    )
    second = mmmu_row("v_Math_1", "How long is <image 1>?", [], "12")
    pictures = mmmu_row("v_Math_2", "Which?", ["<img='a.png'>", "<img='b.png'>", ""], "A")
    hub_like(tmp_path, "validation", MMMU, mmmu_row("v_Music_1", "?", ["x"], "A"), inside="Music")
    hub_like(tmp_path, "validation", MMMU, second, pictures, inside="Math")
    hub_like(tmp_path, "validation", MMMU, first, inside="Art")
    found = {question.id: question for question in asked("mmmu", tmp_path)}
    assert list(found) == [f"mmmu/v_{name}" for name in ("Art_1", "Math_1", "Math_2", "Music_1")]
    choice, number, blind, _ = found.values()
    assert choice.text == "a_okvqa_mc: Compare <image 1> and <image 2>.\nA: it's $5\nB: <image 3>\n"
    assert (choice.id, size(choice)) == ("mmmu/v_Art_1", (33, 22))
    assert choice.truth == {"answer": "B", "images_not_shown": [2, 3]}
    assert [choice.score(text)["accuracy"] for text in ("B", "(B)", "A", "it's A")] == [1.0, 1.0, 0.0, 0.0]
    assert (number.text, number.truth) == ("vqa2: How long is <image 1>?", {"answer": "12", "images_not_shown": []})
    assert [number.score(text)["accuracy"] for text in ("12", "it is 12.0", "13")] == [1.0, 1.0, 0.0]
    assert blind.text == "a_okvqa_mc: Which?\nA: <img='a.png'>\nB: <img='b.png'>\nC: \n"
    assert blind.image() is None

    (tmp_path / "Music" / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(RowsError, match='lacks the split "validation" of Music'):
        asked("mmmu", tmp_path)


def test_an_mmmu_answer_that_names_no_option_is_drawn_the_same_at_every_run(tmp_path: Path) -> None:
    rows = [mmmu_row(f"v_Art_{i}", "Which?", list("wxyz"), "C") for i in range(40)]
    local = hub_like(tmp_path, "validation", MMMU, *rows)  # all subjects in one split, as in copies on the hub
    runs = [[q.score("no idea")["accuracy"] for q in asked("mmmu", local)] for _ in range(2)]
    assert runs[0] == runs[1]
    assert 0 < sum(runs[0]) < 20
    (one,) = asked("mmmu", local, limit=1)
    assert one.score("no idea")["accuracy"] == runs[0][0]


def test_math_vista_asks_the_bare_question(tmp_path: Path) -> None:
    texts = ("pid", "question", "image", "unit", "answer", "question_type", "answer_type", "query")
    features = dict.fromkeys(texts, TEXT) | {"decoded_image": PICTURE, "choices": [TEXT]}
    features |= {"precision": datasets.Value("float64"), "metadata": {"category": TEXT, "img_height": NUMBER}}
    base: dict[str, Any] = {**dict.fromkeys(features), "image": "images/1.jpg", "decoded_image": picture(21, 12)}
    hinted = "Hint: Answer.\nQuestion: Is Sky Blue the minimum?\nHint: no"
    rows = [
        {**base, "pid": "5", "question": hinted, "choices": ["yes", "no"], "answer": "no"}
        | {"question_type": "multi_choice", "answer_type": "text"},
        {**base, "pid": "6", "question": " What is x? ", "answer": "14"}
        | {"question_type": "free_form", "answer_type": "integer"},
        {**base, "pid": "7", "question": "How wide?", "answer": "1.2", "precision": 1.0}
        | {"question_type": "free_form", "answer_type": "float"},
    ]
    choice, number, decimal = asked("math_vista", hub_like(tmp_path, "testmini", features, *rows))
    assert choice.text == "a_okvqa_mc: Is Sky Blue the minimum?\nA: yes\nB: no\n"
    assert (choice.id, choice.truth, size(choice)) == ("math_vista/5", "no", (21, 12))
    assert [choice.score(text)["accuracy"] for text in ("B", " b ", "A")] == [1.0, 1.0, 0.0]
    assert number.text == "vqa2: What is x?"
    assert [number.score(text)["accuracy"] for text in ("14", "15", "fourteen")] == [1.0, 0.0, 0.0]
    # The reference rounds to 1.0 digits, which Python refuses.
    assert decimal.score("1.2") == {"accuracy": 0.0, "accuracy_rounded": 1.0}


def test_countbench_leaves_out_what_the_reference_leaves_out(tmp_path: Path) -> None:
    features = {"image": PICTURE, "text": TEXT, "question": TEXT, "number": SMALL}
    row = {"text": "Five cats", "question": "How many cats are in the image?", "number": 5}
    rows = [{**row, "image": None}, {**row, "image": picture(8, 8, "L")}, {**row, "image": picture(16, 9)}]
    left_out: list[str] = []
    local = hub_like(tmp_path, "test", features, *rows)
    (question,) = benchmark_questions("countbench_qa", local=local, on_skipped=left_out.append)
    assert [line.split(":")[0] for line in left_out] == ["countbench_qa/000000", "countbench_qa/000001"]
    assert (question.id, question.kind) == ("countbench_qa/000002", "count")
    assert (question.text, question.truth, size(question)) == ("How many cats are in the image?", 5, (16, 9))
    assert question.max_new_tokens == 192
    assert question.score("... shows a total of 5.") == {"correct": 1.0, "close": 1.0, "valid": 1.0}
    assert question.score("There are six") == {"correct": 0.0, "close": 1.0, "valid": 1.0}
    assert question.score("Many") == {"correct": 0.0, "close": 0.0, "valid": 0.0}


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, bytes]:
    """URLs and the files that they give; the real `fetch_image` is tested with a server in test_rows.py."""
    pages: dict[str, bytes] = {}

    def fetch(url: str, sha256: str, folder: Path) -> Path:
        assert (sha256, folder.name) == ("ab" * 32, "images")
        if url not in pages:
            raise FetchError(f"{url} cannot be fetched: HTTP status 404")
        path = tmp_path / f"{len(url)}.png"
        path.write_bytes(pages[url])
        return path

    monkeypatch.setattr("molmo_edge.evaluation.benchmark_formatters.fetch_image", fetch)
    return pages


PIXMO = {"image_url": TEXT, "image_sha256": TEXT, "label": TEXT}


def test_pixmo_count_counts_the_label_and_the_pictures_that_are_gone(tmp_path: Path, web: dict[str, bytes]) -> None:
    points = datasets.Sequence({"x": datasets.Value("float32"), "y": datasets.Value("float32")})
    features = {**PIXMO, "count": SMALL, "points": points}
    row = {"image_sha256": "ab" * 32, "label": "People", "count": 3, "points": None}
    rows = [row | {"image_url": "http://x/gone"}, row | {"image_url": "http://x/there"}]
    web["http://x/there"] = png(24, 16)
    left_out: list[str] = []
    local = hub_like(tmp_path, "test", features, *rows)
    (question,) = benchmark_questions("pixmo_count", local=local, on_skipped=left_out.append)
    assert left_out == ["pixmo_count/000000: http://x/gone cannot be fetched: HTTP status 404"]
    assert (question.id, question.text, question.kind) == ("pixmo_count/000001", "How many people are there?", "count")
    assert (question.truth, size(question)) == (3, (24, 16))
    assert [question.score(text)["correct"] for text in ("3", "three.", "4")] == [1.0, 1.0, 0.0]


def test_pixmo_points_are_scored_in_their_masks(tmp_path: Path, web: dict[str, bytes]) -> None:
    point, mask = {"x": datasets.Value("float64"), "y": datasets.Value("float64")}, [[datasets.Value("bool")]]
    left, right = np.zeros((2, 50, 100), bool)
    left[20:30, 10:20] = right[20:30, 80:90] = True
    rows: list[dict[str, Any]] = [
        {"points": [{"x": 85.0, "y": 50.0}, {"x": 15.0, "y": 50.0}], "masks": [right.tolist(), left.tolist()]},
        {"points": [], "masks": [np.zeros((50, 100), bool).tolist()]},
    ]
    rows = [{"image_url": "http://x/1", "image_sha256": "ab" * 32, "label": "Black Cup", **row} for row in rows]
    web["http://x/1"] = png(100, 50)
    local = hub_like(tmp_path, "test", {**PIXMO, "points": [point], "masks": [mask]}, *rows)
    there, absent = asked("pixmo_points", local)
    assert (there.text, there.kind, there.truth) == ("Point to the black cup.", "point", [[85.0, 50.0], [15.0, 50.0]])
    assert (size(there), there.image_id == absent.image_id) == ((100, 50), True)
    both = '<points x1="16.0" y1="48.0" x2="84.0" y2="52.0" alt="cup">cup</points>'
    one = '<point x="16.0" y="48.0" alt="cup">cup</point>'
    beside = '<point x="25.0" y="48.0" alt="cup">cup</point>'
    assert there.score(both) == pytest.approx({"precision": 1, "recall": 1, "f1": 1, "f1_pixels": 1})
    assert there.score(one) == pytest.approx({"precision": 1, "recall": 0.5, "f1": 2 / 3, "f1_pixels": 2 / 3})
    assert there.score(beside) == dict.fromkeys(("precision", "recall", "f1", "f1_pixels"), 0.0)
    assert (absent.kind, absent.truth) == ("absent", [])
    assert absent.score("There are none.")["f1"] == 1.0
    assert absent.score(one)["f1"] == 0.0


def test_points_are_matched_as_in_the_reference_and_as_is_right(tmp_path: Path) -> None:
    """In a large picture the reference compares pixels with percent, and matches the first point with a wrong mask."""
    masks = np.zeros((2, 400, 400), bool)
    masks[0, 300:340, 20:60] = masks[1, 60:100, 60:100] = True  # their points: (10, 80) and (20, 20) percent
    row = {"points": [{"x": 10, "y": 80}, {"x": 20, "y": 20}], "masks": masks.tolist(), "label": "cup"}
    picture(400, 400).save(tmp_path / "large.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "image": "large.png"}))
    (question,) = asked("pixmo_points", tmp_path)
    assert question.score('<point x="20.0" y="20.0" alt="cup">cup</point>') == pytest.approx(
        {"precision": 0, "recall": 0, "f1": 0, "f1_pixels": 2 / 3}
    )


AI2D = {"question": TEXT, "options": [TEXT], "answer": TEXT, "image": PICTURE}


def test_ai2d_on_the_hub_names_options_unless_they_are_letters(tmp_path: Path) -> None:
    rows = [
        {"question": "What eats grass?", "options": ["fox", "rabbit", "{}", "fox", "owl"], "answer": "1"},
        {"question": "Which label is the eye?", "options": ["b", "A", "none", "D"], "answer": "3"},
    ]
    local = hub_like(tmp_path, "test", AI2D, *(row | {"image": picture(70, 50)} for row in rows))
    named, letters = asked("ai2d", local)
    assert named.text == "ai2_diagram: What eats grass?\nA: fox\nB: rabbit\nC: owl\n"
    assert (named.id, named.truth, size(named)) == ("ai2d/000000", "B", (70, 50))
    assert [named.score(text) for text in ("B", "C")] == [{"mc": 1.0}, {"mc": 0.0}]
    assert letters.text == "ai2_diagram_no_letter: Which label is the eye?\nB\nA\nnone\nD\n"
    assert letters.truth == "D"
    assert [letters.score(text)["mc"] for text in ("D", "d", "B", "non")] == [1.0, 1.0, 0.0, 0.0]
