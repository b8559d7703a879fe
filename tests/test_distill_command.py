"""molmo-edge distill: from a teacher to a student that can be asked, and what it says when it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_checkpoints import write_checkpoint

from molmo_edge import Molmo
from molmo_edge.data.drawn.generate import generate
from molmo_edge.data.written_answers import WrittenAnswers

GOLDEN = Path(__file__).parent / "golden"
SMALL = ["--steps", "2", "--batch", "2", "--micro", "1", "--workers", "0", "--device", "cpu", "--log-every", "1"]
pytestmark = pytest.mark.usefixtures("one_thread")
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generate("clocks", 12, folder / "pixmo_clocks")
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("teacher") / "dense", "dense", seed=1)


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_student_is_trained_and_answers(
    small_molmoe: Path, teacher: Path, data: Path, tmp_path: Path, cli: Command
) -> None:
    options = ["--teacher", teacher, "--student", small_molmoe, "--data", data, *SMALL, "--hidden", "0.5"]
    cache = ["--cache", tmp_path / "targets", "--freeze", "vision", "--features", tmp_path / "features"]
    status, out, err = cli("distill", *options, "--out", tmp_path / "run", *cache)
    assert status == 0, err
    assert "divergence" in out
    assert "hidden states" in out
    assert "wrote the student to" in err
    lines = [line for line in log(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["divergence"] > 0
    assert (tmp_path / "run" / "experts.svg").exists()
    answer = Molmo(tmp_path / "run" / "model").ask(GOLDEN / "astronaut.png", "Who is she?", max_new_tokens=3)
    assert len(answer.token_ids) <= 3


def test_a_student_learns_from_the_answers_of_its_teacher(
    small_molmoe: Path, teacher: Path, data: Path, tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    example = WrittenAnswers.example
    monkeypatch.setattr(
        WrittenAnswers, "example", lambda self, *of: read.append(example(self, *of)) or example(self, *of)
    )
    written = tmp_path / "written"
    base = ["--teacher", teacher, "--data", data, "--device", "cpu"]
    status, _, err = cli("train", "answers", *base, "--out", written, "--pictures", "2", "--max-new-tokens", "3")
    assert status == 0, err
    assert "left out" in err, "a random model does not end its answers"
    row = {"image": str(GOLDEN / "astronaut.png"), "style": "demo", "messages": ["Who is it?", "An astronaut."]}
    (written / "answers.jsonl").write_text(json.dumps(row) + "\n")
    run = ["--student", small_molmoe, "--out", tmp_path / "run", *SMALL, "--answers", written, "--answers-share", "0.9"]
    status, _, err = cli("distill", *base, *run)
    assert status == 0, err
    assert "teacher_answers (1)" in err
    assert read, "a sequence of the run comes from the answers"
    assert {one.annotations[0].messages for one in read} == {("Who is it?", "An astronaut.")}


def test_it_says_what_is_wrong(small_molmoe: Path, teacher: Path, data: Path, tmp_path: Path, cli: Command) -> None:
    def complaint(status: int, *options: object) -> str:
        base = ["--teacher", teacher, "--student", small_molmoe, "--data", data, "--out", tmp_path / "run", *SMALL]
        found, _, err = cli("distill", *base, *options)
        assert found == status
        return " ".join(err.split())

    assert "a grounding head in both teacher and student" in complaint(1, "--grounding", "1")
    assert "the temperature must be positive" in complaint(1, "--temperature", "0")
    features = ["--freeze", "vision", "--features", tmp_path / "features"]
    assert "set top_k" in complaint(1, "--top-k", "0", "--cache", tmp_path / "targets", *features)
    assert not (tmp_path / "features").exists(), "the settings are checked first"
    assert "all weights of the teacher's losses are 0" in complaint(1, "--divergence", "0")
    assert "is not a known preset" in complaint(2, "--preset", "molmo-9b")
    assert "there is no directory" in complaint(1, "--teacher", tmp_path / "nowhere")
