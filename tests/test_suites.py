"""The questions about annotated pictures, and the scores of right answers."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo_edge.data.annotated_photos import PhotoError, load_photos
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.evaluation.annotated_pictures import Picture, embedded_scenes
from molmo_edge.evaluation.suites import SuiteError, evenly, expand, load_suite, picture_questions, unique
from molmo_edge.frontend.points import format_count, format_points

TWO_DOGS = [[10, 10, 20, 20], [60, 60, 80, 80]]
ANNOTATION: dict[str, Any] = {
    "source": "scene",
    "objects": [
        {"label": "dog", "boxes": TWO_DOGS, "points": [[15, 15], [70, 70]]},
        {"label": "people", "boxes": [[1, 1, 2, 2]], "points": [[1.5, 1.5]], "crowd": True},
    ],
    "texts": [{"text": "stop", "box": [0, 0, 10, 10]}],
    "clocks": [{"time": "12:25", "box": [10, 10, 20, 20]}],
}


def asked(annotation: dict[str, Any], group: str = "scenes") -> dict[str, Any]:
    picture = Picture(group, lambda: np.zeros((4, 4, 3), np.uint8), annotation)
    return {f"{q.kind} {q.id.rpartition('/')[2]}": q for q in picture_questions(picture)}


def test_what_a_picture_is_asked() -> None:
    found = asked(ANNOTATION)
    texts = {q.kind: q.text for q in found.values()}
    assert [q.kind for q in found.values()] == ["point", "count", "absent", "read", "clock", "caption"], "no crowds"
    assert texts["point"] == "Point to the dog."
    assert texts["count"] == "How many dogs are there?"
    assert {q.image_id for q in found.values()} == {next(iter(found.values())).id.rsplit("/", 2)[0]}


def test_right_answers_score_one_and_wrong_ones_do_not() -> None:
    found = asked(ANNOTATION)
    absent = next(q for q in found.values() if q.kind == "absent")
    points = [(15.0, 15.0), (70.0, 70.0)]
    everything = {"precision": 1, "recall": 1, "f1": 1, "format": 1}
    assert found["point dog"].score(format_points(points, "dog")) == everything
    half = found["point dog"].score(format_points(points[:1], "dog"))
    assert (half["precision"], half["recall"], half["f1"]) == (1, 0.5, pytest.approx(2 / 3))
    assert found["point dog"].score("There are none.") == {"precision": 0, "recall": 0, "f1": 0, "format": 0}
    assert found["count dog"].score(format_count(points, "dogs")) == {"exact": 1, "close": 1}
    assert found["count dog"].score("3") == {"exact": 0, "close": 1}
    assert found["count dog"].score("?")["close"] == 0
    assert absent.score("There are none.") == {"refused": 1}
    assert absent.score(format_points(points[:1], "x")) == {"refused": 0}
    assert found["read text"].score(" STOP ") == {"anls": 1, "exact": 1}
    assert found["read text"].score("x")["anls"] == 0
    assert found["clock time"].score("12:25") == {"exact": 1, "close": 1}
    assert found["clock time"].score("12:27") == {"exact": 0, "close": 1}


def test_receipts_are_asked_for_their_fields() -> None:
    fields = {"total": "9.50", "date": "", "company": "ACME"}
    found = asked({"source": "receipts", "fields": fields, "texts": [{"text": "x"}]}, "receipts")
    read = [q.text for q in found.values() if q.kind == "read"]
    assert read == ["What is the total?", "Which company is this from?"]


def test_scenes_are_reproducible_and_have_every_kind() -> None:
    scenes = embedded_scenes(24)
    first, again = (embedded_scenes(3) for _ in range(2))
    assert all((a.rgb() == b.rgb()).all() and a.annotation == b.annotation for a, b in zip(first, again, strict=True))
    assert first[2].annotation == scenes[2].annotation, "fewer of them are the first of more"
    kinds = {q.kind for scene in scenes for q in picture_questions(scene)}
    assert kinds == {"point", "count", "absent", "read", "clock", "caption"}
    assert len({scene.id for scene in scenes}) == 24


def write_photos(folder: Path, *annotations: dict[str, Any]) -> None:
    (folder / "images").mkdir(parents=True)
    lines = []
    for i, annotation in enumerate(annotations):
        Image.new("RGB", (40, 30), (i, 0, 0)).save(folder / "images" / f"{i}.png")
        lines.append(json.dumps({"image": f"images/{i}.png", **annotation}))
    (folder / "annotations.jsonl").write_text("\n".join(lines))


def test_photos_need_no_split_and_no_source(tmp_path: Path) -> None:
    cat = {"label": "cat", "boxes": [[0, 0, 50, 50]], "points": [[25, 25]]}
    none = {"label": "dog", "boxes": [], "points": []}
    write_photos(
        tmp_path, {"objects": [cat, none]}, {"objects": [cat], "split": "train"}, {"objects": [cat], "split": "val"}
    )
    found = load_suite(f"photos:{tmp_path}")
    pictures = list(dict.fromkeys(q.image_id for q in found))
    assert len(pictures) == 2, "training photos are not asked about"
    assert [q.text for q in found if q.kind == "absent"] == ["Point to the dog."], "said to be absent, not guessed"
    assert len(load_suite(f"photos:{tmp_path}", limit=1)) < len(found)
    assert found[0].image().shape == (30, 40, 3)


def test_unknown_and_empty_suites_are_refused(tmp_path: Path) -> None:
    for name, error, message in (
        ("nothing", SuiteError, '"nothing" is not a known suite'),
        ("photos", SuiteError, "needs a folder"),
        (f"photos:{tmp_path}", PhotoError, "neither annotations.jsonl nor photographs"),
    ):
        with pytest.raises(error, match=message):
            load_suite(name)
    write_photos(tmp_path / "empty", {"split": "train"})
    with pytest.raises(SuiteError, match="has no questions"):
        load_suite(f"photos:{tmp_path / 'empty'}")


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({"objects": [{"label": "cup"}]}, '"label" and "boxes"'),
        ({"objects": [{"label": "cup", "boxes": [[1, 2, 3]]}]}, "a box is"),
        ({"objects": [{"label": "cup", "boxes": [[120, 30, 300, 200]]}]}, "line 1 of .* Are these pixels"),
        ({"objects": [{"label": "cup", "boxes": [[50, 50, 20, 60]]}]}, "line 1 of .* Is it x, y, width, height"),
        (
            {"objects": [{"label": "cup", "boxes": [[20, 60, 50, 50]]}]},
            "line 1 of .* with 0 <= x0 < x1 <= 100 and 0 <= y0",
        ),
        ({"objects": [{"label": "cup", "boxes": [[10, 10, 10, 20]]}]}, "line 1 of .* 0 <= x0 < x1 <= 100"),
        ({"objects": [{"label": "cup", "boxes": [[-1, 10, 10, 20]]}]}, "line 1 of .* 0 <= x0 < x1 <= 100"),
        ({"objects": [{"label": "cup", "boxes": [[10, 10, 20, float("nan")]]}]}, "line 1 of .* a box is"),
        ({"objects": [{"label": "cup", "boxes": [[10, 10, 20, float("inf")]]}]}, "line 1 of .* a box is"),
        (
            {"objects": [{"label": "cup", "boxes": [[1, 1, 2, 2]], "points": [[1, 101]]}]},
            r"line 1 of .* the point \[1, 101",
        ),
        ({"objects": [{"label": "cup", "boxes": [[1, 1, 2, 2], [1, 1, 2, 2]]}]}, "line 1 of .* twice: remove one"),
        ({"objects": [{"label": " ", "boxes": [[1, 1, 2, 2]]}]}, '"label" and "boxes"'),
        ({"objects": 5}, "line 1 of .* in percent"),
        ({"objects": [5]}, "line 1 of .* in percent"),
        ({"texts": [{"text": "stop", "box": [0, 0, 300, 100]}]}, "line 1 of .* of one of texts is not a box"),
        ({"texts": [5]}, "line 1 of "),
        ({"fields": 5}, "line 1 of .* is not an annotation"),
        ({"image": 5}, "line 1 of .* is not an annotation"),
        ({"objects": [{"label": "cup", "boxes": []}, {"label": "cup", "boxes": []}]}, '"cup" occurs twice'),
        ({"fields": {"total": 9.5}}, "must be strings: quote numbers"),
        ({"clocks": [{"time": "9"}]}, "written as"),
        ({"image": "images/none.png"}, "there is no .*none.png"),
    ],
)
def test_annotations_that_cannot_be_asked_are_named_first(
    annotation: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_photos(tmp_path, annotation)
    with pytest.raises(PhotoError, match=message):
        load_suite(f"photos:{tmp_path}")


def test_errors_name_the_faulty_line(tmp_path: Path) -> None:
    fine = {"objects": [{"label": "cup", "boxes": [[0, 0, 100, 100]]}]}
    write_photos(tmp_path, fine, fine, {"objects": [{"label": "cup", "boxes": [[0, 0, 40, 101]]}]})
    with pytest.raises(PhotoError, match=r"line 3 of .*annotations\.jsonl: .*\[0, 0, 40, 101\] of \"cup\""):
        load_suite(f"photos:{tmp_path}")
    for text, message in (("[1]", "line 1 of .* is not a JSON object"), ("[" * 100_000, "line 1 of")):
        (tmp_path / "annotations.jsonl").write_text(text)
        with pytest.raises(PhotoError, match=message):
            load_suite(f"photos:{tmp_path}")
    (tmp_path / "annotations.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(PhotoError, match="cannot be read as UTF-8"):
        load_suite(f"photos:{tmp_path}")


def test_photos_are_found_by_names_in_either_unicode_form(tmp_path: Path) -> None:
    composed, split = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    Image.new("RGB", (40, 30)).save(tmp_path / split)
    cup = {"label": "cup", "boxes": [[0, 0, 50, 50]]}
    line = json.dumps({"image": composed, "objects": [cup]}, ensure_ascii=False)
    (tmp_path / "annotations.jsonl").write_text(f"\n{line}\n\n", encoding="utf-8")
    assert load_suite(f"photos:{tmp_path}")[0].image().shape == (30, 40, 3)
    (tmp_path / "annotations.jsonl").unlink()
    line = json.dumps({"image": composed, "question": "What?"}, ensure_ascii=False)
    (tmp_path / "prompts.jsonl").write_text(line, encoding="utf-8")
    assert load_suite(f"photos:{tmp_path}")[0].image().shape == (30, 40, 3)


def test_a_turned_photo_is_trained_on_as_it_is_shown(tmp_path: Path) -> None:
    """Its boxes are those of the picture as annotators, and the model that answers, see it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "annotations.jsonl").write_text(json.dumps({"image": "a.jpg"}))
    (photo,) = load_photos(tmp_path, "train")
    assert photo.rgb().shape == (40, 30, 3) == next(iter(load_suite(f"photos:{tmp_path}"))).image().shape


