"""Answers for programs and notebooks: JSON and its schema, HTML and PNG, the model's name, log lines."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo_edge import Answer, Molmo, Point
from molmo_edge.answer import Seconds, Tokens, Usage

ROOT = Path(__file__).parent.parent
PHOTO = np.full((60, 80, 3), 128, np.uint8)
TWO_DOGS = 'Look: <points x1="10.0" y1="20.0" x2="90.0" y2="50.0" alt="dogs">the dogs</points> here.'

Saying = Callable[..., Molmo]
Cli = Callable[..., tuple[int, str, str]]  # the fixture of conftest.py


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads((resources.files("molmo_edge") / "answer.schema.json").read_text(encoding="utf-8"))


@pytest.fixture
def printed(cli: Cli, tiny_bundle: Path, golden: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """Output of --json: one image, several including a bad one, with points, truncated."""
    options = ("-m", tiny_bundle, "--json", "--max-crops", 1, "--max-new-tokens", 3)
    lines = cli("ask", golden / "coffee.png", "What?", *options)[1].splitlines()
    lines += cli("point", golden / "coffee.png", tmp_path / "no.png", "cup", *options, "--save", tmp_path / "out")[
        1
    ].splitlines()
    return [json.loads(line) for line in lines]


def test_what_json_prints_follows_the_published_schema(printed: list[dict[str, Any]], schema: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    assert len(printed) == 3
    for line in printed:
        validator.validate(line)
    whole = printed[0]
    for key in whole:
        with pytest.raises(jsonschema.ValidationError):
            validator.validate({k: v for k, v in whole.items() if k != key})
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({**whole, "error": "both"})
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({**whole, "points": [{"x": 1.0, "y": 2.0}]})


def test_the_schema_names_every_key(printed: list[dict[str, Any]], schema: dict[str, Any]) -> None:
    parts = schema["$defs"]
    sometimes = {"images", "times", "parsed"}  # of several images, of a video, of a constrained answer
    for line, part in zip(printed, ("answer", "answer", "problem"), strict=True):
        assert set(line) == set(parts[part]["required"])
        assert set(parts[part]["properties"]) == set(line) | (sometimes if part == "answer" else set())
    usage = printed[0]["usage"]
    for name in ("tokens", "seconds"):  # "dropped" only if image tokens were left out
        assert set(usage[name]) == set(parts["usage"]["properties"][name]["properties"]) - {"dropped"}


def test_the_schema_of_points(saying: Saying, schema: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    answer = saying(TWO_DOGS).point(PHOTO, "dogs").to_dict()
    assert len(answer["points"]) == 2
    jsonschema.Draft202012Validator(schema).validate({"image": "a.png", **answer, "saved": None})


def test_an_answer_knows_its_model(tiny_bundle: Path, golden: Path, saying: Saying) -> None:
    with Molmo(tiny_bundle, threads=1, max_crops=0) as molmo:
        assert molmo.name == "tiny"
        answer = molmo.ask(golden / "coffee.png", "What?", max_new_tokens=3)
        assert answer.model == "tiny"
        assert answer.to_dict()["model"] == "tiny"
        assert molmo.chat(golden / "coffee.png").ask("What?", max_new_tokens=3).model == "tiny"
    assert saying("ok").ask(PHOTO, "What?").to_dict()["model"] is None  # without a name


def test_a_checkpoint_of_the_hubs_cache_has_the_hubs_name(tmp_path: Path) -> None:
    from molmo_edge.sdk.model_name import model_name

    snapshot = tmp_path / "models--allenai--MolmoE-1B-0924" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    assert model_name(snapshot) == "allenai/MolmoE-1B-0924"
    assert model_name(tmp_path / "some" / ".." / "run") == "run"


@pytest.mark.parametrize(
    ("generated", "complete", "decode", "expected"),
    [(11, False, 2.0, 5.0), (10, True, 2.0, 5.0), (1, False, 0.0, None), (0, True, 0.0, None), (5, True, 0.0, None)],
)
def test_tokens_a_second(generated: int, complete: bool, decode: float, expected: float | None) -> None:
    usage = Usage(Tokens(100, 20, generated, 120), 1, Seconds(decode=decode))
    answer = Answer("x", complete=complete, usage=usage)
    assert answer.tokens_per_second == answer.to_dict()["tokens_per_second"] == expected


def test_a_notebook_shows_the_image_with_its_points() -> None:
    answer = Answer(TWO_DOGS, (Point(10, 20, "<b>dogs</b>"), Point(90, 50, "dogs & cats")), image=PHOTO)
    png = answer._repr_png_()
    assert png is not None
    shown = np.asarray(Image.open(io.BytesIO(png)))
    assert shown.shape == PHOTO.shape
    assert (shown != 128).any()
    assert (PHOTO == 128).all()
    page = answer._repr_html_()
    assert "data:image/jpeg;base64," in page
    assert "&lt;b&gt;dogs&lt;/b&gt;" in page
    assert "dogs &amp; cats" in page
    assert "<td>8, 12</td>" in page
    assert "Look: the dogs here." in page
    assert "<b>" not in page


def test_a_notebook_keeps_a_small_copy_of_a_large_image() -> None:
    answer = Answer("x", (Point(50, 50, "here"),), image=np.zeros((3000, 2000, 3), np.uint8))
    png = answer._repr_png_()
    assert png is not None
    assert Image.open(io.BytesIO(png)).size == (683, 1024)
    assert len(answer._repr_html_()) < 100_000


def test_a_notebook_shows_an_answer_without_image_or_points() -> None:
    assert Answer("no points", image=PHOTO)._repr_png_() is None
    assert Answer("<script>", (Point(1.5, 2, "a"),))._repr_png_() is None
    assert Answer("1 < 2", image=PHOTO)._repr_html_() == "<div><p>1 &lt; 2</p></div>"
    page = Answer("x", (Point(1.5, 2, "a"),), complete=False)._repr_html_()
    assert "1.5 %, 2.0 %" in page
    assert "<img" not in page
    assert "cut off" in page


def test_the_library_logs_under_its_name(
    tiny_bundle: Path, golden: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG, logger="molmo_edge"), Molmo(tiny_bundle, threads=1, max_crops=0) as molmo:
        molmo.ask(golden / "coffee.png", "What?", max_new_tokens=3)
    assert {record.name.partition(".")[0] for record in caplog.records if "molmo" in record.name} == {"molmo_edge"}
    assert "tiny: opened on onnxruntime" in caplog.text
    assert re.search(r"tiny: 1 crops, .* 3 out", caplog.text)
    assert capfd.readouterr() == ("", "")


def test_warnings_of_the_library_are_not_printed_without_a_handler() -> None:
    code = "import molmo_edge.system.log as log; log.logger.warning('careful'); log.steps_log.error('step')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_command_line_shows_what_is_logged(cli: Cli, saying: Saying, monkeypatch: pytest.MonkeyPatch) -> None:
    from molmo_edge.system.log import logger, steps_log

    molmo = saying("ok")

    def noisy(*_: object, **__: object) -> Molmo:
        logger.debug("only with --debug")
        logger.warning("a folder has two notes")
        steps_log.info("step 1/2")
        return molmo

    monkeypatch.setattr("molmo_edge.molmo.Molmo", noisy)
    image = ROOT / "tests" / "golden" / "coffee.png"
    status, out, err = cli("ask", image, "What?")
    assert (status, out) == (0, "step 1/2\nok\n")
    assert "a folder has two notes" in err
    assert "--debug" not in err
    assert "only with --debug" in cli("--debug", "ask", image, "What?")[2]
    logger.warning("after the command")
    assert cli("--version")[2] == ""


def test_no_library_code_prints() -> None:
    """Only programs print: the command line, and modules run with python -m (in their `main`)."""
    import ast

    found = []
    for folder in ("molmo_edge", "export", "quantize", "runtimes"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.is_relative_to(ROOT / "molmo_edge" / "cli") or path.name == "log.py":
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            tree.body = [node for node in tree.body if getattr(node, "name", "") != "main"]
            calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
            found += [f"{path}:{call.lineno}" for call in calls if getattr(call.func, "id", "") == "print"]
    assert found == []
