"""Closed and broken standard streams, and invalid paths: one line of error, the right exit status."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import molmo_edge

HOME = Path(molmo_edge.__file__).parent.parent
ENV = {**os.environ, "PYTHONPATH": str(HOME)}
COMMAND = [sys.executable, "-m", "molmo_edge.cli"]
Cli = Callable[..., tuple[int, str, str]]

posix = pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell closes the streams")


def with_streams(redirection: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line with streams redirected by a shell: ">&-" closes stdout."""
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", *COMMAND, *map(str, arguments)]
    return subprocess.run(shell, env=ENV, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def question(golden: Path, tiny_bundle: Path) -> tuple[object, ...]:
    return ("ask", golden / "astronaut.png", "What?", "-m", tiny_bundle, "--max-new-tokens", "3", "--max-crops", "0")


@posix
@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_closed_stdout_is_said(question: tuple[object, ...], more: tuple[str, ...]) -> None:
    run = with_streams(">&-", *question, *more, "-q")
    assert run.returncode == 1
    assert len(run.stderr.splitlines()) == 1
    assert run.stderr.startswith("molmo-edge: stdout is closed")


@posix
def test_a_closed_stdout_is_no_matter_to_what_prints_nothing(golden: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = with_streams(">&- <&-", "export", golden / "molmoe", "--engine", "torch", "--out", out, "--quiet")
    assert (run.returncode, run.stderr) == (0, "")
    assert (out / "model.safetensors").is_file()
    for arguments in (("--help",), ("--version",)):
        assert "Traceback" not in with_streams(">&-", *arguments).stderr


@posix
@pytest.mark.parametrize("redirection", ["2>&-", "2>&- <&-"])
def test_what_belongs_on_a_closed_stderr_stays_off_stdout(question: tuple[object, ...], redirection: str) -> None:
    run = with_streams(redirection, *question, "--json")
    assert run.returncode == 0
    assert json.loads(run.stdout)["usage"]["tokens"]["generated"] == 3
    failed = with_streams(redirection, "ask", "/no/such/photo.jpg", "What?")
    assert (failed.returncode, failed.stdout) == (1, "")


@posix
def test_all_streams_closed_is_no_traceback(question: tuple[object, ...]) -> None:
    run = with_streams(">&- 2>&- <&-", *question)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", "")


@posix
def test_a_closed_stdin_ends_a_chat(golden: Path, tiny_bundle: Path) -> None:
    run = with_streams("<&-", "chat", golden / "astronaut.png", "-m", tiny_bundle, "--max-crops", "0")
    assert run.returncode == 0
    assert run.stdout == ""
    assert "Traceback" not in run.stderr


@posix
def test_files_are_not_opened_as_stdout(tmp_path: Path) -> None:
    """Otherwise a library that prints to descriptor 1 would write into the first opened file."""
    program = (
        "import os, sys; from molmo_edge.cli.streams import open_streams; open_streams()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w'); os.write(1, b'printed'); os.write(2, b'printed')\n"
        "sys.exit(file.fileno() <= 2)"
    )
    shell = ["sh", "-c", 'exec "$@" >&- 2>&- <&-', "sh", sys.executable, "-c", program]
    assert subprocess.run(shell, env=ENV, check=False).returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


@posix
def test_a_stderr_that_nobody_reads_does_not_cost_the_answer(question: tuple[object, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [*COMMAND, *map(str, question), "--json"]
    run = subprocess.run(command, env=ENV, stdout=subprocess.PIPE, stderr=write, timeout=120, check=False)
    assert run.returncode == 0
    assert json.loads(run.stdout)["usage"]["tokens"]["generated"] == 3
    command = [*COMMAND, "ask", "/no/such/photo.jpg", "What?"]
    failed = subprocess.run(command, env=ENV, stdout=subprocess.PIPE, stderr=write, timeout=120, check=False)
    os.close(write)
    assert (failed.returncode, failed.stdout) == (1, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_full_disk_under_stdout_is_one_line(question: tuple[object, ...], more: tuple[str, ...]) -> None:
    run = with_streams(">/dev/full", *question, *more, "-q")
    assert run.returncode == 1
    assert len(run.stderr.splitlines()) == 1, run.stderr
    assert "No space left on device" in run.stderr


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("https://example.com/photos/dog.jpg", "download the image"),
        ("data:image/png;base64,iVBORw0KGgoAAAANSUhEUg==", "is a data URL"),
        ("BASE64", "is base64 text"),
        ("x" * 300 + ".jpg", "cannot be opened: File name too long"),
    ],
    ids=["URL", "data URL", "base64", "long"],
)
@pytest.mark.parametrize("command", [("ask", "What?"), ("chat",), ("bench",)])
def test_text_that_is_no_path_is_one_line(
    cli: Cli, golden: Path, tmp_path: Path, tiny_bundle: Path, image: str, says: str, command: tuple[str, ...]
) -> None:
    if image == "BASE64":
        image = base64.b64encode((golden / "coffee.png").read_bytes()).decode()
    verb, *question = command
    save = ("--save", tmp_path / "out.png") if verb == "ask" else ()
    status, out, err = cli(verb, image, *question, "-m", tiny_bundle, *save)
    assert (status, out) == (1, "")
    assert says in err
    assert len(err.splitlines()) == 1
    assert len(err) < 500


@pytest.mark.parametrize("verb", ["ask", "point", "count"])
def test_a_question_may_begin_with_a_dash(
    cli: Cli, golden: Path, saying: Any, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    asked: list[str] = []

    def molmo(*_: object, **__: object) -> Any:
        made = saying("ok")
        stream = made.stream
        made.stream = lambda photo, question, **more: (asked.append(question), stream(photo, question, **more))[1]
        return made

    monkeypatch.setattr("molmo_edge.molmo.Molmo", molmo)
    for text in ("-5 or 5 degrees", "--json", "-q"):
        status, out, _ = cli(verb, golden / "astronaut.png", "-q", "--", text)
        assert status == 0
        assert out == "ok\n"
        assert text in asked[-1]
    shown = " ".join(cli(verb, "--help")[1].split())
    assert re.search('Put "--" before a (question|label) that begins with a dash: photo.jpg -- "-5', shown)


@pytest.mark.parametrize("verb", ["ask", "point", "count", "caption", "chat"])
def test_a_photo_may_begin_with_a_dash(
    cli: Cli, golden: Path, saying: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-1.png").write_bytes((golden / "coffee.png").read_bytes())
    monkeypatch.setattr("molmo_edge.molmo.Molmo", lambda *_, **__: saying("ok"))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    question = () if verb in ("caption", "chat") else ("-5",)
    status, out, err = cli(verb, "-q", "--", "-1.png", *question)
    assert (status, out, err) == (0, "" if verb == "chat" else "ok\n", "")
    shown = " ".join(cli(verb, "--help")[1].split())
    assert 'Put "--" before a name that begins with a dash' in shown
