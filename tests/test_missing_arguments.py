"""Errors for missing arguments, and the exit status of a chat over a pipe."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["ask", "a.jpg"], "QUESTION"),
        (["ask", "a.jpg", "--json", "-q"], "QUESTION"),
        (["ask", "-"], "QUESTION"),
        (["ask", "."], "QUESTION"),
        (["point", "--max-crops", "1", "a.PNG"], "LABEL"),
        (["count", "a.webp"], "LABEL"),
        (["ask"], "IMAGE"),
        (["ask", "Where is the dog?"], "IMAGE"),
        (["count", "cups"], "IMAGE"),
        (["caption"], "IMAGE"),
        (["chat"], "IMAGE"),
    ],
)
def test_the_argument_that_is_missing_is_named(cli: Cli, arguments: list[str], missing: str) -> None:
    status, out, err = cli(*arguments)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == f"Error: Missing argument '{missing}'."


@pytest.mark.parametrize(("questions", "status"), [("What?\n", 0), ("What?\n/save a.gif\nWhat?\n", 1)])
def test_a_chat_over_a_pipe_tells_of_failures(questions: str, status: int, tiny_bundle: Path, golden: Path) -> None:
    command = [sys.executable, "-m", "molmo_edge.cli", "chat", str(golden / "coffee.png"), "-m", str(tiny_bundle)]
    done = subprocess.run([*command, "--max-new-tokens", "2"], input=questions, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert ("molmo-edge: " in done.stderr) == (status == 1)
