"""Points: golden extraction and formatting, streamed against whole, hostile text."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo_edge.frontend.points import (
    Point,
    StreamParser,
    extract_points,
    format_count,
    format_points,
    parse_count,
    parse_points,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "points.json").read_text(encoding="utf-8"))

FRAGMENTS = [
    '<point x="10.0" y="20.0" alt="cup">cup</point>',
    '<points x1="1.0" y1="2.0" x2="3" y2="4.25" alt="m">many cups</points>',
    '<point x=" 61.2"\n y="101" alt="a > b">a > b</point>',
    '<point p=123,456 alt="t">t</point>',
    "Click(12.3, 45.6)",
    "(7.0, 8.0)",
    "(12.34.5)",
    "1=012,999 2=500,500",
    "<point",
    "<points x1=",
    '<p="5.0" y="6.0"',
    'x="5.0" y="6.0"',
    '" y2="7.0"',
    "</point>",
    " shows a total of 2.",
    "<",
    ">",
    "１=123,456",
]
answers = st.lists(st.sampled_from(FRAGMENTS) | st.text(alphabet="<>pointsxy=\"' ,.()0123459\naé", max_size=12)).map(
    "".join
)
coordinates = st.integers(0, 1000).map(lambda tenths: tenths / 10)
labels = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<&"), min_size=1).map(str.strip).filter(bool)


@pytest.mark.parametrize("case", GOLDEN["extract"], ids=lambda case: f"{case['text'][:40]}@{case['width']}")
def test_extraction_equals_the_reference_exactly(case):
    found = extract_points(case["text"], case["width"], case["height"])
    assert [list(point) for point in found] == case["points"]


@pytest.mark.parametrize("case", GOLDEN["format"], ids=lambda case: case["label"])
def test_formatting_equals_the_reference_exactly(case):
    scale = case["scale"] if isinstance(case["scale"], list) else [case["scale"] / 100] * 2
    points = [(x / scale[0], y / scale[1]) for x, y in case["points"]]
    assert format_points(points, case["label"]) == case["text"]


def reference_scan(text: str) -> Counter:
    """The reference's four patterns as published, in percent, without the second match of Click."""
    found: Counter = Counter()
    for pattern, unit in (
        (r"\(([0-9]+\.[0-9]),? ?([0-9]+\.[0-9])\)", 1),
        (r'x\d*="\s*([0-9]+(?:\.[0-9]+)?)"\s+y\d*="\s*([0-9]+(?:\.[0-9]+)?)"', 1),
        (r"(?:\d+|p)\s*=\s*([0-9]{3})\s*,\s*([0-9]{3})", 10),
    ):
        for match in re.finditer(pattern, text):
            x, y = float(match[1]) / unit, float(match[2]) / unit
            if max(x, y) <= 100:
                found[x, y] += 1
    return found


@given(answers)
def test_finds_what_the_reference_finds_each_point_once(text):
    assert Counter((p.x, p.y) for p in parse_points(text)) == reference_scan(text)


def unlabelled(text):
    return [replace(point, label="") for point in parse_points(text)]


@given(answers, st.randoms(use_true_random=False))
def test_streamed_equals_whole_but_for_labels(text, random):
    whole = unlabelled(text)
    parser = StreamParser()
    assert [p for char in text for p in parser.feed(char)] + parser.close() == whole
    parser, streamed, start = StreamParser(), [], 0
    while start < len(text):
        size = random.randint(1, 20)
        streamed += parser.feed(text[start : start + size])
        start += size
    assert streamed + parser.close() == whole


@given(answers)
def test_a_point_comes_with_its_last_character(text):
    parser, streamed = StreamParser(), []
    for end in range(1, len(text) + 1):
        streamed += parser.feed(text[end - 1])
        assert streamed == unlabelled(text[:end])


def test_points_come_before_their_tag_closes():
    parser = StreamParser()
    assert parser.feed('The <point x="10.0" y="20.0') == []
    assert parser.feed('"') == [Point(10.0, 20.0)]
    assert parser.feed(' alt="red cup">cup</point> and Click(1.0, 2.0') == []
    assert parser.feed(")") == [Point(1.0, 2.0)]
    assert parser.feed(' then <points x1="5.0" y1="6.0" x2="7.0" y2="8.0') == [Point(5.0, 6.0)]
    assert parser.feed('" alt="a"') == [Point(7.0, 8.0)]  # the answer is cut off here
    assert parser.close() == []


