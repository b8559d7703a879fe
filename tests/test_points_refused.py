"""Points folders with damaged or repeated rows, all kinds of shapes, and names in both Unicode forms."""

from __future__ import annotations

import json
import logging
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from molmo_edge.data.points_folder import PointsError, PointsFolder, open_points

PERCENT_CSV = "image,label,x_percent,y_percent\n"
CSV = "image,label,x,y\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (100, 50)).save(tmp_path / name)
    return tmp_path


def read(folder: Path) -> tuple[dict[str, dict[str, list[tuple[float, float]]]], list[str]]:
    notes: list[str] = []
    train, _ = open_points(folder, validation=0, note=notes.append)
    return points_of(train), notes


def points_of(data: PointsFolder) -> dict[str, dict[str, list[tuple[float, float]]]]:
    return {p.path.name: {label: list(xy) for label, xy in p.points.items()} for p in data.pictures}


def coco(*annotations: dict[str, Any], **changes: Any) -> str:
    content = {
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "spoon"}],
        "images": [
            {"id": 1, "file_name": "a.png", "width": 100, "height": 50},
            {"id": 2, "file_name": "b.png", "width": 100, "height": 50},
        ],
        "annotations": [{"image_id": 1, "category_id": 1, **each} for each in annotations],
    }
    return json.dumps(content | changes)


def labelme(*shapes: Any, **changes: Any) -> str:
    return json.dumps({"imagePath": "a.png", "imageWidth": 100, "imageHeight": 50, "shapes": list(shapes), **changes})


# --- rows that are refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "match"),
    [
        # A decimal comma splits a cell and shifts the following columns.
        (CSV + "a.png,cup,1,1\na.png,cup,12,5,7\n", "line 3 of .* 5 cells and the first line 4: .* with a point"),
        (CSV + "a.png,cup,12,\n", "line 2 of .* has only one of x and y"),
        (CSV + "a.png,cup,12,5,\n", "line 2 of .* has 5 cells"),
        (CSV.replace(",", ";") + "a.png;cup;12,5;7\n", "line 2 .*: x is '12,5', not a number: write decimals with a"),
        (CSV + 'a.png,cup,"12,5",7\n', "line 2 of .*: x is '12,5', not a number: write decimals with a point"),
        (CSV + "a.png,a cup, red,12,7\n", "line 2 of .* has 5 cells"),
        # Text beside a number.
        (CSV + "a.png,cup,12 px,7\n", "line 2 of .*: x is '12 px', not a number"),
        (CSV + "a.png,cup,12,7 8\n", "line 2 of .*: y is '7 8', not a number"),
        (CSV + "a.png,cup,1_2,7\n", "line 2 of .*: x is '1_2', not a number"),
        (CSV + "a.png,cup,\uff11\uff12,7\n", "line 2 of .*: x is .*, not a number"),
        (CSV + 'a.png,"cup"x,12,7\n', "line 2 of .* is not CSV"),
        (CSV + 'a.png,"cup,12,7\nb.png,spoon,1,1\n', "line 2 of .* is not CSV: .* Is a quote missing"),
        (CSV + 'a.png,"cup,12,7\nb.png,"spoon,1,1\n', "line 2 of .* is not CSV"),
        (CSV + 'a.png,"cup\n",1,2\n', None),
        (CSV + 'a.png,"cup,1,2\nb.png,spoon",3,4\n', "line 2 of .* has the label .*: a label is one line"),
        # Truncated: without its numbers, a row would mean that the label is absent.
        (CSV + "a.png,cup\n", "line 2 of .* ends before its x and y"),
        (CSV + "a.png,cup,1\n", "line 2 of .* ends before its y"),
        (CSV + "a.png\n", "line 2 of .* has no label"),
        # Duplicate columns or units.
        ("image,label,x,x,y\na.png,cup,1,2,3\n", 'has several columns "x"'),
        ("image,label,x,y,x_percent,y_percent\na.png,cup,1,2,3,4\n", "has both x,y and x_percent,y_percent"),
        (CSV.strip() + ",\na.png,cup,12,5,7\n", "line 2 of .* has '7' in a column without a name"),
        (CSV + "a.png,cu\0p,1,2\n", "line 2 of .*(damaged|NUL)"),
        (CSV + "a.png," + "c" * 200_000 + ",1,2\n", "line 2 of .* is not CSV: field larger"),
        (CSV + "a" * 5000 + ".png,cup,1,2\n", "does not exist"),
        (CSV + "a.png,cup,-1e999,2\n", "line 2 of .*: x is '-1e999', not a number"),
    ],
)  # fmt: skip
def test_csv_rows_that_are_not_as_the_header_says(folder: Path, text: str, match: str | None) -> None:
    (folder / "points.csv").write_text(text, encoding="utf-8")
    if match is None:
        assert read(folder)[0] == {"a.png": {"cup": [(1, 4)]}}
        return
    with pytest.raises(PointsError, match=match):
        open_points(folder)


