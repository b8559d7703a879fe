"""Drawing: labels inside the picture and clear of each other, readable on any ground, at any size."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from molmo_edge import Answer, Point
from molmo_edge.answer import DrawingError, draw_points
from molmo_edge.sdk.annotation import COLOURS, Annotation, DrawOptions, annotate
from molmo_edge.sdk.placement import Box, Request, place

LABELS = ("dog", "a cup of coffee", "Ägypten", "x", "person in a red coat", "")
points = st.lists(
    st.builds(Point, st.floats(0, 100), st.floats(0, 100), st.sampled_from(LABELS)), min_size=1, max_size=40
)
sizes = st.tuples(st.integers(40, 1500), st.integers(40, 1500))


def laid_out(size: tuple[int, int], found: list[Point], options: DrawOptions | None = None) -> Annotation:
    return annotate(*size, list(enumerate(found, 1)), found, options)


def inside(box: Box, size: tuple[int, int]) -> bool:
    return box.left >= 0 and box.top >= 0 and box.right <= size[0] and box.bottom <= size[1]


@settings(max_examples=60, deadline=None)
@given(size=sizes, found=points, labels=st.sampled_from(("once", "each", "none")))
def test_everything_is_in_the_picture_and_every_point_has_its_marker(
    size: tuple[int, int], found: list[Point], labels: str
) -> None:
    annotation = laid_out(size, found, DrawOptions(labels=labels))
    assert all(inside(plate.box, size) for plate in annotation.plates)
    for number, (point, marker) in enumerate(zip(found, annotation.markers, strict=True), 1):
        x, y = point.pixel(*size)
        assert math.hypot(marker.x - x, marker.y - y) <= math.sqrt(2) + 1e-6  # 100 percent is the last pixel
        assert (marker.number, marker.text or str(number)) == (number, str(number))
    written = [plate.text for plate in annotation.plates if not plate.text.isdigit()]
    if min(size) >= 120 and size[0] >= 200:
        wanted = {"once": list(dict.fromkeys(p.label for p in found)), "each": [p.label for p in found], "none": []}
        assert sorted(written) == sorted(label for label in wanted[labels] if label)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), width=st.integers(100, 3000), height=st.integers(100, 3000))
def test_boxes_are_apart_where_there_is_room(data: st.DataObject, width: int, height: int) -> None:
    """With room for certain: what the boxes and discs block, plus two steps of the search, is less than the picture."""
    within = st.tuples(st.floats(0, width), st.floats(0, height))
    wide, high, radius = data.draw(st.floats(10, width / 6)), data.draw(st.floats(5, height / 8)), 4.0
    corners = data.draw(st.lists(within, min_size=1, max_size=6))
    requests = [Request(wide, high, (corner,), 8) for corner in corners]
    discs = np.array([(x, y, radius) for x, y in corners])
    step_x, step_y = width / 47, height / 47
    by_box = (2 * wide + 4 + 2 * step_x) * (2 * high + 4 + 2 * step_y)
    by_disc = (wide + 2 * radius + 2 * step_x) * (high + 2 * radius + 2 * step_y)
    boxes = [found.box for found in place(requests, discs, (width, height))]
    assert all(inside(box, (width + 1e-6, height + 1e-6)) for box in boxes)  # type: ignore[arg-type]
    if len(corners) * (by_box + by_disc) < (width - wide) * (height - high):
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        for box, (x, y, r) in itertools.product(boxes, discs):
            assert not box.overlaps(Box(x - r, y - r, x + r, y + r))


def test_a_box_goes_far_away_when_nothing_near_is_free() -> None:
    xs, ys = np.meshgrid(np.arange(100, 500, 8.0), np.arange(80, 330, 8.0))
    discs = np.stack([xs.ravel(), ys.ravel(), np.full(xs.size, 5.0)], -1)
    (found,) = place([Request(60, 12, ((300, 200),), 6)], discs, (600, 400))
    assert inside(found.box, (600, 400))
    assert not any(found.box.overlaps(Box(x - r, y - r, x + r, y + r)) for x, y, r in discs)
    assert found.anchor == (300, 200)


def test_as_many_candidates_as_the_grid_has_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(60, 12, ((150, 100), (450, 300)), 6)
    discs = np.array([(150.0, 100.0, 5.0), (450.0, 300.0, 5.0), *((x, 100.0, 5.0) for x in range(160, 240, 8))])
    expected = place([request], discs, (600, 400))
    monkeypatch.setattr("molmo_edge.sdk.placement.GRID", 16)  # 256 positions; two anchors have 256 candidates in rings
    assert place([request], discs, (600, 400)) == expected


def test_a_label_goes_beside_its_point() -> None:
    (plate,) = laid_out((640, 480), [Point(30, 40, "dog")]).plates
    assert plate.box.left > 0.3 * 640
    assert plate.box.top < 0.4 * 480 < plate.box.bottom
    assert not plate.leader
    (plate,) = laid_out((640, 480), [Point(99, 40, "a label that is long")]).plates
    assert plate.box.right <= 640
    assert math.dist(plate.box.nearest(*plate.anchor), plate.anchor) < 40


@pytest.mark.parametrize("colour", COLOURS)
def test_white_letters_are_readable_on_every_colour(colour: tuple[int, int, int]) -> None:
    """By the formula of WCAG 2.2: 4.5 for letters."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour)]
    luminance = sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    assert 1.05 / (luminance + 0.05) >= 4.5


