"""The embedded bundle is present, small, and answers as at its export."""

from __future__ import annotations

from pathlib import Path

import pytest

from molmo_edge import Molmo
from molmo_edge.checkpoints.bundle import default_bundle, open_bundle
from molmo_edge.presets import PRESETS

EXAMPLES = Path(__file__).parent.parent / "examples"
MOST_BYTES = 64_000_000


def test_it_is_small_and_of_the_presets_shape() -> None:
    directory = default_bundle()
    assert sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) <= MOST_BYTES
    assert open_bundle(directory, hashes=True).config == PRESETS["nano"]


def test_the_readmes_question_gets_a_true_answer() -> None:
    """The picture shows one cup, in its middle."""
    with Molmo() as molmo:
        answer = molmo.count(EXAMPLES / "coffee.jpg", "cups")
    assert answer.count == 1
    assert answer.text.startswith("Counting the <point ")
    assert answer.text.endswith("shows a total of 1.")
    (point,) = answer.points
    assert 25 <= point.x <= 75
    assert 5 <= point.y <= 75


@pytest.mark.parametrize(("max_crops", "crops"), [(0, 1), (1, 2), (4, 5), (12, 13)])
def test_fewer_and_more_crops_than_its_own(max_crops: int, crops: int) -> None:
    with Molmo(max_crops=max_crops) as molmo:
        answer = molmo.ask(EXAMPLES / "coffee.jpg", "How many cups are there?")
    assert answer.usage.crops == crops
    assert answer.text
