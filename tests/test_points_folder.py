"""Points folders: the same annotations in every format, and errors that name file and line."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo_edge.data.examples import Example
from molmo_edge.data.points_folder import PointsError, PointsFolder, open_points
from molmo_edge.frontend.points import parse_count, parse_points

# Boxes in pixels: left, top, width, height. "turned.jpg" is stored as 80 x 40 and displayed as 40 x 80.
BOXES: dict[str, dict[str, list[tuple[float, ...]]]] = {
    "a.png": {"cup": [(10, 10, 20, 10), (60, 20, 10, 20)], "spoon": [(0, 0, 10, 10)]},
    "b.png": {"cup": [(40, 0, 20, 50)]},
    "turned.jpg": {"spoon": [(10, 60, 20, 10)]},
}
SIZES = {"a.png": (100, 50), "b.png": (100, 50), "turned.jpg": (40, 80)}
PERCENT = {
    "a.png": {"cup": [(20.0, 30.0), (65.0, 60.0)], "spoon": [(5.0, 10.0)]},
    "b.png": {"cup": [(50.0, 50.0)]},
    "turned.jpg": {"spoon": [(50.0, 81.25)]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (100, 50)).save(tmp_path / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40)).save(tmp_path / "turned.jpg", exif=exif)
    return tmp_path


def middles(image: str, label: str) -> list[tuple[float, float]]:
    return [(x + w / 2, y + h / 2) for x, y, w, h in BOXES[image][label]]


def pairs() -> list[tuple[str, str]]:
    return [(image, label) for image, labels in BOXES.items() for label in labels]


def write_csv(folder: Path) -> None:
    rows = [(image, label, *xy) for image, label in pairs() for xy in middles(image, label)]
    with (folder / "points.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("image", "label", "x", "y", "by"), *((*row, "me") for row in rows)])


def write_percent_csv(folder: Path) -> None:
    rows = [f"{image};{label};{x};{y}" for image, label in pairs() for x, y in PERCENT[image][label]]
    (folder / "points.csv").write_text("\n".join(["image;label;x_percent;y_percent", *rows]))


def write_rows(folder: Path) -> None:
    rows = [
        {"image": image, "label": label, "points": [{"x": x, "y": y} for x, y in PERCENT[image][label]]}
        for image, label in pairs()
    ]
    (folder / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)))


def coco(**changes: Any) -> dict[str, Any]:
    names, images = ["objects", "cup", "spoon"], list(BOXES)
    boxes = [(image, label, box) for image, label in pairs() for box in BOXES[image][label]]
    content = {
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],  # the first one has no annotation
        "images": [
            {"id": 10 + i, "file_name": image, "width": SIZES[image][0], "height": SIZES[image][1]}
            for i, image in enumerate(images)
        ],
        "annotations": [
            {"id": i, "image_id": 10 + images.index(image), "category_id": names.index(label), "bbox": list(box)}
            for i, (image, label, box) in enumerate(boxes)
        ],
    }
    return content | changes


def write_coco(folder: Path, content: dict[str, Any] | None = None, name: str = "annotations.json") -> None:
    (folder / name).write_text(json.dumps(content or coco()))


def write_labelme(folder: Path) -> None:
    for image in BOXES:
        shapes = []
        boxes = [(label, box) for label, found in BOXES[image].items() for box in found]
        for number, (label, (x, y, w, h)) in enumerate(boxes):
            corners = [[x, y], [x + w, y], [x + w, y + h], [x, y + h]]
            middle = [x + w / 2, y + h / 2]
            kinds = {
                "polygon": corners,
                "rectangle": [corners[2], corners[0]],
                "circle": [middle, [x + w, y]],
                "point": [middle],
            }
            kind = list(kinds)[(number + len(image)) % 4]
            shapes.append({"label": label, "shape_type": kind, "points": kinds[kind]})
        width, height = SIZES[image]
        content = {"shapes": shapes, "imagePath": f".\\{image}", "imageWidth": width, "imageHeight": height}
        (folder / image).with_suffix(".json").write_text(json.dumps(content))


def pictures(*sides: PointsFolder) -> dict[str, dict[str, list[tuple[float, float]]]]:
    return {p.path.name: {label: list(xy) for label, xy in p.points.items()} for s in sides for p in s.pictures}


def every(data: PointsFolder, index: int, visits: int = 30) -> list[Example]:
    return [data.example(index, np.random.default_rng(visit)) for visit in range(visits)]


WRITERS = [write_csv, write_percent_csv, write_rows, write_coco, write_labelme]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("inside", [False, True])
def test_every_format_says_the_same(folder: Path, write: Callable[[Path], None], inside: bool) -> None:
    write(folder)
    if inside:  # pictures in a subfolder
        (folder / "images").mkdir()
        for image in BOXES:
            (folder / image).rename(folder / "images" / image)
    train, validation = open_points(folder, validation=0)
    assert len(validation) == 0
    assert len(train) == 3
    assert pictures(train) == PERCENT
    assert train.labels == (("cup", "spoon") if write is write_coco else ())


def test_an_example_points_and_counts(folder: Path) -> None:
    write_rows(folder)
    train, _ = open_points(folder, validation=0)
    example = train.example(0, np.random.default_rng(0))
    assert example.image == folder / "a.png"
    assert sorted(a.style for a in example.annotations) == ["point_count"] * 2 + ["pointing"] * 2
    for annotation in example.annotations:
        question, answer = annotation.messages
        label = "cup" if "cup" in question else "spoon"
        found = sorted((p.x, p.y) for p in parse_points(answer))
        assert found == sorted(PERCENT["a.png"][label])
        assert label in answer
        assert annotation.style == "pointing" or parse_count(answer) == len(found)
    assert {a.messages for e in every(train, 0) for a in e.annotations} > {a.messages for a in example.annotations}
    assert pickle.loads(pickle.dumps(train)).example(0, np.random.default_rng(0)).annotations == example.annotations


def test_few_annotations_at_a_time_but_all_of_them_in_turn(folder: Path) -> None:
    write_rows(folder)
    train, _ = open_points(folder, validation=0, max_annotations=2)
    shown = [sorted(("cup" in a.messages[0], a.style) for a in e.annotations) for e in every(train, 0)]
    assert all([cup for cup, _ in each] == [False, True] for each in shown), "every label before one comes twice"
    assert {one for each in shown for one in each} == {
        (c, s) for c in (True, False) for s in ("pointing", "point_count")
    }


def test_labels_that_are_not_there(folder: Path) -> None:
    """Only if the format or the user states that annotations are exhaustive."""
    write_coco(folder)
    train, _ = open_points(folder, validation=0)
    for index, absent in ((0, None), (1, "spoon"), (2, "cup")):
        none = [a for e in every(train, index) for a in e.annotations if a.messages[1] == "There are none."]
        assert bool(none) == (absent is not None)
        assert all(absent in a.messages[0] for a in none)
        assert len(none) in (0, 30), "once a visit"
        assert {a.style for a in none} == ({"pointing", "point_count"} if absent else set())
    silent, _ = open_points(folder, validation=0, complete=False)
    assert not any("none" in a.messages[1] for i in range(3) for e in every(silent, i) for a in e.annotations)
    (folder / "annotations.json").unlink()
    write_csv(folder)
    for complete, asked in ((None, False), (True, True)):
        train, _ = open_points(folder, validation=0, complete=complete)
        said = [a.messages[1] for e in every(train, 1) for a in e.annotations]
        assert ("There are none." in said) == asked


def test_crowds_are_neither_counted_nor_denied(folder: Path) -> None:
    content = coco()
    crowd = {"id": 99, "image_id": 10, "category_id": 1, "iscrowd": 1, "bbox": [0, 0, 9, 9], "segmentation": {}}
    other = {"id": 98, "image_id": 12, "category_id": 1, "iscrowd": 1, "segmentation": {"counts": [1], "size": [2, 2]}}
    content["annotations"] += [crowd, other]
    write_coco(folder, content, "instances_default.json")
    train, _ = open_points(folder, validation=0)
    assert pictures(train)["a.png"] == {"spoon": PERCENT["a.png"]["spoon"]}
    for index in (0, 2):
        assert not any("cup" in a.messages[0] for e in every(train, index) for a in e.annotations)


def test_coco_without_boxes_and_with_other_sizes(folder: Path) -> None:
    content = coco()
    content["annotations"] = [
        {
            "id": 1,
            "image_id": 10,
            "category_id": 1,
            "segmentation": [[20, 40, 60, 40, 60, 60], [20, 40, 30, 50, 40, 60]],
        },
        {"id": 2, "image_id": 11, "category_id": 1, "keypoints": [10, 10, 2, 30, 20, 1, 0, 0, 0]},
    ]
    content["images"][0] |= {"width": 200, "height": 100}  # annotated at twice the size
    del content["images"][1]["width"]
    write_coco(folder, content)
    train, _ = open_points(folder, validation=0)
    assert pictures(train) == {"a.png": {"cup": [(20, 50)]}, "b.png": {"cup": [(20, 30)]}, "turned.jpg": {}}
    assert train.example(2, np.random.default_rng(0)).annotations[0].messages[1] == "There are none."


def test_none_here(folder: Path) -> None:
    (folder / "points.csv").write_text("image,label,x,y\na.png,cup,,\nb.png,cup,50,25\nb.png,Cup,10,10\n")
    train, _ = open_points(folder, validation=0)
    assert pictures(train) == {"a.png": {"cup": []}, "b.png": {"cup": [(50, 50), (10, 20)]}}
    assert {a.messages[1] for e in every(train, 0) for a in e.annotations} == {"There are none."}
    (folder / "points.csv").write_text("image,label,x,y\nb.png,cup,50,25\nb.png,cup,,\n")
    with pytest.raises(PointsError, match=r'line 3 of .*points\.csv states that b\.png has no "cup", but other rows'):
        open_points(folder)


def test_questions_beside_points_and_alone(folder: Path) -> None:
    rows = [
        {"image": "a.png", "question": "What is it?", "answer": "A table."},
        {"image": "b.png", "question": "How many cups?", "answer": "Five."},
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, _ = open_points(folder, validation=0)
    (one,) = train.example(0, np.random.default_rng(0)).annotations
    assert (one.style, one.messages) == ("user_qa", ("What is it?", "A table."))
    (counted,) = train.example(1, np.random.default_rng(0)).annotations
    assert counted.messages[0] != "How many cups?"
    assert counted.messages[0].endswith("How many cups?")
    write_coco(folder)
    both, _ = open_points(folder, validation=0)
    assert len(both) == 3
    assert {a.style for a in both.example(0, np.random.default_rng(0)).annotations} == {
        "user_qa",
        "pointing",
        "point_count",
    }


def test_the_split_is_by_picture_and_the_same_every_time(folder: Path) -> None:
    for number in range(40):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    rows = [f"{n}.png,cup,{x},4" for n in range(40) for x in (1, 5)]
    (folder / "points.csv").write_text("\n".join(["image,label,x,y", *rows]))

    def names(**options: Any) -> tuple[set[str], set[str]]:
        train, validation = open_points(folder, **options)
        assert len(train) + len(validation) == 40
        return set(pictures(train)), set(pictures(validation))

    train, validation = names(validation=0.2)
    assert len(validation) == 8
    assert not train & validation
    assert names(validation=0.2) == (train, validation)
    assert names(validation=0.2, seed=1)[1] != validation
    assert names(validation=0.1)[1] < validation, "a larger share holds back the same pictures, and more"
    (folder / "points.csv").write_text("\n".join(["image,label,x,y", *reversed(rows)]))
    assert names(validation=0.2) == (train, validation), "whatever the order"
    assert len(names(validation=0.001)[1]) == 1
    (folder / "points.csv").write_text("\n".join(["image,label,x,y", *rows[:2]]))
    alone, nothing = open_points(folder, validation=0.9)
    assert (len(alone), len(nothing)) == (1, 0), "there is always something to train on"


def test_missing_and_damaged_pictures_are_told_at_once(folder: Path) -> None:
    names = [f"gone{n}.png" for n in range(14)]
    (folder / "broken.png").write_bytes(b"\x89PNG no")
    rows = [f"{name},cup,1,1" for name in ("broken.png", "a.png", *names, *names)]
    (folder / "points.csv").write_text("\n".join(["image,label,x,y", *rows]))
    with pytest.raises(PointsError) as error:
        open_points(folder)
    said = str(error.value)
    assert "15 of the 16 pictures named in" in said
    assert "broken.png cannot be read: " in said
    assert "damaged or truncated" in said or "not an image" in said
    assert "gone8.png does not exist" in said
    assert "gone9.png" not in said
    assert said.endswith("and 5 more")


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("points.csv", "image,label,x,y\na.png,cup,100.5,3\n", r"line 2 .* of a\.png, 100 x 50 .* 100\.5 and 3 pixels"),
        ("points.csv", "image,label,x,y\nturned.jpg,cup,60,3\n", r"outside of turned\.jpg, 40 x 80 pixels"),
        ("points.csv", "image,label,x_percent,y_percent\na.png,cup,5,-1\n", "line 2 of .* at 5 and -1 percent"),
        ("points.csv", "image,label,x,y\na.png,cup,1,1\na.png,cup,one,1\n", "line 3 of .*: x is 'one', not a number"),
        ("points.csv", "image,label,x,y\na.png,cup,nan,1\n", "x is 'nan', not a number"),
        ("points.csv", "image,label,x,y\na.png,cup,1,\n", "line 2 of .* has only one of x and y"),
        ("points.csv", "image,label,x,y\na.png,,1,1\n", "line 2 of .* has no label"),
        ("points.csv", "image,label,x,y\na.png,<b>,1,1\n", "has the label .*: leave out < and >"),
        ("points.csv", "image,label,x,y\n,cup,1,1\n", "line 2 of .* does not name a picture"),
        ("points.csv", "image,label,x,y\na.png\n", "line 2 of .* has no label"),
        ("points.csv", "picture,label,x,y\n", "begins with 'picture,label,x,y': its first line must be image,label"),
        ("points.csv", "", "is empty: its first line .* image,label,x,y .* or image,label,x_percent"),
        ("points.csv", "image,label,x,y\n", "has no picture with a point or a question"),
        ("points.csv", "image,label,x,y\na.png,caf\xe9,1,1\n", r"points\.csv cannot be read as UTF-8"),
        ("rows.jsonl", '{"image": "a.png"}\n{', 'line 1 of .* has no list "points"'),
        ("rows.jsonl", '\n{"image": ', "line 2 of .* is not JSON"),
        ("rows.jsonl", "[1]", "line 1 of .* is not a JSON object"),
        ("rows.jsonl", '{"image": "a.png", "label": "cup", "points": [[1, 2]]}', "a point is .* not \\[1, 2\\]"),
        ("rows.jsonl", '{"image": "a.png", "label": "cup", "points": [{"x": 1}]}', "y is None, not a number"),
        ("rows.jsonl", '{"image": "a.png", "label": "c", "points": [{"x": 1, "y": 101}]}', "line 1 of .* at 1 and 101"),
        ("rows.jsonl", '{"image": "a.png", "label": "c", "points": [], "count": 3}', "has the count 3 and no points"),
        ("rows.jsonl", '{"image": "a.png", "points": []}', "has no label"),
        ("questions.jsonl", '{"image": "a.png", "question": "Why?"}', 'line 1 of .* needs a "question" and an'),
        ("annotations.json", "{", r"annotations\.json is not JSON"),
        ("annotations.json", '{"images": []}', r"the COCO format, KeyError\('categories'\)"),
        ("annotations.json", "[]", "does not follow the COCO format"),
    ],
)  # fmt: skip
def test_errors_name_file_and_line(folder: Path, name: str, text: str, match: str) -> None:
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(PointsError, match=match):
        open_points(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"bbox": [99, 0, 10, 10]}, r"annotation 0 of .* outside of a\.png"),
        ({"bbox": [1, 2]}, "annotation 0 of .* does not follow the COCO format"),
        ({"bbox": None}, "annotation 0 of .* has neither a box nor an outline nor points"),
        ({"image_id": 77}, "annotation 0 of .* KeyError.77.: .* an id unknown"),
        ({"category_id": 77}, "annotation 0 of .* KeyError.77."),
    ],
)
def test_errors_in_coco(folder: Path, changes: dict[str, Any], match: str) -> None:
    content = coco()
    content["annotations"][0] |= changes
    write_coco(folder, content)
    with pytest.raises(PointsError, match=match):
        open_points(folder)


def test_a_picture_that_was_turned_after_it_was_annotated(folder: Path) -> None:
    content = coco()
    content["images"][2] |= {"width": 80, "height": 40}
    write_coco(folder, content)
    with pytest.raises(PointsError, match=r"image 12 of .* 80 x 40 pixels, but turned\.jpg is displayed with 40 x 80"):
        open_points(folder)


def test_errors_in_labelme(folder: Path) -> None:
    for shape, match in (
        ({"label": "cup", "shape_type": "mask", "points": [[1, 1]]}, r'shape 1 of .*a\.json is a "mask" with 1 point:'),
        (
            {"label": "cup", "shape_type": "point", "points": [[1]]},
            r"shape 1 of .*a\.json does not follow the LabelMe format",
        ),
        ({"label": "cup", "shape_type": "point", "points": [[1, 51]]}, r"shape 1 of .*a\.json has a point outside"),
        ({"shape_type": "point", "points": [[1, 1]]}, r"shape 1 of .*a\.json does not follow the LabelMe format"),
    ):
        (folder / "a.json").write_text(json.dumps({"imagePath": "a.png", "shapes": [shape]}))
        with pytest.raises(PointsError, match=match):
            open_points(folder)


def test_a_folder_says_it_in_one_way(folder: Path) -> None:
    with pytest.raises(PointsError, match=r"holds no annotations: it needs points\.csv, rows\.jsonl"):
        open_points(folder)
    with pytest.raises(PointsError, match="there is no folder"):
        open_points(folder / "nowhere")
    write_csv(folder)
    (folder / "settings.json").write_text("[1]")  # of another program
    assert len(open_points(folder)[0]) == 2
    with pytest.raises(PointsError, match="at least 0 and below 1, not"):
        open_points(folder, validation=1)
    write_labelme(folder)
    with pytest.raises(PointsError, match=r"in several formats, points\.csv, LabelMe's a\.json: keep one of them"):
        open_points(folder)
