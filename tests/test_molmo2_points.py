"""Points of Molmo2 and MolmoPoint against golden tables and the reference's patterns."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from molmo2_golden import GOLDEN2, read, tokenizer_of

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.frontend.coords_points import (
    extract_image_points,
    extract_tracks,
    find_coords,
    format_coords,
    format_tracks,
)
from molmo_edge.frontend.crops import ImageProcessor, stitched_patches
from molmo_edge.frontend.grounding_tokens import GroundingIds, decode_grounding
from molmo_edge.frontend.points import Point, StreamParser, parse_points
from molmo_edge.frontend.video import prepare_video

POINTS = read("molmo2_points.json")
DECODE = read("molmo_point_decode.json")


def _or_error(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except (ValueError, IndexError) as error:
        return {"error": type(error).__name__}


@pytest.mark.parametrize("row", POINTS["rows"], ids=lambda row: row["note"])
def test_points_are_those_of_the_reference(row: dict[str, Any]) -> None:
    text, width, height = row["text"], row["width"], row["height"]
    percent = _or_error(lambda: [list(point) for point in extract_image_points(text, 100, 100)])
    assert percent == row["points_percent"]
    pixels = _or_error(lambda: [list(point) for point in extract_image_points(text, width, height)])
    assert pixels == row["points_pixels"]
    if "image_sizes" in row:
        widths, heights = zip(*row["image_sizes"], strict=True)
        several = _or_error(lambda: [list(point) for point in extract_image_points(text, widths, heights)])
        assert several == row["multi_image_pixels"]
    if "tracks" in row:
        tracks = [
            {"time": moment.time, "frame": moment.frame, "points": {k: list(v) for k, v in moment.points.items()}}
            for moment in extract_tracks(text, width, height, row["video_fps"])
        ]
        assert tracks == row["tracks"]


@pytest.mark.parametrize("row", POINTS["formatted"], ids=lambda row: f"{row['format']}-{row['kind']}")
def test_points_are_written_as_by_the_reference(row: dict[str, Any]) -> None:
    scale = row["scale"] if isinstance(row["scale"], list) and len(row["scale"]) == 2 else [100, 100]
    options = {"alt": row.get("alt_text"), "separator": "\t" if row["format"] == "html-v1" else ";"}

    def fractions(points: list[list[float]]) -> list[tuple[float, float]]:
        return [(x / scale[0], y / scale[1]) for x, y in points]

    if row["kind"] == "tracks":
        moments = {
            moment["time"]: {
                name: fractions([about["point"]])[0]
                for name, about in moment["points"].items()
                if not about.get("occluded")
            }
            for moment in row["tracks"]
        }
        assert format_tracks(moments, row["label"], **options) == row["text"]
        return
    if row["kind"] == "image":
        frames = {"1": fractions(row["points"])}
    elif row["kind"] == "multi_image":
        frames = {str(i): fractions(p) for i, p in zip(row["image_indices"], row["points"], strict=True)}
    else:
        frames = {f"{t:0.1f}": fractions(p) for t, p in zip(row["timestamps"], row["points"], strict=True)}
    assert format_coords(frames, row["label"], mode=row["mode"], **options) == row["text"]


# The reference's own patterns, which may take quadratic time.
_TAG = re.compile(r"<(?:points|tracks).*? coords=\"([0-9\t:;, .]+)\"/?>")
_GROUP = re.compile(r"(?:^|\t|:|,|;)([0-9\.]+) ([0-9\. ]+)")
_POINT = re.compile(r"([0-9]+) ([0-9]{3,4}) ([0-9]{3,4})")


def _by_patterns(text: str) -> list[tuple[str, str, int, int]]:
    return [
        (group[1], point[1], int(point[2]), int(point[3]))
        for tag in _TAG.finditer(text)
        for group in _GROUP.finditer(tag[1])
        for point in _POINT.finditer(group[2])
        if int(point[2]) <= 1000 and int(point[3]) <= 1000
    ]


def test_random_texts_give_the_points_of_the_patterns() -> None:
    rng = random.Random(0)
    inside = [" ", "1", "12", "345", "1000", "99", "0.5", "\t", ";", ":", ",", "1 1 500 250", "2 2 333 444"]
    outside = ["<points", "<tracks", ' coords="', '"', "/>", ">", "cup", "\n", "</points>", ' alt="x"', "\x0b", "\r"]
    found = 0
    for number in range(4000):
        texts = [rng.choice(inside + outside) for _ in range(rng.randint(1, 25))]
        text = "".join(texts)
        if number % 2:
            text = f'<points coords="{"".join(rng.choice(inside) for _ in range(rng.randint(1, 25)))}">{text}'
        got = [tuple(point) for tag in find_coords(text) for point in tag.points]
        assert got == _by_patterns(text), text
        found += len(got)
    assert found > 1000


def _pieces(rng: random.Random, text: str) -> list[str]:
    cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 6)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def test_streamed_texts_give_the_points_of_the_reference() -> None:
    rng = random.Random(1)
    texts = [row["text"] for row in POINTS["rows"]]
    begins, attributes = (
        ["<points", "<tracks", "<b", "cup", "\n"],
        [' coords="1 1 500 250">', ' coords="', "2 2 333 444;", '">'],
    )
    parts = begins + attributes * 2 + ["/>", " "]
    texts += ["".join(rng.choice(parts) for _ in range(rng.randint(2, 20))) for _ in range(2000)]
    found = regular = 0
    for text in texts:
        expected = [(frame, x / 10, y / 10) for frame, _, x, y in _by_patterns(text)]
        for pieces in ([text], list(text), _pieces(rng, text)):
            points = _streamed(pieces)
            whole = [replace(point, label="") for point in parse_points(text)]
            got = [(p.x, p.y) for p in whole if p.image is not None or p.time is not None]
            assert got == [(x, y) for frame, x, y in expected if frame.count(".") < 2], text
            # A tag that does not close regularly has points only in a stream.
            rest = iter(points)
            assert all(point in rest for point in whole), (text, pieces)
            assert points == _streamed(list(text)), pieces
            if text.count(" coords=") == len(list(find_coords(text))):
                assert points == whole, (text, pieces)
                regular += 1
        found += len(expected)
    assert found > 300
    assert regular > 300


def _streamed(pieces: Iterable[str]) -> list[Point]:
    parser = StreamParser()
    return [point for piece in pieces for point in parser.feed(piece)] + parser.close()


bodies = st.text(alphabet="0123 ;.", max_size=30) | st.lists(
    st.sampled_from(["1", " ", "12", "345", "1000", "99", "0.5", ";", ",", "1 1 500 250", "2 2 333 444"])
).map("".join)


@given(bodies)
def test_a_point_comes_when_no_continuation_changes_it(body: str) -> None:
    """What a stream has returned is what all continuations of the attribute have in common."""
    parser, got = StreamParser(), _streamed(['<points coords="'])
    parser.feed('<points coords="')
    for end in range(len(body) + 1):
        got += parser.feed(body[end - 1 : end]) if end else []
        answers = [
            [replace(point, label="") for point in parse_points(f'<points coords="{body[:end]}{more}">a</points>')]
            for more in ("", "0", "9", "00", " ", ".", ";", " 1")
        ]
        common = [points[0] for points in zip(*answers, strict=False) if len(set(points)) == 1]
        assert got == common[: len(got)]
        if end:
            assert got == common, body[:end]


def test_points_come_before_their_tag_closes() -> None:
    parser = StreamParser()
    assert parser.feed('There are 3 <points alt="a" coords="1 1 100 200') == []
    assert parser.feed(" ") == [Point(10, 20, image=1)]
    assert parser.feed("2 1000 1000") == [Point(100, 100, image=1)]  # no number has five digits
    assert parser.feed(";2 3 300 40") == []
    assert parser.feed("0;3.5 4 005 006") == [Point(30, 40, image=2)]
    assert parser.feed('"') == [Point(0.5, 0.6, time=3.5)]
    assert parser.feed(">cups</points>") == parser.close() == []


@pytest.mark.parametrize("end", ["", '"', '" >', "x", '" alt="a">cups</points>', "\n"])
def test_a_tag_that_is_cut_off_or_malformed_counts_in_a_stream_only(end: str) -> None:
    text = f'<points coords="1 1 100 200 2 300 400 {end}'
    points = [Point(10, 20, image=1), Point(30, 40, image=1)]
    assert _streamed([text]) == _streamed(text) == points
    assert parse_points(text) == []


def test_a_tag_after_a_malformed_one_counts() -> None:
    text = '<points coords="1 1 100 200 coords="1 2 300 400">cups</points> (5.0, 6.0)'
    assert parse_points(text) == [Point(30, 40, "cups", image=1), Point(5, 6)]
    assert _streamed(text) == [Point(10, 20, image=1), Point(30, 40, image=1), Point(5, 6)]


def test_a_frame_with_thousands_of_digits_is_no_image() -> None:
    assert parse_points(f'<points coords="{"1" * 5000} 1 100 200">a</points>') == [Point(10, 20, "a")]


@pytest.mark.parametrize(("frame", "video"), [("1" * 400, True), ("1" * 400 + ".5", False)])
def test_a_time_of_hundreds_of_digits_is_no_time(frame: str, video: bool) -> None:
    """As a float it is infinite, which JSON does not have."""
    text = f'<points coords="{frame} 1 100 200">a</points>'
    assert parse_points(text, video=video) == [Point(10, 20, "a")]
    assert StreamParser(video=video).feed(text) == [Point(10, 20)]


def test_points_carry_label_image_and_time() -> None:
    text = 'There are 3 <points alt="a cup" coords="1 1 100 200;2 2 300 400 3 1000 000">cups</points>.'
    assert parse_points(text) == [
        Point(10, 20, "cups", image=1),
        Point(30, 40, "cups", image=2),
        Point(100, 0, "cups", image=2),
    ]
    assert parse_points('<tracks coords="0.5 1 259 340">car</tracks>') == [Point(25.9, 34, "car", time=0.5)]
    assert parse_points('<points alt="a cup" coords="1 1 100 200"/>') == [Point(10, 20, "a cup", image=1)]


@pytest.mark.parametrize(
    "text",
    [
        "<points" * 100_000,
        "<points\n" * 100_000,
        '<points\n coords="1 1 100 200">' * 20_000,
        ' coords="1' * 100_000,
        f'<points coords="{"1" * 500_000}">',
        f'<points coords="1 {"1" * 500_000}">',
        f'<points coords="{"1 " * 250_000}">',
        f'<points coords="{"1 1 1 " * 100_000}',
    ],
    ids=["tags", "lines", "lines with coords", "coords", "digits", "id", "numbers", "open"],
)
def test_hostile_texts_take_linear_time(text: str) -> None:
    """In quadratic time each would take many minutes, and pytest's timeout fails the test."""
    list(find_coords(text))
    parse_points(text)
    _streamed(text[at : at + 7] for at in range(0, len(text), 7))


