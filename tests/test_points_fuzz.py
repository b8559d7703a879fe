"""Points folders with random damage: read like by an independent reader, or refused with file and line."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
from points_damage import FORMS, PICTURES, Folder, damage, make_pictures, write
from points_oracle import meaning

from molmo_edge.data.points_folder import PointsError, PointsFolder, open_points
from molmo_edge.frontend.points import parse_count, parse_points

FOLDERS = 100  # of each format
# Errors of a whole file or folder name no line.
_WHOLE = re.compile(
    r"cannot be used: |has no picture with a point|cannot be read as UTF-8|is not JSON|begins with |has both |"
    r"has several columns|is empty: its first line|does not name a picture|needs a list|holds no annotations|"
    r"does not follow the COCO format|states that .* has no |gives a picture size of |(width|height) is |"
    r"the picture's name is damaged"
)
_PLACE = re.compile(r"(line \d+|(shape|annotation|image|category) .+?) (of|in the list of) ")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_damaged_folders_are_read_right_or_refused(form: str, pictures: Path, tmp_path: Path) -> None:
    accepted = refused = 0
    for seed in range(FOLDERS):
        rng = random.Random(f"{form} {seed}")
        path = tmp_path / str(seed)
        path.mkdir()
        folder = write(rng, path, form, pictures)
        done = [damage(rng, folder) for _ in range(rng.choice([0, 1, 1, 1, 1, 2, 3]))]
        about = f"{form}, seed {seed}, in {path}: {'; '.join(done) or 'nothing'}"
        said = meaning(folder)
        try:
            train, _ = open_points(path, validation=0)
        except PointsError as error:
            _check_refusal(str(error), folder, said.faults, about)
            refused += 1
        else:
            assert not said.faults, f"{about}: accepted, although {said.faults} is wrong"
            _check_reading(train, said.points(), about)
            accepted += 1
    assert min(accepted, refused) > FOLDERS / 10, (accepted, refused)


def _check_refusal(message: str, folder: Folder, faults: list[str], about: str) -> None:
    assert faults, f"{about}: refused without a reason: {message}"
    message.encode()  # it can be printed
    assert "\n" not in message, f"{about}: {message}"
    assert len(message) < 2000, f"{about}: {message}"
    names = [*(file.name for file in folder.files), *PICTURES, str(folder.path)]
    assert any(name in message for name in names), f"{about}: it names no file: {message}"
    assert _PLACE.search(message) or _WHOLE.search(message), f"{about}: it names no place: {message}"
    if line := re.match(r"(line|shape) \d+ ", message):
        assert {line[0], ""} & set(faults), f"{about}: {faults} is wrong, not what is said: {message}"


def _check_reading(train: PointsFolder, expected: dict[str, dict[str, list[tuple[float, float]]]], about: str) -> None:
    found = {
        picture.path.name: {label: sorted(xy) for label, xy in picture.points.items()}
        for picture in train.pictures
        if picture.points
    }
    assert {name: set(points) for name, points in found.items()} == {n: set(p) for n, p in expected.items()}, about
    for name, points in expected.items():
        for label, xy in points.items():
            assert len(found[name][label]) == len(xy), about
            assert np.allclose(np.reshape(found[name][label], (-1, 2)), np.reshape(xy, (-1, 2)), atol=1e-9), about
    for index, picture in enumerate(train.pictures):  # and what the model is trained on
        for annotation in train.example(index, np.random.default_rng(index)).annotations:
            question, answer = annotation.messages
            taught = [(p.x, p.y) for p in parse_points(answer)]
            exact = [
                xy for xy in picture.points.values() if sorted(np.round(np.reshape(xy, (-1, 2)), 1).tolist())
                == sorted(map(list, taught))
            ]  # fmt: skip
            assert exact or not taught, f"{about}: {answer}"
            assert annotation.style == "pointing" or parse_count(answer) == len(taught), f"{about}: {question} {answer}"
