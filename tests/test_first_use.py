"""First use of the command line: wrong arguments, plurals, `python -m molmo_edge`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from molmo_edge import Molmo
from molmo_edge.config import ConfigError
from molmo_edge.sdk.readable_text import counted

Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["ask", "examples/cat.jpg", "Q", "--revision", "main"], 1, "but no model was given"),
        (["ask", "https://example.org/cup.jpg", "Q"], 1, "https://example.org/cup.jpg"),
        (["ask", "a.jpg", "-5 or 5 degrees?"], 2, 'put "--" before a file name, a question or a label'),
        (["ask", "a.jpg", "Q", "--temperature", "inf"], 2, "must be a finite number"),
        (["ask", "a.jpg", "Q", "--temperature", "nan"], 2, "--temperature"),
    ],
)
def test_what_is_wrong_is_said(cli: Cli, golden: object, arguments: list[str], status: int, says: str) -> None:
    arguments = [f"{golden}/coffee.png" if each == "examples/cat.jpg" else each for each in arguments]
    got, _, err = cli(*arguments)
    assert got == status
    assert says in err


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "molmo_edge", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("molmo-edge ")


def test_no_crops_are_allowed_and_fewer_are_not() -> None:
    with pytest.raises(ConfigError, match="max_crops must be positive or 0, it is -1"):
        Molmo(max_crops=-1)


def test_one_is_singular() -> None:
    assert [counted(n, "crop") for n in (0, 1, 2)] == ["0 crops", "1 crop", "2 crops"]