CONFIG = read_config(GOLDEN2 / "molmo_point").image


def _prepared(row: dict[str, Any]) -> tuple[np.ndarray, list[np.ndarray]]:
    process = ImageProcessor(replace(CONFIG, max_crops=row["max_crops"]), tokenizer_of("molmo_point").special)
    offset, pooling, grids = 0, [], []
    for width, height in row["image_sizes"]:
        image = process(np.zeros((height, width, 3), np.uint8))
        assert image.pooling is not None
        pooling.append(np.where(image.pooling < 0, -1, image.pooling + offset))
        grids.append(stitched_patches(CONFIG, image.tiling) + offset)
        offset += image.crops.shape[0] * image.crops.shape[1]
    return np.concatenate(pooling), grids


@pytest.mark.parametrize("row", DECODE["image_points"], ids=lambda row: row["note"])
def test_grounding_tokens_of_images_decode_as_by_the_reference(row: dict[str, Any]) -> None:
    pooling, grids = _prepared(row)
    sizes, has_class = row["image_sizes"], row["no_more_points_class"]

    def decode() -> list[list[float]]:
        points = decode_grounding(row["text"], pooling, grids, no_more_class=has_class, strict=True)
        return [[p.id, p.frame, p.x * sizes[p.frame][0], p.y * sizes[p.frame][1]] for p in points]

    got = _or_error(decode)
    if isinstance(row["points"], dict):
        assert got == row["points"]
    else:
        np.testing.assert_allclose(np.reshape(got, (-1, 4)), np.reshape(row["points"], (-1, 4)), rtol=0, atol=1e-6)
    for point in decode_grounding(row["text"], pooling, grids, no_more_class=has_class):  # never raises
        assert 0 <= point.x <= 1
        assert 0 <= point.y <= 1