def test_columns_without_a_name_may_be_empty(folder: Path) -> None:
    (folder / "points.csv").write_text("image;label;x;y;;\na.png;cup;10;5;;\nb.png;cup;10;5\n")
    assert read(folder)[0] == {"a.png": {"cup": [(10, 10)]}, "b.png": {"cup": [(10, 10)]}}


def test_a_name_with_a_line_break_does_not_break_the_message(folder: Path) -> None:
    (folder / "rows.jsonl").write_text(json.dumps({"image": "a\nb.png", "label": "cup", "points": []}))
    with pytest.raises(PointsError, match=r"'a\\nb\.png' does not exist"):
        open_points(folder)


def test_csv_with_spaces_quotes_and_more_columns(folder: Path) -> None:
    text = 'image, label, x, y, by\n\na.png, "a cup, red", 10, 5, me\n"b.png",a 5" disk,1e1,+5.\n'
    (folder / "points.csv").write_text(text)
    assert read(folder) == ({"a.png": {"a cup, red": [(10, 10)]}, "b.png": {'a 5" disk': [(10, 10)]}}, [])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"image": "a.png", "label": "cup", "points": []} and more', "line 1 of .* is not JSON: Extra data"),
        ('{"image": "a.png", "label": "cup", "points": [{"x": "1,5", "y": 2}]}', "line 1 .* '1,5', not a .*: write"),
        ('{"image": "a.png", "label": "cup", "points": [{"x": true, "y": 2}]}', "line 1 of .*: x is True, not a num"),
        ('{"image": "a.png", "label": "cup", "points": [{"x": NaN, "y": 2}]}', "line 1 of .*: x is nan, not a number"),
        ('{"image": "a.png", "label": "c", "points": [{"x": 1' + "0" * 400 + ', "y": 2}]}', "line 1 .* x is 10+"),
        ('{"image": "a.png", "label": "cup", "points": [{"x": 1, "y": 2}], "count": 2}', "the count 2 and 1 point:"),
        ('{"image": "a.png", "label": 5, "points": []}', "line 1 of .* has the label 5, which is not a text"),
        ('{"image": "a.png", "label": "\\ud800", "points": []}', "line 1 of .*: the label is damaged"),
        ('{"image": "\\udcff.png", "label": "cup", "points": []}', "line 1 of .*: the picture's name is damaged"),
        ('\n\n{"image": ' + "[" * 100_000, "line 3 of .* nested too deeply"),
    ],
)  # fmt: skip
def test_json_rows_that_cannot_be_meant(folder: Path, text: str, match: str) -> None:
    (folder / "rows.jsonl").write_text(text)
    with pytest.raises(PointsError, match=match) as error:
        open_points(folder)
    str(error.value).encode()  # it can be printed


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (coco({"bbox": "1234"}), "annotation 1 in the list of .* does not follow the COCO format"),
        (coco({"bbox": [1, 1, 5, 5]}, {"id": 7, "bbox": [20, 20, -5, 5]}), "annotation 7 of .* box of -5 x 5 pixels"),
        (coco({"bbox": [1, 1, 5, 5]}, {"bbox": [1, 1, None, 5]}), "annotation 2 in the list of .*: bbox is None"),
        (coco({"segmentation": ["1234"]}), "annotation 1 in the list of .* does not follow the COCO format"),
        (coco({"segmentation": [[1, 1, 5]]}), "annotation 1 in the list of .* does not follow the COCO format"),
        (coco({"iscrowd": "0", "bbox": [1, 1, 5, 5]}), "annotation 1 .*: iscrowd is '0', neither 0 nor 1"),
        (coco({"bbox": [1, 1, 5, 5], "category_id": [1]}), "annotation 1 .* the COCO format, TypeError"),
        (coco({}, categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]), "category 1 of .* has the same id"),
        (coco({}, images=[{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}]), "image 1 .* the same id"),
        (coco({}, images=[{"id": 1, "file_name": "a.png", "width": -100, "height": -50}]), "image 1 .* -100 x -50 pix"),
        (coco(images=[{"id": 1, "file_name": "a.png", "width": 200}]), r"image 1 of .* 200 x \? pixels, but a\.png"),
        (coco({}, annotations={}), "annotations is not a list"),
        (labelme(imagePath=None), r"a\.json does not name a picture"),
        (labelme(shapes=5), r'a\.json does not follow the LabelMe format: it needs a list "shapes"'),
        (labelme({"label": "cup", "points": "1234"}), r"shape 1 of .*a\.json does not follow the LabelMe format"),
        (labelme({"label": "cup", "points": []}), r'shape 1 of .*a\.json is a "polygon" with 0 points'),
        (labelme({"label": "cup", "points": [[1, 1]], "shape_type": "rectangle"}), 'shape 1 .* "rectangle" with 1 po'),
        (labelme({"label": "cup", "points": [["1,5", 1]], "shape_type": "point"}), "shape 1 .*: x is '1,5', not a num"),
    ],
)  # fmt: skip
def test_boxes_that_are_not_as_their_format_has_them(folder: Path, text: str, match: str) -> None:
    (folder / ("annotations.json" if "categories" in text else "a.json")).write_text(text)
    with pytest.raises(PointsError, match=match):
        open_points(folder)