@pytest.mark.parametrize("ground", [(255, 255, 255), (0, 0, 0), COLOURS[0], (128, 128, 128)])
def test_a_marker_differs_from_any_ground(ground: tuple[int, int, int]) -> None:
    """Around every marker lies a pixel that is much lighter or darker than the ground."""
    drawn = draw_points(Image.new("RGB", (300, 200), ground), [Point(50, 50, "dog"), Point(20, 20, "dog")])
    for x, y in ((150, 100), (60, 40)):
        part = np.asarray(drawn.convert("L"), int)[y - 12 : y + 13, x - 12 : x + 13]
        before = int(np.asarray(Image.new("RGB", (1, 1), ground).convert("L"))[0, 0])
        assert np.abs(part - before).max() >= 75


@pytest.mark.parametrize(("size", "least"), [((200, 150), 8), ((640, 480), 9), ((6000, 4000), 60)])
def test_sizes_follow_the_picture(size: tuple[int, int], least: float) -> None:
    annotation = laid_out(size, [Point(30, 30, "dog"), Point(60, 60, "dog")])
    assert all(least <= marker.radius <= max(size) / 20 for marker in annotation.markers)
    assert all(plate.letters >= 10 for plate in annotation.plates)
    twice = laid_out(size, [Point(30, 30, "dog"), Point(60, 60, "dog")], DrawOptions(size=2))
    assert twice.markers[0].radius == pytest.approx(2 * annotation.markers[0].radius)


def test_numbers_only_among_several() -> None:
    assert [m.text for m in laid_out((640, 480), [Point(50, 50, "a")]).markers] == [""]
    assert [m.text for m in laid_out((640, 480), [Point(50, 50, "a")], DrawOptions(numbers=True)).markers] == ["1"]
    two = [Point(50, 50, "a"), Point(20, 20, "a")]
    assert [m.text for m in laid_out((640, 480), two).markers] == ["1", "2"]
    assert [m.text for m in laid_out((640, 480), two, DrawOptions(numbers=False)).markers] == ["", ""]


def test_a_number_without_room_is_written_beside_its_point() -> None:
    """Two points in one place, and one in a corner."""
    annotation = laid_out((640, 480), [Point(50, 50), Point(50, 50), Point(0, 0)])
    assert [marker.text for marker in annotation.markers] == ["1", "", ""]
    assert sorted(plate.text for plate in annotation.plates) == ["2", "3"]
    assert all(plate.leader for plate in annotation.plates)


def test_many_points() -> None:
    rng = random.Random(0)
    found = [Point(rng.uniform(0, 100), rng.uniform(0, 100), "item") for _ in range(150)]
    annotation = laid_out((1024, 768), found)
    texts = [marker.text for marker in annotation.markers if marker.text]
    texts += [plate.text for plate in annotation.plates if plate.text.isdigit()]
    assert sorted(texts, key=int) == [str(number) for number in range(1, 151)]  # each number is somewhere
    boxes = [plate.box for plate in annotation.plates]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    crowd = laid_out((120, 90), found)  # no room for numbers: dots
    assert not any(marker.text for marker in crowd.markers)
    assert all(marker.radius < 5 for marker in crowd.markers)


@pytest.mark.parametrize("side", [9, 13])
@pytest.mark.parametrize("where", [(50, 50), (30, 30)])
def test_a_leader_is_whole(side: int, where: tuple[int, int]) -> None:
    """Among more than 100 shapes it is drawn in strips."""
    grid = [(where[0] + 2 * x, where[1] + 3 * y) for x in range(side) for y in range(side)]
    found = [Point(x, y, "") for x, y in grid if x < 100 and y < 100]
    found.append(Point(where[0] + side, where[1] + 1.5 * side, "a long label of an item"))
    size, options = (1800, 1200), DrawOptions(numbers=False)
    annotation = laid_out(size, found, options)
    (plate,), markers = annotation.plates, annotation.markers
    assert plate.leader
    (x0, y0), (x1, y1) = plate.anchor, plate.box.nearest(*plate.anchor)
    assert math.hypot(x1 - x0, y1 - y0) > 80
    picture = np.asarray(draw_points(Image.new("RGB", size), found, options), int)
    seen = 0
    for share in np.linspace(0, 1, 400):
        x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
        beside_plate = not Box(x - 4, y - 4, x + 4, y + 4).overlaps(plate.box)
        if beside_plate and all(math.hypot(m.x - x, m.y - y) > 1.2 * m.radius + 4 for m in markers):
            seen += 1
            assert np.abs(picture[round(y), round(x)] - plate.colour).max() < 60
    assert seen > 20


def test_points_outside_of_the_picture_are_left_out() -> None:
    found = [Point(120, 50, "a"), Point(50, -3, "b"), Point(math.nan, 5, "c"), Point(50, 50, "d")]
    annotation = laid_out((640, 480), found)
    assert [(marker.number, marker.text) for marker in annotation.markers] == [(4, "4")]
    draw_points(Image.new("RGB", (64, 48)), found)


def test_options_of_draw() -> None:
    answer = Answer("", (Point(50, 50, "dog"), Point(20, 20, "dog")), image=np.zeros((300, 400, 3), np.uint8))
    plain = answer.draw()
    assert answer.draw(labels="once", numbers=None, size=1).tobytes() == plain.tobytes()
    for other in (answer.draw(labels="each"), answer.draw(labels="none"), answer.draw(numbers=False)):
        assert other.tobytes() != plain.tobytes()
    for wrong in ({"labels": "all"}, {"size": 0}, {"size": math.nan}, {"size": "big"}, {"numbers": "yes"}):
        with pytest.raises(DrawingError, match=next(iter(wrong))):
            answer.draw(**wrong)  # type: ignore[arg-type]