@pytest.mark.parametrize("row", DECODE["video_points"], ids=lambda row: row["note"])
def test_grounding_tokens_of_videos_decode_as_by_the_reference(row: dict[str, Any]) -> None:
    width, height = row["video_size"]
    blank = np.zeros((height, width, 3), np.uint8)
    frames = prepare_video([blank] * row["frames"], row["timestamps"], CONFIG)
    grids = [np.arange(729).reshape(27, 27) + 729 * number for number in range(row["frames"])]
    points = decode_grounding(row["text"], frames.pooling, grids)
    got = [[p.id, row["timestamps"][p.frame], p.x * width, p.y * height] for p in points]
    np.testing.assert_allclose(got, row["points"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("row", DECODE["token_order"], ids=lambda row: row["note"])
def test_order_of_grounding_tokens_is_that_of_the_reference(row: dict[str, Any]) -> None:
    ids = GroundingIds(
        row["vocab"], row["n_patches"], row["n_subpatches"], row["n_locations"], row["no_more_points_class"]
    )
    allowed = ids.allowed(
        row["history"],
        repeats=not row["prevent_repeats"],
        patch_order=row["force_patch_sorted"],
        slot_order=row["force_subpatch_sorted"],
    )
    if "error" in row:  # a history that this order cannot produce: nothing may follow
        assert all(start >= stop for start, stop in allowed)
    else:
        assert [list(interval) for interval in allowed] == row["allowed"]
