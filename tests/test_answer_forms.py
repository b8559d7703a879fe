"""An answer as SVG, as COCO keypoints, and for supervision."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from molmo_edge import Answer, Point
from molmo_edge.answer import DrawError, DrawingError, to_coco
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.sdk.shown import Shown

SVG = "{http://www.w3.org/2000/svg}"
PHOTO = np.full((300, 400, 3), 90, np.uint8)
TWO = (Point(25, 50, "dog"), Point(75, 20, "cat"), Point(50, 50, "dog"))
HOSTILE = ("</title><script>alert(1)</script>", '" onload="x', "a & b", "\x00\x1b[31m\u202e\ud800\uffff", "]]>", "<!--")


def words(root: ET.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def test_an_svg_has_the_picture_the_points_and_a_description() -> None:
    root = ET.fromstring(Answer("", TWO, image=PHOTO).to_svg())
    assert (root.get("viewBox"), root.get("role")) == ("0 0 400 300", "img")
    named = {element.get("id"): element.text for element in root if element.get("id")}
    title, description = (named[name] for name in (root.get("aria-labelledby") or "").split())
    assert title == "3 points: 2 dog, 1 cat"
    assert description == "1 dog at x 100, y 150; 2 cat at x 300, y 60; 3 dog at x 200, y 150"
    (image,) = root.iter(f"{SVG}image")
    data = (image.get("href") or "").removeprefix("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as embedded:
        assert embedded.size == (400, 300)
    groups = [group for group in root.iter(f"{SVG}g") if group.get("class") == "point"]
    assert sorted(group.get("data-number") or "" for group in groups) == ["1", "2", "3"]
    for group in groups:
        point = TWO[int(group.get("data-number") or 0) - 1]
        circle = group.find(f"{SVG}circle")
        assert circle is not None
        assert [float(circle.get(name) or 0) for name in ("cx", "cy")] == pytest.approx(point.pixel(400, 300))
    assert sorted(words(root)) == ["1", "2", "3", "cat", "dog"]


def test_an_svg_links_to_a_picture_or_has_none() -> None:
    answer = Answer("", TWO, image=PHOTO)
    (image,) = ET.fromstring(answer.to_svg(href='a "b" & <c>.jpg')).iter(f"{SVG}image")
    assert image.get("href") == 'a "b" & <c>.jpg'
    assert not list(ET.fromstring(answer.to_svg(embed=False)).iter(f"{SVG}image"))
    assert ET.fromstring(Answer("", image=PHOTO).to_svg()).find(f"{SVG}title") is not None
    assert words(ET.fromstring(answer.to_svg(labels="none", numbers=False))) == []
    with pytest.raises(DrawingError):
        answer.to_svg(labels="some")
    with pytest.raises(DrawError):
        Answer("", TWO).to_svg()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=30)), min_size=1, max_size=4))
def test_labels_cannot_break_out_of_an_svg(labels: list[str]) -> None:
    points = tuple(Point(20 * n + 5, 50, label) for n, label in enumerate(labels))
    svg = Answer("", points, image=PHOTO).to_svg(embed=False)
    svg.encode("utf-8")
    root = ET.fromstring(svg)
    allowed = {"svg", "title", "desc", "g", "circle", "rect", "path", "text"}
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= allowed
    assert not [name for element in root.iter() for name in element.attrib if name.startswith("on")]


def test_two_svgs_in_a_page_have_different_ids() -> None:
    first, second = (Answer("", (point,), image=PHOTO).to_svg(embed=False) for point in TWO[:2])
    ids = [{element.get("id") for element in ET.fromstring(svg).iter()} - {None} for svg in (first, second)]
    assert len(ids[0]) == 2
    assert not ids[0] & ids[1]


def test_coco_of_several_answers() -> None:
    wide = np.zeros((100, 1000, 3), np.uint8)
    answers = [
        Answer("", TWO, image=PHOTO),
        Answer("none", image=PHOTO),
        Answer("", (Point(10, 10, "cat"),), image=wide),
    ]
    data = json.loads(json.dumps(to_coco(answers, ["a.jpg", "b.jpg", "c/d.png"])))
    assert [(image["id"], image["file_name"], image["width"]) for image in data["images"]] == [
        (1, "a.jpg", 400),
        (2, "b.jpg", 400),
        (3, "c/d.png", 1000),
    ]
    names = {category["id"]: category["name"] for category in data["categories"]}
    found = [(a["image_id"], names[a["category_id"]], a["keypoints"]) for a in data["annotations"]]
    assert found == [
        (1, "dog", [100, 150, 2]),
        (1, "cat", [300, 60, 2]),
        (1, "dog", [200, 150, 2]),
        (3, "cat", [100, 10, 2]),
    ]
    assert len({annotation["id"] for annotation in data["annotations"]}) == 4
    assert Answer("", TWO, image=PHOTO).to_coco("a.jpg")["annotations"] == data["annotations"][:3]
    with pytest.raises(ValueError, match="zip"):
        to_coco(answers, ["a.jpg"])
    with pytest.raises(DrawError):
        to_coco([Answer("", TWO)], ["a.jpg"])


def test_coco_of_an_answer_about_several_images() -> None:
    wide = np.zeros((100, 1000, 3), np.uint8)
    points = (Point(25, 50, "dog", image=1), Point(10, 10, "cat", image=2))
    answer = Answer("", points, image=PHOTO, shown=Shown((PHOTO, wide)))
    data = answer.to_coco(["a.jpg", "b.jpg"])
    assert [(image["file_name"], image["width"]) for image in data["images"]] == [("a.jpg", 400), ("b.jpg", 1000)]
    assert [(a["image_id"], a["keypoints"]) for a in data["annotations"]] == [(1, [100, 150, 2]), (2, [100, 10, 2])]
    with pytest.raises(DrawError, match="2 images"):
        answer.to_coco("a.jpg")
    with pytest.raises(ValueError, match="zip"):
        answer.to_coco(["a.jpg"])


def test_coco_loads_in_pycocotools(tmp_path: Path) -> None:
    tools = pytest.importorskip("pycocotools.coco")
    path = tmp_path / "points.json"
    path.write_text(json.dumps(Answer("", TWO, image=PHOTO).to_coco("a.jpg")))
    coco = tools.COCO(str(path))
    (dog,) = coco.getCatIds(catNms=["dog"])
    found = coco.loadAnns(coco.getAnnIds(imgIds=[1], catIds=[dog]))
    assert [annotation["keypoints"] for annotation in found] == [[100, 150, 2], [200, 150, 2]]


@pytest.mark.filterwarnings("ignore:OpenCV")
def test_supervision_has_the_points() -> None:
    sv = pytest.importorskip("supervision")
    found = Answer("", TWO, image=PHOTO).to_supervision()
    assert isinstance(found, sv.KeyPoints)
    assert found.xy.tolist() == [[[100, 150]], [[300, 60]], [[200, 150]]]
    assert found.class_id is not None
    assert found.class_id.tolist() == [0, 1, 0]
    assert list(found[found.class_id == 0].data["class_name"]) == ["dog", "dog"]
    drawn = sv.VertexAnnotator(radius=9).annotate(PHOTO.copy(), found)
    assert np.argwhere((drawn != PHOTO).any(2)).mean(0) == pytest.approx((120, 200), abs=1)
    assert len(Answer("", image=PHOTO).to_supervision()) == 0
    two = Answer("", (Point(25, 50, "dog", image=2),), image=PHOTO, shown=Shown((PHOTO, PHOTO)))
    assert [len(two.to_supervision(image)) for image in (1, 2)] == [0, 1]


def test_without_supervision_the_error_names_its_extra() -> None:
    code = (
        "import sys; sys.modules['supervision'] = None\n"
        "import numpy as np\nfrom molmo_edge import Answer\nfrom molmo_edge.errors import MolmoEdgeError\n"
        "try:\n    Answer('', image=np.zeros((2, 2, 3), np.uint8)).to_supervision()\n"
        "except MolmoEdgeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'to_supervision needs supervision: pip install "molmo-edge[supervision]"' in done.stdout, done.stderr
    assert issubclass(DrawingError, MolmoEdgeError)
