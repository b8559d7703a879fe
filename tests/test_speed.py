"""benchmarks/speed.py: its processes run on a small bundle, and its ratios are those of the pairs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from exported import bundle

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))

import speed  # noqa: E402


def run(*arguments: str) -> None:
    speed.main(["--without-nano", "--pairs", "1", "--threads", "1", *arguments])


def test_a_bundle_is_measured_and_what_cannot_run_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    model = bundle("molmoe", "mixed")
    run(str(model), "--before", sys.executable, "--parts", "stages,prompt,share,llama.cpp,points", "--json")
    found = json.loads(capsys.readouterr().out)
    rows = {row["what"]: row for row in found["rows"]}
    size = sum(file.stat().st_size for file in model.iterdir()) / 1e6
    assert rows["size, MB"]["old"] == rows["size, MB"]["new"] == pytest.approx(size, abs=1e-3)
    for row in rows.values():
        assert row["old"] > 0
        assert row["ratio"] == pytest.approx(
            row["new"] / row["old"] if "tokens/s" in row["what"] else row["old"] / row["new"]
        )
    assert len(rows) == 6
    reasons = dict(line.split(": ", 1) for line in found["not_run"])
    assert set(reasons) == {f"{model.name}, {part}" for part in ("prompt", "share", "llama.cpp", "points")}
    assert found["machine"]["processor"]


def test_a_process_that_takes_too_long_is_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    run(str(bundle("molmoe", "mixed")), "--parts", "stages", "--timeout", "0.01")
    assert capsys.readouterr().out.rstrip().endswith("stages: full_size.py took more than 0.01 s")


def test_wrong_arguments_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(tmp_path)], "is not a bundle"),
        (["--parts", "stages,speed"], "unknown parts: speed"),
        (["--pairs", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            run(*arguments)
        assert message in capsys.readouterr().err


def test_tables_show_what_was_measured() -> None:
    rows = [
        speed.Row("nano", "a token, ms", 4.0, 2.0, 2.0),
        speed.Row("nano", "prompt", None, 300.0, None, {"llama.cpp": (150.0, 2.0)}),
    ]
    assert speed.table(rows)[2:] == [
        "| nano | a token, ms | 4 | 2 | 2.00 |  |",
        "| nano | prompt |  | 300 |  | 150 (2.00) |",
    ]