def test_a_file_that_lost_its_pictures_name_is_not_taken_for_somebody_elses(folder: Path) -> None:
    shape = {"label": "cup", "shape_type": "point", "points": [[1, 1]]}
    (folder / "a.json").write_text(labelme(shape))
    (folder / "b.json").write_text(json.dumps({"shapes": [shape]}))
    with pytest.raises(PointsError, match=r"b\.json does not name a picture"):
        open_points(folder)


def test_a_file_of_somebody_elses_with_one_such_key_is_left_alone(folder: Path) -> None:
    (folder / "points.csv").write_text(CSV + "a.png,cup,10,5\n")
    (folder / "graph.json").write_text(json.dumps({"shapes": {"input": [1, 3]}}))
    assert read(folder) == ({"a.png": {"cup": [(10, 10)]}}, [])


# --- units ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "said", "never"),
    [
        ("points.csv", CSV + "a.png,cup,101,3\n", "100 x 50 pixels: it is at 101 and 3 pixels", "percent"),
        ("points.csv", PERCENT_CSV + "a.png,cup,101,3\n", "outside of a.png: it is at 101 and 3 percent", "pixel"),
        ("annotations.json", coco({"bbox": [99, 0, 10, 2]}), "100 x 50 pixels: it is at 104 and 1 pixels", "percent"),
        ("a.json", labelme({"label": "c", "shape_type": "point", "points": [[9, 51]]}), "9 and 51 pixels", "percent"),
        (
            "a.json",
            labelme({"label": "c", "shape_type": "point", "points": [[9, 101]]}, imageWidth=200, imageHeight=100),
            "a.png, 200 x 100 pixels: it is at 9 and 101 pixels",
            "percent",
        ),
    ],
)  # fmt: skip
def test_errors_are_in_the_unit_of_the_file(folder: Path, name: str, text: str, said: str, never: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(PointsError) as error:
        open_points(folder)
    assert said in str(error.value)
    assert never not in str(error.value).replace("x_percent", "")


# --- what is said twice -----------------------------------------------------------------------------------------------

TWICE = [
    ("points.csv", CSV + "a.png,cup,10,5\na.png,Cup ,10.0,5\nb.png,cup,10,5\na.png,cup,10,6\n", ["line 3 of "]),
    ("points.csv", PERCENT_CSV + "a.png,cup,10,10\na.png,cup,10,12\nb.png,cup,10,10\na.png,cup,10,10\n", ["line 5"]),
    (
        "rows.jsonl",
        "\n".join(
            json.dumps({"image": image, "label": "cup", "points": [{"x": 10, "y": y} for y in ys]})
            for image, ys in (("a.png", (10, 12, 10)), ("b.png", (10,)), ("b.png", (10,)))
        ),
        ["line 1 of ", "line 3 of "],
    ),
    (
        "annotations.json",
        coco(
            *({"id": 4 + i, "image_id": n, "bbox": [9, y, 2, 2]} for i, (n, y) in enumerate([(1, 4), (1, 5), (2, 4)])),
            {"id": 7, "bbox": [9, 4, 2, 2]},
        ),
        ["annotation 7 of "],
    ),
    (
        "a.json",
        labelme(
            *({"label": "cup", "shape_type": "rectangle", "points": [[9, y], [11, y + 2]]} for y in (4, 5)),
            {"label": "cup", "shape_type": "rectangle", "points": [[9, 4], [11, 6]], "flags": {}},
        ),
        ["shape 3 of "],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "places"), TWICE)
def test_what_is_said_twice_counts_once_with_a_note(folder: Path, name: str, text: str, places: list[str]) -> None:
    (folder / name).write_text(text)
    found, (note,) = read(folder)
    assert sorted(found["a.png"]["cup"]) == [(10, 10), (10, 12)]
    assert found.get("b.png", {"cup": [(10, 10)]}) == {"cup": [(10, 10)]}
    assert note.startswith("repeated annotations, counted once: ")
    assert all(place in note for place in places)


def test_different_boxes_with_one_middle_are_two_things(folder: Path) -> None:
    boxes = [{"bbox": [9, 4, 2, 2]}, {"bbox": [8, 3, 4, 4]}, {"bbox": [9, 4, 2, 2], "category_id": 2}]
    (folder / "annotations.json").write_text(coco(*boxes))
    found, notes = read(folder)
    assert found["a.png"] == {"cup": [(10, 10)] * 2, "spoon": [(10, 10)]}
    assert notes == []


def test_questions_and_none_said_twice(folder: Path) -> None:
    row = json.dumps({"image": "a.png", "question": "What?", "answer": "A table."})
    other = json.dumps({"image": "a.png", "question": "What?", "answer": "A desk."})
    (folder / "questions.jsonl").write_text("\n".join([row, row, other]))
    (folder / "points.csv").write_text(CSV + "a.png,cup,,\na.png,cup,,\n")
    notes: list[str] = []
    train, _ = open_points(folder, validation=0, note=notes.append)
    assert train.pictures[0].questions == (("What?", "A table."), ("What?", "A desk."))
    assert train.pictures[0].points == {"cup": ()}
    assert len(notes) == 1
    assert "points.csv" in notes[0]
    assert "line 2 of" in notes[0]
    assert "questions.jsonl" in notes[0]


def test_notes_go_to_the_log_unless_told_otherwise(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "points.csv").write_text(CSV + "a.png,cup,1,1\n" * 30)
    with caplog.at_level(logging.WARNING, logger="molmo_edge"):
        train, _ = open_points(folder, validation=0)
    assert points_of(train) == {"a.png": {"cup": [(1, 2)]}}
    assert caplog.text.count("points.csv (a.png)") == 10
    assert "and 19 more" in caplog.text


# --- LabelMe's shapes -------------------------------------------------------------------------------------------------


def test_every_shape_of_labelme_is_read_or_skipped_by_itself(folder: Path) -> None:
    corners = [[10, 10], [30, 20]]
    square = [[10, 10], [30, 10], [30, 20], [10, 20]]
    read_ = {"rectangle": corners, "mask": corners, "polygon": square, "oriented_rectangle": square,
             "circle": [[20, 15], [25, 15]], "point": [[20, 15]]}  # fmt: skip
    skipped = {"line": corners, "linestrip": square, "points": square, "cuboid": square}
    shapes = [
        {"label": kind, "shape_type": kind, "points": points, "mask": "iVBORw0K" if kind == "mask" else None}
        for kind, points in {**read_, **skipped}.items()
    ]
    (folder / "a.json").write_text(labelme(*shapes))
    found, notes = read(folder)
    assert found == {"a.png": {kind: [(20, 30)] for kind in read_}}
    assert len(notes) == len(skipped)
    for number, (kind, note) in enumerate(zip(skipped, notes, strict=True), len(read_) + 1):
        assert note.startswith(f'shape {number} of {folder / "a.json"} is a "{kind}", which has no single position')
        assert f'nothing is asked about "{kind}" in a.png' in note


def test_a_label_with_a_skipped_shape_is_neither_counted_nor_denied(folder: Path) -> None:
    box = {"label": "cup", "shape_type": "rectangle", "points": [[10, 10], [30, 20]]}
    line = {"label": "cup", "shape_type": "line", "points": [[40, 10], [50, 20]]}
    (folder / "a.json").write_text(labelme(box, line, {**box, "label": "spoon"}))
    (folder / "b.json").write_text(labelme(box, imagePath="b.png"))
    train, _ = open_points(folder, validation=0, complete=True, note=lambda _why: None)
    assert points_of(train) == {"a.png": {"spoon": [(20, 30)]}, "b.png": {"cup": [(20, 30)]}}
    assert train.pictures[0].unsure == {"cup"}


def test_many_skipped_shapes_do_not_flood(folder: Path) -> None:
    shapes = [{"label": f"l{i}", "shape_type": "line", "points": [[1, 1], [2, 2]]} for i in range(30)]
    (folder / "a.json").write_text(labelme(*shapes, {"label": "cup", "shape_type": "point", "points": [[1, 1]]}))
    _, notes = read(folder)
    assert len(notes) == 11
    assert notes[-1].startswith("20 more shapes")


# --- names ------------------------------------------------------------------------------------------------------------

COMPOSED, SPLIT = (unicodedata.normalize(form, "é/tête å.png") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("on_disk", "named"), [(COMPOSED, SPLIT), (SPLIT, COMPOSED)])
@pytest.mark.parametrize("inside", ["", "images/"])
def test_names_in_another_unicode_form_find_their_file(folder: Path, on_disk: str, named: str, inside: str) -> None:
    path = folder / inside / on_disk
    path.parent.mkdir(parents=True)
    (folder / "a.png").rename(path)
    for name, text in (
        ("points.csv", f"image,label,x,y\n{named},cup,10,5\n"),
        ("rows.jsonl", json.dumps({"image": named, "label": "cup", "points": [{"x": 10, "y": 10}]})),
        ("annotations.json", coco({"bbox": [9, 4, 2, 2]}, images=[{"id": 1, "file_name": named}])),
        ("a.json", labelme({"label": "cup", "shape_type": "point", "points": [[10, 5]]}, imagePath=named)),
    ):
        (folder / name).write_text(text, encoding="utf-8")
        train, _ = open_points(folder, validation=0)
        assert [p.path for p in train.pictures] == [path]
        assert train.pictures[0].points == {"cup": ((10, 10),)}
        (folder / name).unlink()


def test_a_name_that_two_files_could_have_is_refused(folder: Path) -> None:
    """Both accents decomposed, or neither; and a name with one of each."""
    for form in ("NFC", "NFD"):
        Image.new("RGB", (10, 10)).save(folder / unicodedata.normalize(form, "éé.png"))
    if len(list(folder.glob("*.png"))) < 4:
        pytest.skip("this file system takes both for one name")
    (folder / "points.csv").write_text("image,label,x,y\ne\u0301\u00e9.png,cup,1,1\n", encoding="utf-8")
    with pytest.raises(PointsError, match=r"line 2 of .*points\.csv: .* has 2 entries named .*rename all but one"):
        open_points(folder)
    rows = [f"{unicodedata.normalize(form, 'éé.png')},cup,1,1" for form in ("NFC", "NFD")]
    (folder / "points.csv").write_text("\n".join(["image,label,x,y", *rows]), encoding="utf-8")
    assert len(open_points(folder, validation=0)[0]) == 2, "a file's exact name is its own"


def test_two_spellings_of_one_file_are_one_picture(folder: Path) -> None:
    if not (folder / "A.png").exists():  # as on case-insensitive file systems
        os.link(folder / "a.png", folder / "A.png")
    (folder / "points.csv").write_text(CSV + "a.png,cup,10,5\nA.png,cup,10,5\nA.png,cup,20,5\n")
    train, _ = open_points(folder, validation=0, note=lambda _why: None)
    assert [p.points for p in train.pictures] == [{"cup": ((10, 10), (20, 10))}]