def test_order_is_that_of_the_text():
    text = 'p=100,100 (20.0, 20.0) <point x="30.0" y="30.0" alt="c">c</point> Click(40.0, 40.0)'
    assert [p.x for p in parse_points(text)] == [10.0, 20.0, 30.0, 40.0]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ('<point x="1.0" y="2.0" alt="left ear of the dog">ear</point>', "ear"),
        ('<point x="1.0" y="2.0" alt="ear"></point>', "ear"),
        ('<point x="1.0" y="2.0" alt="ear"', "ear"),
        ('<point x="1.0" y="2.0">', ""),
        ('<point x="1.0" y="2.0" alt="say &quot;hi&quot;">say &quot;hi&quot;</point>', 'say "hi"'),
        ('<point x="1.0" y="2.0" alt="a > b">a > b</point>', "a > b"),
        ('<point x="1.0" y="2.0" alt="5" pipe">5" pipe</point>', '5" pipe'),
        ('<point x="1.0" y="2.0" alt=">">></point>', ">"),
        ('<points 1=010,020 alt="cups">cups</points>', "cups"),
    ],
)
def test_labels(text, label):
    assert parse_points(text) == [Point(1.0, 2.0, label)]


@given(st.lists(st.tuples(coordinates, coordinates), min_size=1, max_size=30), labels)
def test_formatted_points_parse_back(points, label):
    quoted = '">' in "".join(label.split()) or re.search(
        r"[\d=(]", label
    )  # would be parsed as the end of the tag, or as a point
    parsed = parse_points(format_points(points, label))
    assert [(p.x, p.y) for p in parsed][: len(points)] == sorted(points, key=lambda xy: xy[0] * 10000 + xy[1])
    if not quoted:
        assert [p.label for p in parsed] == [label] * len(points)


def test_formatting_of_none_and_of_counts():
    assert format_points([], "cup") == format_count([], "cup") == "There are none."
    assert format_count([Point(1, 2), (3, 4)], "cups") == (
        'Counting the <points x1="1.0" y1="2.0" x2="3.0" y2="4.0" alt="cups">cups</points> shows a total of 2.'
    )
    # -0 would be formatted with its sign, which no pattern matches.
    text = format_points([(-0.0, 2), (-0.04, 3)], "ear")
    assert text == '<points x1="0.0" y1="2.0" x2="0.0" y2="3.0" alt="ear">ear</points>'
    assert format_points([(1, 2)], "ear", alt="left ear") == '<point x="1.0" y="2.0" alt="left ear">ear</point>'


def test_pixels():
    assert Point(50.0, 25.0).pixel(640, 480) == (320.0, 120.0)


N = 100_000
HOSTILE = {
    "digits": "1" * N,
    "digits, equals": "1" * N + "=",
    "attributes": 'x1="1.0" ' * (N // 9),
    "one attribute of digits": 'x="' + "1" * N,
    "spaces": 'x="1.0"' + " " * N,
    "tenths of spaces": "p=123" + " " * N,
    "spaces and equals": ("1" + " " * 300 + "=") * (N // 302),
    "pairs": "(1.0," * (N // 5),
    "pair of digits": "(" + "1" * N + ".0, 1.0)",
    "parentheses": "()" * (N // 2),
    "angles": "<" * N,
    "tags": "<point " * (N // 7),
    "half tags": "<poin" * (N // 5),
    "quotes": "<point " + '"' * N,
    "quoted spaces": "<point " + ('"' + " " * 99) * (N // 100),
    "alts": "<point " + 'alt="' * (N // 5),
    "letters": "a" * N,
    "counts": "a total of " * (N // 11),
    "total of digits": "a total of " + "1" * N,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_takes_linear_time(text):
    started = time.process_time()
    parse_points(text)
    extract_points(text, 640, 480)
    parse_count(text)
    assert time.process_time() - started < 1
    half, parser = text[: N // 2], StreamParser()
    expected, started = unlabelled(half), time.process_time()
    assert [p for char in half for p in parser.feed(char)] == expected
    assert time.process_time() - started < 2  # 50,000 calls


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("3", 3),
        ("There are 12.", 12),
        ("Seven", 7),
        ("twenty.", 20),
        ("Counting the <points ...>cups</points> shows a total of 14.", 14),
        ("It shows a total of 5 cups on the table", 5),
        ("There are none.", 0),  # the reference intends 0 but does not find it
        ("None of them are cups", 0),
        ("zero", 0),
        ("-3", None),
        ("nonesuch", None),
        ("a dog", None),
        ("", None),
        ("...", None),
        ("9" * 5000, None),
    ],
)
def test_counts(text, count):
    assert parse_count(text) == count
