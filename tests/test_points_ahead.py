"""What the grammar of points makes near-certain: written by hand, and over random answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo_edge.frontend.coords_points import format_coords
from molmo_edge.frontend.points import format_count, format_points
from molmo_edge.frontend.points_ahead import text_ahead
from molmo_edge.frontend.prompts import asked_label, count_question, point_question

LABELS = st.sampled_from(["cup", "red cups", "the man's left hand", "Straße 5"])
PERCENT = st.integers(0, 1000).map(lambda n: n / 10)
POINTS = st.lists(st.tuples(PERCENT, PERCENT), min_size=1, max_size=12)
FRACTION = st.integers(0, 1000).map(lambda n: n / 1000)


def free_characters(text: str, label: str = "", *, coords: bool = False) -> str:
    """The characters of `text` that were not predicted when those before them were known."""
    free, at = "", 0
    while at < len(text):
        ahead = text_ahead(text[:at], label, coords=coords)
        right = next((n for n, c in enumerate(ahead) if text[at + n : at + n + 1] != c), len(ahead))
        at += right
        free, at = free + text[at : at + 1], at + 1
    return free


@pytest.mark.parametrize(
    ("text", "ahead"),
    [
        ("", ""),
        (" Count", "ing the <point"),
        (" A photo of", ""),
        (" <", "point"),
        (" <point", ' x="'),
        (" <points", ' x1="'),
        (' <point x="4', ""),
        (' <point x="45', "."),
        (' <point x="45.', ""),
        (' <point x="45.0', '" y="'),
        (' <point x="45.0" y="1.5', '" alt="cups">cups</point>'),
        (' <point x="45.0" y="1.5" alt="dogs"', ">dogs</point>"),
        (' <point x="45.0" y="1.5" alt="dogs">dogs</point>', ""),
        (' <points x1="45.0" y1="1.5', '" x2="'),
        (' <points x1="45.0" y1="1.5" a', 'lt="cups">cups</points>'),
        ('Counting the <point x="4.0" y="1.5', '" alt="cups">cups</point> shows a total of 1.'),
        ('<points x1="1.0" y1="2.0" x2="3.0" y2="4.0" alt="o">o</points> and <', ""),
        (' <point z="', ""),
    ],
)
def test_it_predicts(text: str, ahead: str) -> None:
    assert text_ahead(text, "cups") == ahead


@pytest.mark.parametrize(
    ("text", "ahead"),
    [
        ("<points", ' coords="1 1 '),
        ('<points coords="1 1 105', " "),
        ('<points coords="1 1 105 200', " 2 "),
        ('<points coords="1 1 105 200"', ">cups</points>"),
        ('<points coords="1 1 105 200;', ""),
        ('<points coords="1 1 105 200;2 ', "2 "),
        ('<points alt="all cups" coords="0.5 1 ', ""),
        ('<points coords="1 1 105 200 2 3', ""),
        ('Counting the <points coords="1 1 105 200 2 300 400">', "cups</points> shows a total of 2."),
    ],
)
def test_it_predicts_the_tags_of_molmo2(text: str, ahead: str) -> None:
    assert text_ahead(text, "cups", coords=True) == ahead


@given(POINTS, LABELS, st.booleans())
def test_only_choices_are_left(points: list[tuple[float, float]], label: str, counted: bool) -> None:
    text = (format_count if counted else format_points)(points, label)
    free = free_characters(f" {text}", label)
    digits = "".join(c for c in free if c.isdigit() or c == ".")
    # All other characters: the beginning, the plural, the end of the list.
    assert len(free) - len(digits) <= 10
    # 1.0 takes three characters, 10.5 takes three, because its point is predicted, and 100.0 takes four.
    assert len(digits) <= sum(3 + (c == 100) for point in points for c in point)


@given(st.lists(st.lists(st.tuples(FRACTION, FRACTION), min_size=1, max_size=4), min_size=1, max_size=3), LABELS)
def test_only_choices_are_left_in_molmo2(images: list[list[tuple[float, float]]], label: str) -> None:
    text = format_coords({str(n): points for n, points in enumerate(images, 1)}, label)
    free = free_characters(text, label, coords=True)
    assert len(free) <= 6 + sum(3 + 8 * len(points) for points in images)


@given(st.text(alphabet=' <points/>xy12.="alt;coords', max_size=80), st.booleans())
def test_other_texts_are_no_error(text: str, coords: bool) -> None:
    assert isinstance(text_ahead(f"<points{text}", coords=coords), str)
    assert isinstance(text_ahead(text, coords=coords), str)


@pytest.mark.parametrize("label", ["dog", "all dogs", "red cups"])
def test_the_label_is_read_from_the_question(label: str) -> None:
    assert asked_label(point_question(label)) == label
    assert asked_label(count_question(label)) == label
    assert asked_label(point_question(f"the {label}")) in (label, f"the {label}")


@pytest.mark.parametrize("question", ["", "Describe this image.", 'Point to "x".', "How many?", "Point to"])
def test_other_questions_have_no_label(question: str) -> None:
    assert asked_label(question) == ""
