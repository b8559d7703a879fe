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


# The cars of examples/taxis.jpg that are not hidden by others: x0, y0, x1, y1 in percent.
CARS = ((0, 64, 5, 74), (9, 60, 38, 78), (31, 61, 57, 83), (50, 65, 80, 90), (84, 65, 89, 71), (91, 66, 100, 98))


def test_the_readmes_question_gets_a_true_answer() -> None:
    """Each point is on another car."""
    with Molmo() as molmo:
        answer = molmo.point(EXAMPLES / "taxis.jpg", "cars")
    on = [
        next(car for car in CARS if car[0] <= point.x <= car[2] and car[1] <= point.y <= car[3])
        for point in answer.points
    ]
    assert len(set(on)) == len(on) >= 4


@pytest.mark.parametrize(("max_crops", "crops"), [(0, 1), (1, 2), (4, 5), (12, 13)])
def test_fewer_and_more_crops_than_its_own(max_crops: int, crops: int) -> None:
    with Molmo(max_crops=max_crops) as molmo:
        answer = molmo.ask(EXAMPLES / "coffee.jpg", "How many cups are there?")
    assert answer.usage.crops == crops
    assert answer.text
