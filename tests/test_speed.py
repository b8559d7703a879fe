"""benchmarks/speed.py: its processes run on a small bundle, and its ratios are those of the pairs."""

from __future__ import annotations

import argparse
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
    for option, value, reason in (
        ("--timeout", "0.01", "full_size.py took more than 0.01 s"),
        ("--minutes", "0", "the time was over (--minutes)"),
    ):
        run(str(bundle("molmoe", "mixed")), "--parts", "stages", option, value)
        assert capsys.readouterr().out.rstrip().endswith(f"stages: {reason}")


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


FIGURES: dict[str, list[speed.Figures]] = {
    "kernels.py": [
        {"prompt": {"onnxruntime_s": 8.0, "kernels_s": 4.0}, "token": {"onnxruntime_s": 0.06, "kernels_s": 0.05}}
    ],
    "profile_bundle.py": [{"share_of_bandwidth": 0.5}],
    "engines.py": [
        {"engine": "onnxruntime", "prefill tokens/s": 300.0, "decode tokens/s": 20.0},
        {"engine": "llama.cpp", "prefill tokens/s": 150.0, "decode tokens/s": 25.0},
        {"engine": "llama.cpp, its defaults", "prefill tokens/s": 100.0, "decode tokens/s": 16.0},
    ],
    "full_size.py": [
        {
            "preprocess_s": 0.1, "vision_s": 3.0, "prefill_s": 2.0, "crops": 6, "positions": 700,
            "decode_tokens_per_s": 20.0, "peak_gb": 3.0, "size_mb": 4000.0,
        }
    ],
    "first_token.py": [{"runs": [{"first_token": 9.0}]}],
}  # fmt: skip


def test_ratios_of_what_the_scripts_print(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def lines(_model: speed.Model, script: str, *_rest: str, **options: str) -> list[speed.Figures]:
        asked.append((script, options.get("switch")))
        return FIGURES[script]

    monkeypatch.setattr(speed.Model, "lines", lines)
    monkeypatch.setattr(speed.Model, "kernels_missing", lambda _: None)
    monkeypatch.setattr(speed.Model, "large", True)
    small, photo = bundle("molmoe", "mixed"), Path("photo.jpg")
    args = argparse.Namespace(before=None, pairs=2, threads=1, positions=740, timeout=1, images=1, photos=None)
    model = speed.Model("big", small, args, photo, gguf=small, checkpoint=small)
    parts = [part for part in speed.PARTS if part != "points"]
    rows, missing = speed.measure(model, parts)
    assert missing == []
    found = {row.what: row for row in rows}
    assert found["prompt of 740, tokens/s: compiled kernels"].ratio == 2.0
    assert found["prompt of 740, tokens/s: compiled kernels"].new == 185.0
    assert found["a token, ms: compiled kernels"].ratio == pytest.approx(1.2)
    assert found["share of the memory's speed of a token, %"].new == pytest.approx(50)  # 25 of 50 ms
    assert found["vision, s per crop"].new == 0.5
    assert found["prompt of a photo, tokens/s"].new == 350
    assert found["first token, s"].ratio == 1
    assert found["prompt of 740, tokens/s: llama.cpp"].beside["llama.cpp"] == (150.0, 2.0)
    assert found["decoding, tokens/s: llama.cpp"].beside["llama.cpp, its defaults"] == (16.0, 1.25)
    assert found["first token, s: PyTorch"].beside == {"PyTorch": (pytest.approx(5.1), 1.0)}
    assert asked[:4] == [("full_size.py", "0"), ("full_size.py", None)] * 2, "old and new take turns"
