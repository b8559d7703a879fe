"""Academic training sets: rows in their real columns become the reference's conversations."""

from __future__ import annotations

import base64
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo_edge.data.academic import ACADEMIC, open_academic
from molmo_edge.data.academic_rows import HUMAN_WEIGHT, MACHINE_WEIGHT, best_answer
from molmo_edge.data.examples import Annotation, DataSet, Example
from molmo_edge.data.rows import RowsError
from molmo_edge.frontend.image_files import load_image

MIXTURE = {
    *("coco_2014_vqa_multi", "text_vqa", "okvqa", "chart_qa_weighted", "doc_qa", "info_qa", "a_okvqa_mc", "a_okvqa_da"),
    *("ai2_diagram_v2_mix_transparent", "android_control", "science_qa_img", "tabwmp_da", "st_qa", "tally_qa"),
    *("dv_qa", "figure_qa", "plot_qa"),
}


@pytest.fixture(scope="module", autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    datasets = pytest.importorskip("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        datasets.disable_progress_bars()
        yield


def png(width: int = 40, height: int = 20) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 120, 40)).save(file, "PNG")
    return file.getvalue()


def lines(folder: Path, *rows: dict[str, Any]) -> Path:
    """A local copy: rows.jsonl and a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "p.png").write_bytes(png())
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def parquet(folder: Path, file: str, *rows: dict[str, Any]) -> Path:
    """A clone of a hub repository; a picture is the struct of datasets.Image."""
    import datasets

    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(list(rows)).to_parquet(str(folder / f"{file}-00000-of-00001.parquet"))
    return folder


def written(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def example(data: DataSet, index: int = 0, seed: int = 0) -> Example:
    return data.example(index, np.random.default_rng(seed))


def said(data: DataSet, index: int = 0) -> tuple[Annotation, ...]:
    found = example(data, index)
    assert load_image(found.image).shape[2] == 3
    return found.annotations


def one(style: str, question: str, answer: str, weight: float = 1.0) -> tuple[Annotation, ...]:
    return (Annotation(style, (question, answer), weight),)


def test_the_mixture_is_complete_and_names_its_sources() -> None:
    assert set(ACADEMIC) == MIXTURE | {"chart_qa"}
    assert all(name == spec.name and spec.authors for name, spec in ACADEMIC.items())
    grouped = {name for name, spec in ACADEMIC.items() if spec.by_picture}
    assert grouped == {"coco_2014_vqa_multi", "tally_qa", "dv_qa", "figure_qa", "plot_qa"}
    with pytest.raises(
        RowsError, match=r'"vqa" is not an academic training set \(known: coco_2014_vqa_multi, text_vqa'
    ):
        open_academic("vqa")
    with pytest.raises(RowsError, match=r'"test" is not a split .* \(splits: train, validation\)'):
        open_academic("text_vqa", split="test")
    with pytest.raises(RowsError, match=r'no parquet files of the split "train" of tabwmp_da: .*lupantech/PromptPG'):
        open_academic("tabwmp_da")
    with pytest.raises(RowsError, match=r'no parquet files of the split "validation" of st_qa'):
        open_academic("st_qa", split="validation")


def test_the_most_common_answer_is_given_and_a_tie_is_drawn() -> None:
    rng = np.random.default_rng(0)
    assert {best_answer(["a", "b", "c", "b"], rng) for _ in range(30)} == {"b"}
    draws = [best_answer(["a", "b", "c", "b", "a"], rng) for _ in range(400)]
    assert set(draws) == {"a", "b"}
    assert 150 < draws.count("a") < 250


def votes(*answers: str) -> list[dict[str, Any]]:
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": i + 1} for i, answer in enumerate(answers)]


@pytest.mark.parametrize("picture_column", ["image_id", "id_image"])  # lmms-lab/VQAv2, Multimodal-Fatima/VQAv2_train
def test_vqa2_asks_everything_about_a_picture_at_once(tmp_path: Path, picture_column: str) -> None:
    asked = [(5, "What?", ["red", "blue", "red"]), (3, "Who?", ["me"]), (5, "Is it?", ["no", "no", "yes"])]
    rows = [
        {
            "image": {"bytes": png(), "path": None},
            picture_column: picture,
            "question": question,
            "answers": votes(*given),
        }
        for picture, question, given in asked
    ]
    data = open_academic("coco_2014_vqa_multi", local=parquet(tmp_path, "data/train", *rows))
    assert (data.name, len(data)) == ("coco_2014_vqa_multi", 2)
    assert said(data) == (Annotation("vqa2", ("What?", "red")), Annotation("vqa2", ("Is it?", "no")))
    assert said(data, 1) == one("vqa2", "Who?", "me")


def test_vqa2_and_okvqa_from_the_authors_files(tmp_path: Path) -> None:
    questions = [
        {"image_id": picture, "question": text, "question_id": number}
        for picture, text, number in ((7, "What?", 70), (8, "Who?", 80), (7, "Where?", 71))
    ]
    answers = [
        {"question_id": number, "answers": [{"raw_answer": f"{number}s", "answer": str(number)}]}
        for number in (70, 71, 80)
    ]
    for version in ("v2_", ""):
        written(tmp_path / f"{version}OpenEnded_mscoco_train2014_questions.json", {"questions": questions})
        written(tmp_path / f"{version}mscoco_train2014_annotations.json", {"annotations": answers})
    (tmp_path / "train2014").mkdir()
    for number in (7, 8):
        (tmp_path / f"train2014/COCO_train2014_{number:012d}.jpg").write_bytes(png())
    vqa2 = open_academic("coco_2014_vqa_multi", local=tmp_path)
    assert [[each.messages[0] for each in said(vqa2, i)] for i in range(len(vqa2))] == [["What?", "Where?"], ["Who?"]]
    okvqa = open_academic("okvqa", local=tmp_path)  # not grouped; original answers, not stemmed
    assert [said(okvqa, i) for i in range(len(okvqa))] == [
        one("okvqa", "What?", "70s"),
        one("okvqa", "Where?", "71s"),
        one("okvqa", "Who?", "80s"),
    ]


def cauldron(*texts: tuple[str, str]) -> dict[str, Any]:
    return {
        "images": [{"bytes": png(), "path": None}],
        "texts": [{"user": user, "assistant": assistant, "source": "x"} for user, assistant in texts],
    }


def test_the_cauldron_is_asked_in_the_authors_words(tmp_path: Path) -> None:
    brief = "\nGive a very brief answer."
    first = cauldron(("What is it?" + brief, "Pink Floyd."), ("Is it so?" + brief, "Yes."))
    second = cauldron(("How much?\nShort answer required.", "0.25."))

    def opened(name: str, config: str) -> list[tuple[Annotation, ...]]:
        data = open_academic(name, local=parquet(tmp_path / name, f"{config}/train", first, second))
        return [said(data, index) for index in range(len(data))]

    grouped = {"coco_2014_vqa_multi": "vqav2", "tally_qa": "tallyqa", "dv_qa": "dvqa", "plot_qa": "plotqa"}
    for name, config in (grouped | {"figure_qa": "figureqa"}).items():
        style = ACADEMIC[name].style or name
        lower = name in ("coco_2014_vqa_multi", "dv_qa")
        name_of, yes = ("pink floyd", "yes") if lower else ("Pink Floyd", "1" if name == "figure_qa" else "Yes")
        both = one(style, "What is it?", name_of) + one(style, "Is it so?", yes)
        assert opened(name, config) == [both, one(style, "How much?", "0.25")]
    for name, config in (("info_qa", "infographic_vqa"), ("st_qa", "st_vqa")):  # the reference does not group these
        assert opened(name, config) == [
            one(name, "What is it?", "Pink Floyd"),
            one(name, "Is it so?", "Yes"),
            one(name, "How much?", "0.25"),
        ]


def test_the_cauldrons_diagrams_have_options(tmp_path: Path) -> None:
    asked = "Question: {}\nChoices:\nA. {}\nB. {}\nC. {}\nAnswer with the letter."
    row = cauldron(
        (asked.format("What is it?", "a cat", "a dog", "a cat"), "Answer: B"),
        (asked.format("Which is the eye?", "a", "D", "f"), "Answer: A"),
    )
    data = open_academic("ai2_diagram_v2_mix_transparent", local=parquet(tmp_path, "ai2d/train", row))
    assert len(data) == 2
    assert said(data) == one("ai2_diagram", "What is it?\nA: a cat\nB: a dog\n", "B")
    assert said(data, 1) == one("ai2_diagram_no_letter", "Which is the eye?\nA\nD\nF\n", "A")
    damaged = cauldron((asked.format("What?", "x", "y", "z"), "Answer: D"))
    data = open_academic("ai2_diagram_v2_mix_transparent", local=parquet(tmp_path / "2", "ai2d/train", damaged))
    with pytest.raises(RowsError, match=r"row 0 of .* has 3 options and 3 as the index of the correct one"):
        example(data)


def test_ai2d_from_the_authors_files_trains_with_both_kinds_of_boxes(tmp_path: Path) -> None:
    def ask(number: int, abc: bool, options: list[str]) -> None:
        Image.new("RGB", (60, 50)).save(tmp_path / "images" / f"{number}.png")
        asked = {"abcLabel": abc, "answerTexts": options, "correctAnswer": 1, "questionId": f"{number}-0"}
        written(tmp_path / "questions" / f"{number}.png.json", {"questions": {f"{number}?": asked}})
        box = {"rectangle": [[10, 10], [40, 30]], "replacementText": "C"}
        written(tmp_path / "annotations" / f"{number}.png.json", {"text": {"T0": box}})

    (tmp_path / "images").mkdir()
    for number in range(386):
        ask(number, abc=True, options=["a", "c"])
    (tmp_path / "ai2d_test_ids.csv").write_text("5\n")
    train = open_academic("ai2_diagram_v2_mix_transparent", local=tmp_path)
    held_out = open_academic("ai2_diagram_v2_mix_transparent", split="validation", local=tmp_path)
    assert (len(train), len(held_out)) == (2, 384 * 2)  # of 385 images outside the test split, 384 are held out
    (found,) = {annotation.messages[0].split("?")[0] for index in range(2) for annotation in said(train, index)}
    # "a" is not a letter of this diagram, but A, B, C are not used if at most one option is not a letter.
    assert said(train) == one("ai2_diagram_no_letter", f"{found}?\na\nC\n", "C") == said(train, 1)
    opaque, transparent = (load_image(example(train, index).image) for index in range(2))
    assert (opaque != transparent).any()


def test_short_answers_are_asked_with_their_tags(tmp_path: Path) -> None:
    row = {"image": "p.png", "question": "What?", "answers": ["10", "ten", "10"], "image_id": 1}
    for name in ("text_vqa", "doc_qa", "info_qa", "st_qa"):
        data = open_academic(name, local=lines(tmp_path / name, row, {**row, "question": "Who?"}))
        assert (len(data), said(data), said(data, 1)) == (2, one(name, "What?", "10"), one(name, "Who?", "10"))
    given = [{"answer": "surf", "raw_answer": "surfing"}]
    data = open_academic("okvqa", local=lines(tmp_path / "ok", {**row, "answers_original": given}))
    assert said(data) == one("okvqa", "What?", "surfing")
    data = open_academic("text_vqa", local=lines(tmp_path / "test", {**row, "answers": ["", ""]}))
    with pytest.raises(RowsError, match=r"row 0 of .* has no answers in answers: is it of a test split"):
        example(data)


def test_people_and_machines_weigh_the_same_in_chart_qa(tmp_path: Path) -> None:
    assert (round(HUMAN_WEIGHT, 3), round(MACHINE_WEIGHT, 3)) == (1.477, 0.523)
    assert abs(HUMAN_WEIGHT * 7398 - MACHINE_WEIGHT * 20901) < 1e-6
    rows = [{"image": "p.png", "query": f"{part}?", "label": ["4"], "human_or_machine": part} for part in (0, 1)]
    local = lines(tmp_path, *rows)
    weighted, plain = open_academic("chart_qa_weighted", local=local), open_academic("chart_qa", local=local)
    assert said(weighted) == one("chart_qa", "0?", "4", HUMAN_WEIGHT)
    assert said(weighted, 1) == one("chart_qa", "1?", "4", MACHINE_WEIGHT)
    assert said(plain, 1) == one("chart_qa", "1?", "4")
    hub = {**rows[0], "image": {"bytes": png(), "path": None}}
    assert len(open_academic("chart_qa", split="validation", local=parquet(tmp_path / "hub", "data/val", hub))) == 1


def test_a_okvqa_gives_options_or_answers(tmp_path: Path) -> None:
    row = {
        "image": "p.png",
        "question": "What?",
        "choices": ["cat", "dog", "cow", "pig"],
        "correct_choice_idx": 2,
        "direct_answers": "['cows', 'cow', 'cow']",  # a Python literal, as on the hub
        "difficult_direct_answer": True,
    }
    local = lines(tmp_path, row, {**row, "difficult_direct_answer": False, "direct_answers": ["ox"]})
    mc, da = open_academic("a_okvqa_mc", local=local), open_academic("a_okvqa_da", local=local)
    assert said(mc) == one("a_okvqa_mc", "What?\nA: cat\nB: dog\nC: cow\nD: pig\n", "C")
    assert (said(da), said(da, 1)) == (one("a_okvqa_da", "What?", "cow"), one("a_okvqa_da", "What?", "ox"))
    validation = open_academic("a_okvqa_da", split="validation", local=local)
    assert (len(mc), len(da), len(validation)) == (2, 2, 1)
    assert said(validation) == one("a_okvqa_da", "What?", "ox")
    data = open_academic("a_okvqa_mc", local=lines(tmp_path / "test", {**row, "correct_choice_idx": None}))
    with pytest.raises(RowsError, match="has 4 options and None as the index"):
        example(data)


def test_science_qa_leaves_out_rows_without_a_picture(tmp_path: Path) -> None:
    picture = {"bytes": png(), "path": None}
    row = {"image": None, "question": "Why?", "hint": "", "choices": ["x", "y"], "answer": 1}
    local = parquet(tmp_path, "data/train", row, {**row, "image": picture}, {**row, "image": picture, "hint": "Look."})
    data = open_academic("science_qa_img", local=local)
    assert len(data) == 2
    assert said(data) == one("science_qa", "Why?\nA: x\nB: y\n", "B")
    assert said(data, 1) == one("science_qa", "Look.\nWhy?\nA: x\nB: y\n", "B")


def test_tabwmp_comes_from_its_authors(tmp_path: Path) -> None:
    problem = {"question": "How many?", "choices": None, "answer": "1,234", "split": "train"}
    written(tmp_path / "data/tabmwp/problems_train.json", {"38": problem})
    (tmp_path / "data/tabmwp/tables").mkdir()
    (tmp_path / "data/tabmwp/tables/38.png").write_bytes(png())
    assert said(open_academic("tabwmp_da", local=tmp_path)) == one("tabwmp_da", "How many?", "1,234")
    row = {"image": "p.png", "question": "Which?", "answer": "x", "choices": ["x", "y"]}
    assert said(open_academic("tabwmp_da", local=lines(tmp_path / "2", row))) == one("tabwmp_da", "Which?", "x")


def test_st_qa_is_split_as_in_the_reference(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(png())
    listed = [
        {"question_id": number, "question": f"{number}?", "file_path": "p.png", "answers": ["stop", "go", "go"]}
        for number in reversed(range(1030))
    ]
    written(tmp_path / "train_task_3.json", {"data": listed})
    train, held_out = (open_academic("st_qa", split=split, local=tmp_path) for split in ("train", "validation"))
    assert (len(train), len(held_out)) == (6, 1024)
    numbers = list(range(1030))
    np.random.RandomState(63069).shuffle(numbers)  # of the questions sorted by id
    assert [said(train, index) for index in range(6)] == [one("st_qa", f"{n}?", "go") for n in numbers[1024:]]


def test_figures_and_counts_from_the_authors_are_grouped_by_picture(tmp_path: Path) -> None:
    def opened(name: str) -> list[tuple[Annotation, ...]]:
        data = open_academic(name, local=tmp_path / name)
        return [said(data, index) for index in range(len(data))]

    for picture in (
        *("dv_qa/images/a.png", "dv_qa/images/b.png", "figure_qa/train1/png/0.png", "figure_qa/train1/png/1.png"),
        *("plot_qa/png/0.png", "plot_qa/png/1.png", "tally_qa/train2014/a.jpg", "tally_qa/VG_100K/b.jpg"),
    ):
        (tmp_path / picture).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / picture).write_bytes(png())
    pairs = [
        {"image_index": index, "question_string": f"{number}?", "question_id": number, "answer": answer}
        for number, (index, answer) in enumerate(((1, 1), (0, 0), (1, 0)))
    ]
    written(tmp_path / "figure_qa/train1/qa_pairs.json", {"qa_pairs": pairs})
    assert opened("figure_qa") == [
        one("figure_qa", "0?", "1") + one("figure_qa", "2?", "0"),
        one("figure_qa", "1?", "0"),
    ]
    written(tmp_path / "plot_qa/qa_pairs_V1.json", {"qa_pairs": pairs[:1]})
    written(tmp_path / "plot_qa/qa_pairs_V2.json", {"qa_pairs": [{**pairs[0], "answer": 2.5}, pairs[1]]})
    assert opened("plot_qa") == [one("plot_qa", "0?", "2.5"), one("plot_qa", "1?", "0")]
    dvqa = [{"image": f"{image}.png", "question": "?", "answer": image, "answer_bbox": []} for image in "baa"]
    written(tmp_path / "dv_qa/train_qa.json", dvqa)
    assert opened("dv_qa") == [one("dv_qa", "?", "b"), one("dv_qa", "?", "a") * 2]
    images = ("train2014/a.jpg", "VG_100K/b.jpg", "train2014/a.jpg")
    written(
        tmp_path / "tally_qa/train.json",
        [{"image": image, "question": f"{n}?", "answer": n, "image_id": 1} for n, image in enumerate(images)],
    )
    assert opened("tally_qa") == [one("tally_qa", "0?", "0") + one("tally_qa", "2?", "2"), one("tally_qa", "1?", "1")]


def test_pictures_with_lists_of_questions_are_read_too(tmp_path: Path) -> None:
    questions = [{"question": "a?", "answer": 3}, {"question": "b?", "answers": ["x", "y", "x"]}]
    columns = {"question": ["a?", "b?"], "answer": [1, 2]}  # as `datasets` stores a Sequence of dicts
    rows = [{"image": "p.png", "questions": each} for each in (questions, columns, [{"question": "c?"}], [])]
    data = open_academic("tally_qa", local=lines(tmp_path, *rows))
    assert said(data) == one("tally_qa", "a?", "3") + one("tally_qa", "b?", "x")
    assert said(data, 1) == one("tally_qa", "a?", "1") + one("tally_qa", "b?", "2")
    with pytest.raises(RowsError, match=r"a question in row 2 of .* has no 'answer'"):
        example(data, 2)
    with pytest.raises(RowsError, match=r"row 3 of .* has no question about its picture"):
        example(data, 3)


def episode(number: int, *actions: dict[str, Any]) -> dict[str, Any]:
    blank = dict.fromkeys(("app_name", "direction", "text", "x", "y"))
    return {
        "episode_id": number,
        "goal": f"goal {number}",
        "screenshots_b64": [base64.b64encode(png(200, 400)).decode()] * (len(actions) + 1),
        "actions": [{**blank, **action} for action in actions],
        "step_instructions": [f"step {i}" for i in range(len(actions))],
    }


def test_android_control_asks_four_times_at_each_step(tmp_path: Path) -> None:
    first = episode(3, {"action_type": "click", "x": 50, "y": 123}, {"action_type": "open_app", "app_name": "Maps"})
    second = episode(
        4,
        {"action_type": "long_press", "x": 200, "y": 0},
        {"action_type": "scroll", "direction": "down"},
        {"action_type": "input_text", "text": "{x} you"},
        *({"action_type": kind} for kind in ("navigate_home", "navigate_back", "wait", "dance", "click")),
    )
    local = parquet(tmp_path, "data/train", first, second)
    data = open_academic("android_control", local=local)
    assert len(data) == 10
    click = "Click(25.0, 30.8)"
    assert said(data) == (
        *one("android_control", "low_level: step 0", click),
        *one("android_control", "high_level: goal 3 low_level: step 0", click),
        *one("android_control", "high_level: goal 3", click),
        *one("android_control", "high_level_cot: goal 3", f"Plan: step 0 Action: {click}"),
    )
    actions = ["Open App Maps", "Long Press(100.0, 0.0)", "Scroll down", "Type {x} you"]
    actions += ["Navigate Home", "Navigate Back", "Wait"]
    assert [said(data, index)[0].messages[1] for index in range(1, 8)] == actions
    with pytest.raises(RowsError, match="'dance' is not an AndroidControl action \\(known: open_app"):
        example(data, 8)
    with pytest.raises(RowsError, match="action 'click' has no x and no y"):
        example(data, 9)
    written(local / "splits.json", {"train": [4], "validation": [3], "test": [99]})  # the authors'
    assert len(open_academic("android_control", local=local)) == 8
    written(local / "splits.json", [4])
    with pytest.raises(RowsError, match=r'splits\.json does not list the episodes of the split "train"'):
        open_academic("android_control", local=local)


def test_android_control_takes_rows_of_steps_as_they_are(tmp_path: Path) -> None:
    row = {"image": "p.png", "ll_instruction": "tap", "hl_instruction": "call", "target_action": "Wait"}
    data = open_academic("android_control", local=lines(tmp_path, row))
    assert said(data)[3] == Annotation("android_control", ("high_level_cot: call", "Plan: tap Action: Wait"))


def test_a_screenshot_that_is_missing_is_told(tmp_path: Path) -> None:
    broken = {**episode(1, {"action_type": "wait"}), "screenshots_b64": ["%%%"]}
    data = open_academic("android_control", local=parquet(tmp_path, "data/train", broken))
    with pytest.raises(RowsError, match=r"row 0 of .* has no readable screenshot of step 0"):
        example(data)


@pytest.mark.parametrize("source", ["lines", "parquet"])
def test_an_example_is_the_same_again_and_in_another_process(tmp_path: Path, source: str) -> None:
    row = {"question": "What?", "answers": [*"abcdefgh"], "image_id": 1}
    if source == "lines":
        local = lines(tmp_path, {"image": "p.png", **row})
    else:
        local = parquet(tmp_path, "data/train", {"image": {"bytes": png(), "path": None}, **row})
    for name in ("text_vqa", "coco_2014_vqa_multi"):
        data = open_academic(name, local=local)
        answers = [example(data, seed=seed).annotations for seed in range(20)]
        assert answers == [example(data, seed=seed).annotations for seed in range(20)]
        assert len(set(answers)) > 3
        copied = pickle.loads(pickle.dumps(data))
        assert answers == [example(copied, seed=seed).annotations for seed in range(20)]


def test_copies_of_the_wrong_data_set_are_told(tmp_path: Path) -> None:
    local = lines(tmp_path, {"image": "p.png", "caption": "A cat."})
    for name, column in (("text_vqa", "question"), ("chart_qa", "query"), ("science_qa_img", "hint")):
        with pytest.raises(RowsError, match=rf'has no column "{column}" \(columns: image, caption'):
            example(open_academic(name, local=local))
    with pytest.raises(RowsError, match='has no column "image_id"'):
        open_academic("coco_2014_vqa_multi", local=local)
    data = open_academic("text_vqa", local=lines(tmp_path, {"image": None, "question": "?", "answers": ["a"]}))
    with pytest.raises(RowsError, match=r"row 0 of .* has no picture"):
        example(data)
    with pytest.raises(IndexError):
        example(data, 1)
    with pytest.raises(RowsError, match="there is no folder"):
        open_academic("text_vqa", local=tmp_path / "nowhere")
