"""`--csv` and `--save-dir`: many pictures into a table, continued after an interruption; patterns."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from molmo_edge import Answer, Point
from molmo_edge.cli.answer_table import COLUMNS, Run, open_table
from molmo_edge.cli.output import OutputError

ROOT = Path(__file__).parent.parent
TWO = '<points x1="10.0" y1="20.0" x2="90.0" y2="50.0" alt="two">=1+1</points>'
RUN = Run("Where?", "nano", "")

Cli = Callable[..., tuple[int, str, str]]  # the fixture of conftest.py


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with a.png, b.png, c.png and a file that is no picture, d.png."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "abc":
        Image.new("RGB", (60, 40), "white").save(folder / f"{name}.png")
    (folder / "d.png").write_text("not a picture")
    return folder


@pytest.fixture
def says(saying: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """`says(text)` makes every model answer `text`; it returns the list of questions that are asked."""

    def make(text: str) -> list[str]:
        molmo, asked = saying(text), []
        ask = molmo.ask
        monkeypatch.setattr(molmo, "ask", lambda image, *rest, **more: asked.append(image) or ask(image, *rest, **more))
        monkeypatch.setattr("molmo_edge.molmo.Molmo", lambda *_, **__: molmo)
        return asked

    return make


def read(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_each_point_is_a_row_and_failures_are_counted(cli: Cli, photos: Path, tmp_path: Path, says: Any) -> None:
    asked = says(TWO)
    table, drawn = tmp_path / "out.csv", tmp_path / "deep" / "drawn"
    status, out, err = cli("point", photos, "dog", "--csv", table, "--save-dir", drawn, "--max-crops", 1)
    assert (status, out) == (1, "")
    assert "4 pictures: 3 answered, 1 failed; wrote" in err
    assert str(photos / "d.png") in err
    rows = read(table)
    assert tuple(rows[0]) == COLUMNS
    good = [row for row in rows if row["status"] == "ok"]
    assert [(row["image"], row["point"]) for row in good] == [
        (str(photos / f"{name}.png"), number) for name in "abc" for number in "12"
    ]
    first, second = good[:2]
    assert (first["x"], first["y"], first["x_percent"], first["y_percent"]) == ("6.0", "8.0", "10", "20")
    assert (second["x"], second["y"], second["points"], second["count"]) == ("54.0", "20.0", "2", "2")
    assert (first["width"], first["height"], first["options"], first["complete"]) == ("60", "40", "max_crops=1", "yes")
    assert first["label"] == "'=1+1"  # no formula
    (bad,) = [row for row in rows if row["status"] == "failed"]
    assert "not an image" in bad["error"]
    assert {path.name for path in drawn.iterdir()} == {f"{name}.annotated.png" for name in "abc"}
    assert {row["saved"] for row in good} == {str(path) for path in drawn.iterdir()}
    assert len(asked) == 4  # that d.png is no picture shows when it is opened


def test_a_second_run_asks_only_what_is_new(cli: Cli, photos: Path, tmp_path: Path, says: Any) -> None:
    table, drawn = tmp_path / "out.csv", tmp_path / "drawn"
    (photos / "d.png").unlink()
    asked = says(TWO)
    command = ("point", photos, "dog", "--csv", table, "--save-dir", drawn)
    assert cli(*command)[0] == 0
    whole = table.read_bytes()
    assert cli(*command)[0] == 0
    assert (len(asked), table.read_bytes()) == (3, whole)  # nothing is asked again, nothing changes
    Image.new("RGB", (60, 40), "black").save(photos / "b.png")
    os.utime(photos / "b.png", (1, 1))
    (drawn / "c.annotated.png").unlink()
    Image.new("RGB", (60, 40), "black").save(photos / "e.png")
    asked.clear()
    status, _, err = cli(*command)
    assert status == 0
    assert [path.name for path in asked] == ["b.png", "c.png", "e.png"]
    assert "4 pictures: 3 answered, 1 done before" in err
    rows = read(table)
    assert sorted((Path(row["image"]).name, row["point"]) for row in rows) == [
        (f"{n}.png", p) for n in "abce" for p in "12"
    ]
    asked.clear()
    assert cli("point", photos, "cat", "--csv", table)[0] == 0  # another question: the old rows remain
    assert len(asked) == 4
    assert cli("point", photos, "cat", "--csv", table, "--max-crops", 1)[0] == 0
    assert len(read(table)) == 3 * len(rows)


def test_json_lines_and_no_point(cli: Cli, photos: Path, tmp_path: Path, says: Any) -> None:
    says("Nothing here.")
    status, out, _ = cli("caption", photos / "a.png", "--csv", tmp_path / "out.csv", "--json")
    assert status == 0
    (line,) = out.splitlines()
    assert json.loads(line)["text"] == "Nothing here."
    (row,) = read(tmp_path / "out.csv")
    assert (row["answer"], row["point"], row["points"]) == ("Nothing here.", "", "0")


def test_no_model_is_opened_when_nothing_is_left(
    cli: Cli, photos: Path, tmp_path: Path, says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(TWO)
    (photos / "d.png").unlink()
    command = ("count", photos, "dogs", "--csv", tmp_path / "out.csv")
    assert cli(*command)[0] == 0
    monkeypatch.setattr("molmo_edge.molmo.Molmo", lambda *_, **__: pytest.fail("a model was opened"))
    status, _, err = cli(*command)
    assert status == 0
    assert "0 answered, 3 done before" in err
    status, _, err = cli("count", tmp_path / "none.png", "dogs", "--csv", tmp_path / "out.csv")
    assert status == 1
    assert "1 failed" in err


def test_wrong_use(cli: Cli, photos: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "mine.csv"
    foreign.write_text("a,b\n1,2\n")
    for options, says in (
        (("--csv", tmp_path), "directory"),
        (("--csv", tmp_path / "no" / "out.csv"), "no directory"),
        (("--save", tmp_path / "x", "--save-dir", tmp_path / "y"), "use one of them"),
        (("--save-dir", foreign), "must name a folder"),
        (("--csv", "-"), "stdin"),
    ):
        status, out, err = cli("point", photos, "dog", *options)
        assert (status, out) == (2, "")
        assert says in " ".join(err.replace("│", " ").split())
    status, _, err = cli("point", photos, "dog", "--csv", foreign)
    assert status == 1
    assert "choose another name" in err
    assert foreign.read_text() == "a,b\n1,2\n"
    status, _, err = cli("point", "-", "dog", "--csv", tmp_path / "out.csv")
    assert status == 2
    assert "stdin" in err


def test_one_picture_into_a_folder(cli: Cli, photos: Path, tmp_path: Path, says: Any) -> None:
    says(TWO)
    status, out, _ = cli("point", photos / "a.png", "dog", "--save-dir", tmp_path / "x" / "y.png")
    assert status == 0
    assert out.startswith("=1+1\n")
    assert (tmp_path / "x" / "y.png" / "a.annotated.png").is_file()


def test_drawn_pictures_are_not_asked_about(cli: Cli, photos: Path, says: Any) -> None:
    says(TWO)
    (photos / "d.png").unlink()
    names = [f"{name}.png" for name in "abc"]
    drawn = [f"{name}.annotated.png" for name in "abc"]

    def asked(images: Path, *options: object) -> list[str]:
        lines = cli("point", images, "dog", "--json", *options)[1].splitlines()
        return [Path(json.loads(line)["image"]).name for line in lines]

    for images in (photos, photos, photos / "*.png"):
        assert asked(images, "--save-dir", photos) == names
        assert sorted(path.name for path in photos.iterdir()) == sorted(names + drawn)
    assert asked(photos / drawn[0]) == drawn[:1]  # named on purpose
    assert asked(photos / "*.annotated.png") == drawn


def test_patterns(cli: Cli, photos: Path, says: Any) -> None:
    says("Yes.")
    (photos / "more").mkdir()
    (photos / "a.png").rename(photos / "more" / "a[1].png")

    def named(*paths: object) -> list[str]:
        return [Path(json.loads(line)["image"]).name for line in cli("ask", *paths, "Is it?", "--json")[1].splitlines()]

    assert named(photos / "**" / "*.png") == ["b.png", "c.png", "d.png", "a[1].png"]
    assert named(photos / "[bc].png", photos / "more" / "a[1].png") == ["b.png", "c.png", "a[1].png"]
    assert cli("ask", photos / "*.gif", "Is it?")[0] == 1


texts = st.text(max_size=12) | st.sampled_from(
    ("=1", "+a", "-b", "@c", "\t", 'q"u', "a,b", "\r\n", "\x00", "\ud800", "＝x")
)
answers = st.lists(st.tuples(st.integers(0, 2), st.lists(texts, max_size=3)), max_size=6)


@settings(max_examples=40, deadline=None)
@given(found=answers, cut=st.integers(0, 400))
def test_a_table_survives_any_text_and_any_cut(
    found: list[tuple[int, list[str]]], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rows cut off at the end, as by a power failure: complete pictures remain, the others are to be asked again."""
    folder = tmp_path_factory.mktemp("table")
    path, image = folder / "out.csv", np.zeros((40, 60, 3), np.uint8)
    pictures = [folder / f"{number}.png" for number in range(3)]
    for picture in pictures:
        picture.write_bytes(b"x")
    table = open_table(path, pictures, RUN, saves=[None] * 3)
    written: dict[Path, tuple[Answer, int]] = {}
    for number, labels in found:
        if pictures[number] not in written:
            answer = Answer(" ".join(labels), tuple(Point(50, 50, label) for label in labels), image=image)
            table.add(pictures[number], answer, None)
            written[pictures[number]] = answer, path.stat().st_size
    whole = path.read_bytes()
    rows = read(path)
    assert [row["image"] for row in rows] == [str(p) for p, (a, _) in written.items() for _ in a.points or [0]]
    assert not [cell for row in rows for cell in row.values() if cell[:1] in tuple("=+-@\t\r\n＝") and cell]
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    again = open_table(path, pictures, RUN, saves=[None] * 3)
    left = len(whole) - cut
    expected = {picture for picture, (_, end) in written.items() if end <= left}
    assert expected <= again.done <= {picture for picture, (_, end) in written.items() if end - 1 <= left}
    assert {row["image"] for row in read(path)} == {str(picture) for picture in again.done}