def test_plain_photos_are_asked_common_questions_without_scores(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "inside/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    (tmp_path / "._a.png").write_bytes(b"macOS's notes about a.png")
    (tmp_path / "notes.txt").write_text("no photo")
    found = load_suite(f"photos:{tmp_path}")
    assert len(found) == 15
    assert len({q.id for q in found}) == 15
    assert len({q.image_id for q in found}) == 3
    assert {q.text for q in found} >= {"Describe this image.", "Point to the main object."}
    assert {(q.kind, str(q.score("There are none."))) for q in found} == {("unscored", "{}")}
    assert all(q.image().shape == (30, 40, 3) for q in found)
    assert [q.id for q in load_suite(f"photos:{tmp_path}")] == [q.id for q in found], "the same at every run"
    assert len(load_suite(f"photos:{tmp_path}", limit=1)) == 5
    assert len(load_suite(f"nano-val:{tmp_path}", limit=3)) > 0
    rows = [{"image": "a.png", "question": "Why?"}, {"image": "a.png", "question": "Who?", "answer": "Me."}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [(q.text, q.kind) for q in load_suite(f"photos:{tmp_path}")] == [("Why?", "unscored"), ("Who?", "unscored")]
    (tmp_path / "prompts.jsonl").write_text('{"image": "gone.png", "question": "Why?"}')
    with pytest.raises(MolmoEdgeError, match=r"prompts\.jsonl, line 1: there is no .*gone\.png"):
        load_suite(f"photos:{tmp_path}")


def test_academic_stands_for_all_benchmarks() -> None:
    names = expand(["ai2d", "academic", "nano-val"])
    assert len(names) == 13
    assert names[0] == "ai2d"
    assert names[-1] == "nano-val"


def test_a_limit_selects_evenly() -> None:
    assert evenly(range(10), 3) == [0, 3, 6]
    assert evenly(range(3), None) == evenly(range(3), 9) == [0, 1, 2]


def test_questions_that_suites_share_are_asked_once() -> None:
    questions = load_suite("nano-val", limit=2)
    assert unique([*questions, *questions]) == questions


def test_a_missing_folder_is_not_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"the folder .* does not exist"):
        load_suite(f"photos:{tmp_path / 'dog'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MolmoEdgeError) as raised:
        load_suite(f"photos:{tmp_path / 'empty'}")
    assert "there is no folder" not in str(raised.value)
