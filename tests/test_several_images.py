"""Several images on the command line, folders, stdin; sampling options; shell completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from molmo_edge.cli.saving import frame_names, save_paths

ROOT = Path(__file__).parent.parent
DOG = 'Here: <point x="25.0" y="50.0" alt="dog">dog</point>.'

Cli = Callable[..., tuple[int, str, str]]  # the fixture of conftest.py


@pytest.fixture
def photos(tmp_path: Path, golden: Path) -> Path:
    """A folder with a.png, B.JPG, c.gif and a text file."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "B.JPG", "c.gif"):
        Image.open(golden / "coffee.png").convert("RGB").resize((60, 40)).save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture
def says(saying: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    molmo = saying(DOG)
    monkeypatch.setattr("molmo_edge.molmo.Molmo", lambda *_, **__: molmo)
    return molmo


@pytest.mark.usefixtures("says")
@pytest.mark.parametrize("verb", [("ask", "Where?"), ("point", "dog"), ("count", "dogs"), ("caption",)])
def test_one_answer_for_each_image(cli: Cli, photos: Path, verb: tuple[str, ...]) -> None:
    images = [photos / "a.png", photos / "c.gif"]
    status, out, _ = cli(verb[0], *images, *verb[1:])
    assert status == 0
    assert out.splitlines() == [
        line for image in images for line in (f"{image}:", "Here: dog.", "   1  x     15  y     20  dog")
    ]


@pytest.mark.usefixtures("says")
def test_json_is_one_line_for_each_image(cli: Cli, photos: Path) -> None:
    images = [photos / "a.png", photos / "c.gif"]
    status, out, _ = cli("ask", *images, "Where?", "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [answer["image"] for answer in answers] == [str(image) for image in images]
    assert all(answer["points"][0]["pixel"] == [15, 20] for answer in answers)


@pytest.mark.usefixtures("says")
def test_a_folder_is_its_pictures_by_name(cli: Cli, photos: Path) -> None:
    status, out, _ = cli("ask", photos, "Where?", "--json")
    assert status == 0
    assert [Path(json.loads(line)["image"]).name for line in out.splitlines()] == ["B.JPG", "a.png", "c.gif"]
    (photos / "only").mkdir()
    (photos / "a.png").rename(photos / "only" / "a.png")
    (line,) = cli("ask", photos / "only", "Where?", "--json")[1].splitlines()  # one object per line
    assert json.loads(line)["image"].endswith("a.png")


@pytest.mark.usefixtures("says")
@pytest.mark.parametrize("as_json", [False, True])
def test_a_bad_picture_is_reported_at_its_place(cli: Cli, photos: Path, as_json: bool) -> None:
    (photos / "b.png").write_text("not a picture at all")
    images = [photos / "missing.png", photos / "a.png", photos / "b.png", photos / "c.gif"]
    status, out, err = cli("ask", *images, "Where?", "-q", *(["--json"] if as_json else []))
    assert status == 1
    missing, broken = err.splitlines()
    for line, image in ((missing, images[0]), (broken, images[2])):
        assert line.startswith("molmo-edge: ")
        assert str(image) in line
    if as_json:
        lines = [json.loads(line) for line in out.splitlines()]
        assert [line["image"] for line in lines] == [str(image) for image in images]
        assert ["error" in line for line in lines] == [True, False, True, False]
        assert lines[0] == {"image": str(images[0]), "error": missing.removeprefix("molmo-edge: ")}
    else:
        assert [line for line in out.splitlines() if line.endswith(":")] == [f"{images[1]}:", f"{images[3]}:"]


def test_no_model_is_opened_where_no_picture_is_there(cli: Cli, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molmo_edge.molmo.Molmo", lambda *_, **__: pytest.fail("a model was opened"))
    empty = photos / "empty"
    empty.mkdir()
    status, out, err = cli("ask", photos / "no.png", empty, "Where?")
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 2
    assert "contains no pictures" in err


@pytest.mark.usefixtures("says")
def test_a_bad_question_is_not_the_pictures_fault(cli: Cli, photos: Path) -> None:
    status, out, err = cli("ask", photos, " ")
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert "empty" in err


@pytest.mark.usefixtures("says")
def test_words_without_quotes_are_wrong_use(cli: Cli, photos: Path) -> None:
    status, out, err = cli("ask", photos / "a.png", "Where", "is", "it?")
    assert (status, out) == (2, "")
    assert '"Where"' in err
    assert "quotes" in err


@pytest.mark.usefixtures("says")
def test_drawn_pictures_of_several_images_go_to_a_folder(cli: Cli, photos: Path, tmp_path: Path) -> None:
    (photos / "more").mkdir()
    (photos / "more" / "a.png").write_bytes((photos / "a.png").read_bytes())
    out_dir = tmp_path / "drawn"
    images = [photos / "a.png", photos / "more" / "a.png", photos / "c.gif"]
    status, out, _ = cli("point", *images, "dog", "--json", "--save", out_dir)
    names = ["a.annotated.png", "a-2.annotated.png", "c.annotated.png"]
    assert status == 0
    assert {path.name for path in out_dir.iterdir()} == set(names)
    assert [json.loads(line)["saved"] for line in out.splitlines()] == [str(out_dir / name) for name in names]
    with Image.open(out_dir / "c.annotated.png") as drawn:
        assert drawn.size == (60, 40)


def test_drawn_pictures_have_names_of_their_own(tmp_path: Path) -> None:
    images = [Path(name) for name in ("cat-2.jpg", "cat.jpg", "cat.png", "CAT.gif", "cat-2.png", "-")]
    names = ["cat-2", "cat", "cat-3", "CAT-4", "cat-2-2", "stdin"]
    assert save_paths(tmp_path, images) == [tmp_path / f"{name}.annotated.png" for name in names]


@pytest.mark.usefixtures("says")
def test_a_file_cannot_take_several_pictures(cli: Cli, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for save in (tmp_path / "out.png", tmp_path / "file"):
        status, out, err = cli("point", photos, "dog", "--save", save)
        assert (status, out) == (2, "")
        assert "must name a folder" in " ".join(err.split())


def run(*arguments: object, data: bytes) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "molmo_edge.cli", *map(str, arguments)]
    return subprocess.run(
        command, input=data, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=120
    )


def test_a_dash_reads_an_image_from_stdin(tiny_bundle: Path, golden: Path) -> None:
    options = ("What?", "-m", tiny_bundle, "--json", "--max-new-tokens", 4, "--max-crops", 1)
    photo = golden / "astronaut.png"
    piped, named = run("ask", "-", *options, data=photo.read_bytes()), run("ask", photo, *options, data=b"")
    assert piped.returncode == named.returncode == 0
    ours, theirs = json.loads(piped.stdout), json.loads(named.stdout)
    assert ours["image"] == "-"
    assert ours["token_ids"] == theirs["token_ids"]
    both = run("ask", "-", photo, *options, data=photo.read_bytes()).stdout.splitlines()
    assert [json.loads(line)["token_ids"] for line in both] == [theirs["token_ids"]] * 2


@pytest.mark.parametrize(("data", "says"), [(b"", b"stdin is empty"), (b"no picture", b"molmo-edge: ")])
def test_what_is_no_image_on_stdin_is_one_line(data: bytes, says: bytes) -> None:
    done = run("ask", "-", "What?", data=data)
    assert (done.returncode, done.stdout) == (1, b"")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.usefixtures("says")
def test_stdin_can_be_read_once_and_not_by_chat(cli: Cli) -> None:
    assert cli("ask", "-", "-", "What?")[0] == 2
    assert cli("chat", "-")[0] == 2


def test_top_k_and_top_p_reach_the_model(cli: Cli, says: Any, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    stream = says.stream

    def keep(*arguments: Any, **sampling: Any) -> Any:
        given.update(sampling)
        return stream(*arguments, **sampling)

    monkeypatch.setattr(says, "stream", keep)
    options = ("--temperature", 0.7, "--top-k", 40, "--top-p", 0.9, "--seed", 3, "--max-new-tokens", 7)
    status, _, err = cli("ask", photos / "a.png", "Where?", *options)
    assert status == 0
    assert "no effect" not in err
    chosen = {name: value for name, value in given.items() if value is not None}
    assert chosen == {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "seed": 3, "max_new_tokens": 7}


@pytest.mark.usefixtures("says")
@pytest.mark.parametrize("verb", [("ask", "Where?"), ("chat",)])
def test_top_p_without_a_temperature_is_said(
    cli: Cli, photos: Path, monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...]
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert "have no effect at --temperature 0" in cli(verb[0], photos / "a.png", *verb[1:], "--top-p", 0.5)[2]


@pytest.mark.parametrize("wrong", [("--top-p", 0), ("--top-p", 1.5), ("--top-k", -1), ("--top-p", "nan")])
def test_wrong_sampling_is_wrong_use(cli: Cli, photos: Path, wrong: tuple[object, ...]) -> None:
    assert cli("ask", photos / "a.png", "Where?", *wrong)[0] == 2


def test_shell_completion_is_there() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_MOLMO_EDGE_COMPLETE": "complete_bash"}
    environment |= {"COMP_WORDS": "molmo-edge ask --t", "COMP_CWORD": "2"}
    done = subprocess.run([sys.executable, "-m", "molmo_edge.cli"], env=environment, capture_output=True, text=True)
    assert {"--temperature", "--top-k", "--top-p", "--threads"} <= set(done.stdout.split())


def test_frames_that_are_close_get_names_of_their_own() -> None:
    assert frame_names([0.0, 0.5, 12.0]) == ["000.0s", "000.5s", "012.0s"]
    assert frame_names([0.0, 1 / 30, 2 / 30]) == ["000.00s", "000.03s", "000.07s"]
    assert frame_names([0.0, 0.001, 0.5]) == ["000.000s", "000.001s", "000.500s"]
    assert frame_names([1.0, 1.0]) == ["001.000000s-1", "001.000000s-2"]
