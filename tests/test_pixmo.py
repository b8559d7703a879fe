"""PixMo rows become examples: grouped by picture, split by hash, worded as in the reference."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo_edge.data.annotation_prompts import CAPTIONING, COUNTING, POINTING
from molmo_edge.data.downloads import MANIFEST, Manifest
from molmo_edge.data.examples import Annotation, DataSet, Example
from molmo_edge.data.pixmo import PIXMO, PixmoData, open_pixmo, pointing_eval_urls, wanted_images
from molmo_edge.data.rows import RowsError
from molmo_edge.frontend.image_files import load_image

Rows = Sequence[dict[str, Any]]


def url(number: int | str) -> str:
    return f"https://example.org/{number}.jpg"


def sha(number: int | str) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def write(folder: Path, rows: Rows) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def fetched(folder: Path, *numbers: int | str) -> Path:
    """A folder as written by fetch_images."""
    folder.mkdir(exist_ok=True)
    with (folder / MANIFEST).open("w") as file:
        for number in numbers:
            Image.new("RGB", (200, 100)).save(folder / sha(number), "PNG")
            file.write(json.dumps({"url": url(number), "outcome": "ok", "file": sha(number), "sha256": sha(number)}))
            file.write("\n")
    return folder


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., PixmoData]:
    def open_it(name: str, rows: Rows, there: Sequence[int | str] = range(100), **more: Any) -> PixmoData:
        local = write(tmp_path / "copy", rows)
        return open_pixmo(name, local=local, images=fetched(tmp_path / "images", *there), **more)

    return open_it


def examples(data: DataSet, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [data.example(index, rng) for index in range(len(data))]


def only(data: DataSet) -> tuple[Annotation, ...]:
    (example,) = examples(data)
    return example.annotations


Opened = Callable[..., PixmoData]


def test_the_mixtures_names_are_there() -> None:
    kinds = ("charts", "tables", "diagrams", "other")
    assert set(PIXMO) == {
        *("pixmo_cap", "pixmo_cap_with_transcripts", "pixmo_cap_qa", "pixmo_ask_model_anything"),
        *("pixmo_points", "pixmo_points_counting", "pixmo_points_high_freq", "pixmo_points_high_freq_counting"),
        *("pixmo_point_explanations", "pixmo_count", "pixmo_count_counting", "pixmo_clocks"),
        *(f"pixmo_docs_{kind}" for kind in kinds),
    }
    assert all(PIXMO[f"pixmo_docs_{kind}"].configs == (kind,) for kind in kinds)
    assert all(info.name == name and info.hub_id.startswith("allenai/pixmo-") for name, info in PIXMO.items())


# --- what is said -----------------------------------------------------------------------------------------------------


def test_captions_and_one_transcript_by_chance(opened: Opened) -> None:
    rows = [{"image_url": url(1), "caption": "A cat.", "transcripts": ["um", "a cat", "well"]}]
    (said,) = only(opened("pixmo_cap", rows))
    assert said.style == "long_caption"
    assert said.messages[0] in CAPTIONING
    assert said.messages[1:] == ("A cat.",)
    data = opened("pixmo_cap_with_transcripts", rows)
    heard = set()
    for seed in range(30):
        ((written, spoken),) = (data.example(0, np.random.default_rng(seed)).annotations,)
        assert (written.messages[1], written.style, spoken.style) == ("A cat.", "long_caption", "transcript")
        heard.add(spoken.messages[1])
    assert heard == {"um", "a cat", "well"}
    silent = opened("pixmo_cap_with_transcripts", [{**rows[0], "transcripts": []}])
    assert [each.style for each in only(silent)] == ["long_caption"]


def test_conversations_of_both_versions_of_cap_qa(opened: Opened) -> None:
    talk = ["What is it?", "A dog.", "How many legs?", "Four."]
    rows: Rows = [
        {"image_url": url(1), "question": "", "answer": "", "messages": talk},
        {"image_url": url(1), "question": "", "answer": "", "messages": ["Hi", "Hello"]},
    ]
    first, second = only(opened("pixmo_cap_qa", rows))
    assert (first.style, second.messages) == ("synthetic_qa", ("Hi", "Hello"))
    assert first.messages[:2] == ("What is it?", "A dog.")
    assert first.messages[3] == "Four."
    # The request precedes the question that asks how many, and no other question.
    assert first.messages[2].endswith("How many legs?")
    assert first.messages[2] != "How many legs?"
    old = "[USER] What is it? [ASSISTANT] A dog.\n[USER] Big? [ASSISTANT]"
    (one,) = only(opened("pixmo_cap_qa", [{"image_url": url(1), "question": old, "answer": "No."}]))
    assert one.messages == ("What is it?", "A dog.", "Big?", "No.")
    with pytest.raises(RowsError, match=r"row 0 of .* has 3 messages"):
        only(opened("pixmo_cap_qa", [{**rows[0], "messages": talk[:3]}]))


def test_questions_of_a_picture_go_together_and_how_many_asks_for_no_points(opened: Opened) -> None:
    def row(number: int, question: str) -> dict[str, Any]:
        return {"image_url": url(number), "image_sha256": sha(number), "question": question, "answer": "Yes."}

    rows = [row(1, "Is it red?"), row(2, "Old?"), row(1, "How many?"), row(1, " ")]
    first, second = examples(opened("pixmo_ask_model_anything", rows))
    assert [each.messages[0] for each in second.annotations] == ["Old?"]
    red, many = first.annotations  # the one without a question is left out
    assert (red.style, red.messages) == ("user_qa", ("Is it red?", "Yes."))
    assert many.messages[0].endswith("How many?")
    assert many.messages[0] != "How many?"
    with pytest.raises(RowsError, match="neither question nor answer"):
        only(opened("pixmo_ask_model_anything", [row(1, "")]))


def point_row(number: int, label: str, points: Rows, method: str = "pointing") -> dict[str, Any]:
    return {
        "image_url": url(number),
        "image_sha256": sha(number),
        "points": points,
        "count": len(points),
        "label": label,
        "collection_method": method,
    }


def test_points_are_percent_and_sets_are_told_apart_by_how_they_were_collected(opened: Opened) -> None:
    rows = [
        point_row(1, "Cup", [{"x": 50.04, "y": 20.0}, {"x": 10.0, "y": 101.5}]),
        point_row(2, "bean", [{"x": 1.0, "y": 2.0}], "counting"),
        point_row(1, "dog", []),
    ]
    cups, dogs = only(opened("pixmo_points", rows))
    assert (cups.style, dogs.style) == ("pointing", "pointing")
    assert cups.messages[0] in {template.format(x="cup") for template in POINTING}
    assert cups.messages[1] == '<points x1="10.0" y1="100.0" x2="50.0" y2="20.0" alt="cup">cup</points>'
    assert dogs.messages[1] == "There are none."
    (beans,) = only(opened("pixmo_points_high_freq_counting", rows))
    assert beans.style == "point_count"
    assert beans.messages[0] in {template.format(x="bean") for template in COUNTING}
    point = '<point x="1.0" y="2.0" alt="bean">bean</point>'
    assert beans.messages[1] == f"Counting the {point} shows a total of 1."
    assert only(opened("pixmo_points_high_freq", rows))[0].messages[1] == point
    assert len(only(opened("pixmo_points_counting", rows))) == 2


def test_pictures_to_evaluate_with_are_held_out(opened: Opened, tmp_path: Path) -> None:
    rows = [point_row(i, "cup", []) for i in range(4)]
    held_out = pointing_eval_urls(write(tmp_path / "eval", [{"image_url": url(2)}, {"image_url": url(9)}]))
    data = opened("pixmo_points", rows, held_out=held_out)
    assert [Path(example.image).name for example in examples(data)] == [sha(0), sha(1), sha(3)]
    assert data.left_out == 0


def test_points_of_count_are_pixels(opened: Opened) -> None:
    row = {"image_url": url(1), "image_sha256": sha(1), "count": 2, "label": "Hen"}
    rows = [{**row, "points": {"x": [100.0, 20.0], "y": [10.0, 50.0]}}]  # of 200 x 100
    data = opened("pixmo_count", rows)
    (example,) = examples(data)
    assert load_image(example.image).shape == (100, 200, 3)
    said = '<points x1="10.0" y1="50.0" x2="50.0" y2="10.0" alt="hen">hen</points>'
    assert example.annotations[0].messages[1] == said
    assert example.annotations[0].style == "pointing"
    (counted,) = only(opened("pixmo_count_counting", rows))
    assert (counted.style, counted.messages[1]) == ("point_count", f"Counting the {said} shows a total of 2.")
    for split in ("validation", "test"):
        with pytest.raises(
            RowsError, match=rf'no split "{split}" to train on \(splits: train\): the others have no points'
        ):
            opened("pixmo_count", rows, split=split)
    with pytest.raises(RowsError, match="has the count 2 without points"):
        only(opened("pixmo_count", [{**row, "points": None}]))


def explanation(number: int, question: str, **more: Any) -> dict[str, Any]:
    return {
        "image_url": url(number),
        "image_sha256": sha(number),
        "question": question,
        "response": "...",
        "parsed_response": "The <|POINT|> is left of <|POINT|>, see?",
        "alt_text": ["red cup", "plates"],
        "inline_text": ["Cup", "them"],
        "points": [[[10.0, 20.0]], [[90.0, 1.0], [80.0, 2.0]]],
        **more,
    }


def test_explanations_have_their_points_inline_and_are_halved(opened: Opened) -> None:
    rows = [explanation(1, "Why?"), explanation(2, "2"), explanation(1, "Who?"), explanation(1, "How?")]
    rows.append(explanation(3, "unparsed", parsed_response=None))
    found = examples(opened("pixmo_point_explanations", rows))
    assert [[each.messages[0] for each in example.annotations] for example in found] == [
        *(["Why?", "Who?"], ["How?"], ["2"])
    ]
    assert [Path(example.image).name for example in found] == [sha(1), sha(1), sha(2)]
    said = found[0].annotations[0]
    assert said.style == "point_qa"
    assert said.messages[1] == (
        'The <point x="10.0" y="20.0" alt="red cup">Cup</point> is left of '
        '<points x1="80.0" y1="2.0" x2="90.0" y2="1.0" alt="plates">them</points>, see?'
    )
    with pytest.raises(RowsError, match=r"row 0 of .* does not have the layout of allenai/pixmo-point-explanations"):
        only(opened("pixmo_point_explanations", [explanation(1, "Why?", parsed_response="One <|POINT|>.")]))


def test_clocks_need_pictures_and_say_the_time(opened: Opened, tmp_path: Path) -> None:
    unseen = "The time is not shown in the image."
    rows = [{"example_id": "a/1", "text": "8:15:30"}, {"example_id": "a/2", "text": unseen}]
    with pytest.raises(RowsError, match=r'no pictures: provide a copy of allenai/pixmo-clocks with a column "image"'):
        opened("pixmo_clocks", rows)
    Image.new("RGB", (5, 4)).save(write(tmp_path / "copy", []) / "watch.png")
    data = opened("pixmo_clocks", [{**row, "image": "watch.png"} for row in rows], there=(), split="validation")
    said = [example.annotations[0] for example in examples(data)]
    assert {each.style for each in said} == {"clocks"}
    assert [each.messages[1] for each in said] == ["The time shown is 8:15:30", unseen]
    assert load_image(examples(data)[0].image).shape == (4, 5, 3)
    (tmp_path / "copy" / "watch.png").unlink()
    with pytest.raises(RowsError, match=r"row 0 of .* has no picture .*watch\.png: was it deleted"):
        examples(data)


@pytest.fixture
def datasets(tmp_path: Path) -> Iterator[Any]:
    package = pytest.importorskip("datasets")
    package.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        yield package


def test_documents_come_with_their_pictures_in_parquet(tmp_path: Path, datasets: Any) -> None:
    file = io.BytesIO()
    Image.new("RGB", (7, 3)).save(file, "PNG")
    text = datasets.Value("string")
    features = {"image": datasets.Image(), "image_id": text, "questions": {"question": [text], "answer": [text]}}
    asked = {"question": ["Highest?", "How many bars?"], "answer": ["A", "3"]}
    row = {"image": {"bytes": file.getvalue(), "path": None}, "image_id": "1", "questions": asked}
    folder = tmp_path / "clone" / "charts"
    folder.mkdir(parents=True)
    stored = datasets.Dataset.from_list([row, row], features=datasets.Features(features))
    stored.to_parquet(str(folder / "train-00000-of-00001.parquet"))
    data = open_pixmo("pixmo_docs_charts", local=tmp_path / "clone", images=tmp_path / "none")
    assert len(data) == 2
    example = data.example(1, np.random.default_rng(0))
    assert load_image(example.image).shape == (3, 7, 3)
    said = [(each.style, each.messages) for each in example.annotations]
    assert said == [("pixmo_docs_charts", ("Highest?", "A")), ("pixmo_docs_charts", ("How many bars?", "3"))]
    assert list(wanted_images("pixmo_docs_charts", local=tmp_path / "clone")) == []


def test_documents_may_list_their_questions(opened: Opened, tmp_path: Path) -> None:
    Image.new("RGB", (5, 4)).save(write(tmp_path / "copy", []) / "a.png")
    row = {"image": "a.png", "questions": [{"question": "Highest?", "answer": "A"}]}
    assert only(opened("pixmo_docs_other", [row])) == (Annotation("pixmo_docs_other", ("Highest?", "A")),)


def test_a_saved_copy_gives_the_same_as_lines_and_can_go_to_another_process(tmp_path: Path, datasets: Any) -> None:
    points = [{"x": 1.5, "y": 2.5}]
    rows = [point_row(i % 3, f"thing {i}", points, "counting" if i % 4 == 3 else "pointing") for i in range(12)]
    datasets.DatasetDict(train=datasets.Dataset.from_list(list(rows))).save_to_disk(str(tmp_path / "saved"))
    lines, images = write(tmp_path / "lines", rows), fetched(tmp_path / "images", 0, 1, 2)
    all_said = []
    for local in (lines, tmp_path / "saved"):
        data = open_pixmo("pixmo_points", local=local, images=images)
        copied = pickle.loads(pickle.dumps(data))
        assert [len(example.annotations) for example in examples(data)] == [3, 3, 3]
        all_said += [[(each.image, each.annotations) for each in examples(one)] for one in (data, copied)]
    assert all(said == all_said[0] for said in all_said)


# --- which rows are examples ------------------------------------------------------------------------------------------


def captions(*numbers: int) -> list[dict[str, Any]]:
    return [{"image_url": url(i), "caption": f"caption {i}", "transcripts": ["a", "b"]} for i in numbers]


def names(data: PixmoData) -> list[str]:
    return [str(example.annotations[0].messages[1]) for example in examples(data)]


def test_rows_without_a_picture_are_left_out_and_counted(opened: Opened) -> None:
    data = opened("pixmo_cap", captions(0, 1, 2, 3, 4), there=(1, 3))
    assert (names(data), data.left_out, data.name) == (["caption 1", "caption 3"], 3, "pixmo_cap")
    with pytest.raises(IndexError):
        data.example(2, np.random.default_rng(0))
    (data.images / sha(1)).unlink()
    with pytest.raises(RowsError, match=r"row 1 of .* has no picture .*: was it deleted"):
        data.example(0, np.random.default_rng(0))
    with pytest.raises(
        RowsError, match=r'no examples for "train": 5 of the 5 rows .* none of their pictures is in .*Download'
    ):
        opened("pixmo_cap", captions(0, 1, 2, 3, 4), there=())


def test_a_picture_that_is_another_than_once_is_left_out_where_the_reference_checks(opened: Opened) -> None:
    rows = [point_row(1, "cup", []), {**point_row(2, "cup", []), "image_sha256": sha("another")}]
    data = opened("pixmo_points", rows)
    assert (len(data), data.left_out) == (1, 1)
    unchecked = [{**row, "points": {"x": [1.0], "y": [1.0]}} for row in rows]
    assert len(opened("pixmo_count", unchecked)) == 2


def test_what_is_wanted_can_be_fetched(tmp_path: Path) -> None:
    local = write(tmp_path / "a", [point_row(1, "cup", []), point_row(2, "cup", [], "counting")])
    assert list(wanted_images("pixmo_points", local=local)) == [(url(1), sha(1)), (url(2), sha(2))]
    assert list(wanted_images("pixmo_count", local=local)) == [(url(1), None), (url(2), None)]
    assert list(wanted_images("pixmo_cap", local=write(tmp_path / "b", captions(7)))) == [(url(7), None)]


def test_validation_is_picked_by_hash_whatever_the_order_and_the_download(opened: Opened) -> None:
    numbers = list(range(100))
    train = opened("pixmo_cap", captions(*numbers))
    validation = opened("pixmo_cap", captions(*numbers), split="validation")
    held_back = set(names(validation))
    assert len(held_back) == 5
    assert len(train) == 95
    assert not held_back & set(names(train))
    by_hash = sorted(numbers, key=lambda i: hashlib.sha256(url(i).encode()).hexdigest())
    assert held_back == {f"caption {i}" for i in by_hash[:5]}
    shuffled = [int(i) for i in np.random.default_rng(1).permutation(100)]
    assert set(names(opened("pixmo_cap", captions(*shuffled), split="validation"))) == held_back
    some = opened("pixmo_cap", captions(*numbers), by_hash[3:], split="validation")
    assert set(names(some)) == {f"caption {i}" for i in by_hash[3:5]}
    assert some.left_out == 3
    # All rows of a picture are in the same split.
    rows = [point_row(i % 100, f"thing {i}", []) for i in range(300)]
    held = opened("pixmo_points", rows, split="validation")
    assert {Path(example.image).name for example in examples(held)} == {sha(i) for i in by_hash[:5]}
    assert [len(example.annotations) for example in examples(held)] == [3] * 5
    with pytest.raises(RowsError, match="none of the 3 rows"):
        opened("pixmo_cap", captions(0, 1, 2), split="validation")


def test_the_same_index_and_chance_give_the_same_example(opened: Opened) -> None:
    rows = [point_row(i % 4, f"thing {i}", [{"x": 1.0, "y": 1.0}]) for i in range(12)]
    for name, listed in (("pixmo_points", rows), ("pixmo_cap_with_transcripts", captions(0, 1, 2))):
        data = opened(name, listed)
        once, again = ([(e.image, e.annotations) for e in examples(data, 5)] for _ in range(2))
        assert once == again != [(e.image, e.annotations) for e in examples(data, 6)]


def test_a_copy_may_have_its_own_pictures(opened: Opened, tmp_path: Path) -> None:
    folder = write(tmp_path / "copy", [])
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 10)).save(folder / name)
    questions = [{"image": f"{name}.png", "question": f"{name}?", "answer": "Yes."} for name in "aba"]
    data = opened("pixmo_ask_model_anything", questions, there=())
    found = examples(data)
    assert [e.image for e in found] == [folder / "a.png", folder / "b.png"]
    assert [[a.messages[0] for a in e.annotations] for e in found] == [["a?", "a?"], ["b?"]]
    assert list(wanted_images("pixmo_ask_model_anything", local=folder)) == []
    points = {"x": [10.0], "y": [5.0]}
    counted = opened("pixmo_count", [{"image": "b.png", "label": "hen", "count": 1, "points": points}], there=())
    assert only(counted)[0].messages[1] == '<point x="50.0" y="50.0" alt="hen">hen</point>'


def test_a_manifest_is_read_once_for_several_sets(tmp_path: Path) -> None:
    manifest = Manifest.load(fetched(tmp_path / "images", 0, 1))
    (tmp_path / "images" / MANIFEST).unlink()
    data = open_pixmo("pixmo_cap", local=write(tmp_path / "copy", captions(0, 1)), images=manifest)
    assert [e.image for e in examples(data)] == [tmp_path / "images" / sha(i) for i in (0, 1)]


def test_errors_name_the_cause(opened: Opened) -> None:
    with pytest.raises(RowsError, match=r'"pixmo_cat" is not a PixMo set \(known: pixmo_cap, '):
        opened("pixmo_cat", captions(0))
    with pytest.raises(RowsError, match=r'pixmo_cap has no split "test" to train on \(splits: train, validation\)'):
        opened("pixmo_cap", captions(0), split="test")
    with pytest.raises(RowsError, match='has no column "collection_method"'):
        opened("pixmo_points", captions(0))
    with pytest.raises(RowsError, match=r'no column "caption" \(columns: '):
        only(opened("pixmo_cap", [{"image_url": url(0), "text": "a cat"}]))
    with pytest.raises(RowsError, match="does not have the layout of allenai/pixmo-points"):
        only(opened("pixmo_points", [point_row(0, "cup", [{"x": 1.0}])]))
    with pytest.raises(RowsError, match='needs a column "image_url" or "image_sha256"'):
        opened("pixmo_cap_qa", [{"image": {"bytes": "..."}, "question": "a", "answer": "b"}])