def test_line_breaks_stay_in_their_cells(tmp_path: Path) -> None:
    path, picture = tmp_path / "out.csv", tmp_path / "a.png"
    table = open_table(path, [picture], RUN, saves=[None])
    errors = ["one\rtwo", "one\ntwo", "one\r\ntwo", "end\r", "last"]
    for error in errors:
        table.add_failure(picture, error)
    assert [row["error"] for row in read(path)] == errors
    assert path.read_bytes().count(b"\r\n") == 1  # rows end with one character


def test_a_failed_write_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        open_table(tmp_path / "no" / "out.csv", [], RUN, saves=[])


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent differently there")
def test_an_interrupted_run_leaves_a_table_and_continues(photos: Path, tmp_path: Path, tiny_bundle: Path) -> None:
    (photos / "d.png").unlink()
    for name in range(17):
        Image.new("RGB", (60, 40), "white").save(photos / f"{name}.png")
    table = tmp_path / "out.csv"
    options = ("-m", tiny_bundle, "--csv", table, "--max-crops", 0, "--max-new-tokens", 60)
    command = [sys.executable, "-m", "molmo_edge", "ask", str(photos), "What?", *map(str, options)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while (not table.exists() or table.read_bytes().count(b"\n") < 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    rows = read(table)
    assert 2 <= len(rows) < 20
    assert {row["status"] for row in rows} == {"ok"}
    assert process.returncode == 130
    assert err.splitlines()[-1] == f"interrupted after {len(rows)} of 20: run the command again to continue"
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"20 pictures: {20 - len(rows)} answered, {len(rows)} done before" in done.stderr
    assert len({row["image"] for row in read(table)}) == len(read(table)) == 20
