"""Tables of the command line show text unchanged and complete figures at any width."""

from __future__ import annotations

import io
import sys

import pytest

from molmo_edge.cli import output
from molmo_edge.cli.ablate import print_parts
from molmo_edge.cli.eval import print_scores
from molmo_edge.evaluation.ablation import AblationResult
from molmo_edge.evaluation.stats import Estimate


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def parts() -> list[AblationResult]:
    figure = Estimate(0.123456, 0.1111, 0.1333, 12)
    figures = dict.fromkeys(("same_points", "drift", "same_answer", "same_top", "kl_mean"), figure)
    return [AblationResult("vision.blocks", "int8", 1_600_000, figures)]


def test_names_are_not_read_as_emoji_or_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_scores({"photos": {"photos:ten:1 [red]x[/red]": {"hits": Estimate(0.5, 0.4, 0.6, 3)}}})
    assert "photos:ten:1 [red]x[/red]" in capsys.readouterr().out


def test_the_spinner_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with output.progress("loading photos:ten: [red]x"):
        pass
    assert "photos:ten: [red]x" in terminal.getvalue()


def test_a_piped_table_has_its_full_width(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    print_parts(parts(), "asked")
    row = next(line for line in capsys.readouterr().out.splitlines() if "vision.blocks" in line)
    assert "vision.blocks int8" in row
    assert row.count("[") == 5
    assert "\u2026" not in row


def test_no_word_is_cut_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    print_parts(parts(), "asked")
    assert "vision.blocks" in terminal.getvalue()
    assert "0.077" in terminal.getvalue()
    assert "\u2026" not in terminal.getvalue()
