"""Runs that are killed, resumed and split into shards."""

from __future__ import annotations

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

from molmo_edge.evaluation.questions import Question
from molmo_edge.evaluation.sharded_run import (
    RunError,
    Shard,
    ask_shard,
    average_scores,
    claim_folder,
    count_answered,
    file_stem,
    merge_shards,
)
from molmo_edge.molmo import Molmo

Saying = Callable[..., Molmo]


def question(i: int, picture: int, **more: Any) -> Question:
    return Question(
        id=f"q/{i}",
        group="q",
        kind="read",
        image_id=f"p{picture}",
        image=lambda: np.full((40, 50, 3), picture, np.uint8),
        text=f"What is {i}?",
        score=lambda text: {"right": float(i % 2), "length": len(text) / 100},
        max_new_tokens=8,
        truth=i,
        **more,
    )


QUESTIONS = [question(i, i // 3) for i in range(14)]


def whole(molmo: Molmo, folder: Path) -> bytes:
    claim_folder(folder, {"model": "m"})
    ask_shard(molmo, QUESTIONS, folder, "suite")
    assert merge_shards(QUESTIONS, folder, "suite") is not None
    return (folder / "suite.jsonl").read_bytes()


def test_a_run_has_one_line_per_question_in_order(saying: Saying, tmp_path: Path) -> None:
    data = whole(saying("A cat."), tmp_path)
    lines = [json.loads(line) for line in data.splitlines()]
    assert [line["id"] for line in lines] == [q.id for q in QUESTIONS]
    assert lines[1] == {
        "id": "q/1", "group": "q", "question": "What is 1?", "truth": 1, "answer": "A cat.", "complete": True,
        "scores": {"right": 1.0, "length": 0.06},
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "suite.jsonl"]


@pytest.mark.parametrize("stopped_after", [1, 4, 13])
def test_a_resumed_run_has_the_same_bytes(saying: Saying, tmp_path: Path, stopped_after: int) -> None:
    expected = whole(saying("A cat."), tmp_path / "whole")
    folder = tmp_path / "broken"
    claim_folder(folder, {"model": "m"})
    asked: list[str] = []

    def stop() -> None:
        asked.append("once")
        if len(asked) == stopped_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask_shard(saying("A cat."), QUESTIONS, folder, "suite", on_answer=stop)
    (part,) = folder.glob("suite.part-*")
    with part.open("a") as file:
        file.write('{"id": "q/13", "answ')  # as a kill in the middle of a write leaves it
    assert count_answered(folder, "suite") == stopped_after
    assert merge_shards(QUESTIONS, folder, "suite") is None
    again = saying("A cat.")
    ask_shard(again, QUESTIONS, folder, "suite", on_answer=lambda: asked.append("again"))
    assert len(asked) == len(QUESTIONS), "nothing is asked twice"
    merge_shards(QUESTIONS, folder, "suite")
    assert (folder / "suite.jsonl").read_bytes() == expected


def test_any_number_of_shards_gives_the_same_bytes(saying: Saying, tmp_path: Path) -> None:
    expected = whole(saying("A cat."), tmp_path / "whole")
    folder = tmp_path / "shards"
    claim_folder(folder, {"model": "m"})
    molmo = saying("A cat.")
    ask_shard(molmo, QUESTIONS, folder, "suite", Shard(2, 3))
    ask_shard(molmo, QUESTIONS, folder, "suite", Shard.parse("1/2"))  # with another number of shards for the rest
    assert merge_shards(QUESTIONS, folder, "suite") is None
    ask_shard(molmo, QUESTIONS, folder, "suite", Shard.parse("2/2"))
    merge_shards(QUESTIONS, folder, "suite")
    assert (folder / "suite.jsonl").read_bytes() == expected
    assert molmo.fake.images == 5, "each image is encoded once, by one shard"  # type: ignore[attr-defined]


def test_a_finished_run_asks_nothing(saying: Saying, tmp_path: Path) -> None:
    whole(saying("A cat."), tmp_path)
    molmo = saying("A dog.")
    ask_shard(molmo, QUESTIONS, tmp_path, "suite")
    assert not molmo.fake.fed
    assert merge_shards(QUESTIONS, tmp_path, "suite")


def test_another_run_is_refused_with_the_differences(tmp_path: Path) -> None:
    claim_folder(tmp_path, {"model": "typo", "limit": 3})
    claim_folder(tmp_path, {"model": "a", "limit": 3})  # nothing was asked yet
    (tmp_path / "suite.part-1-of-1.jsonl").write_text("")
    claim_folder(tmp_path, {"model": "a", "limit": 3})
    with pytest.raises(
        RunError, match=r"another run \(limit: 3 in the folder, 4 now, model: 'a' in the folder, 'b' now\)"
    ):
        claim_folder(tmp_path, {"model": "b", "limit": 4})
    (tmp_path / "run.json").unlink()
    with pytest.raises(RunError, match=r"no valid run\.json"):
        claim_folder(tmp_path, {"model": "a", "limit": 3})


def test_names_may_contain_brackets(saying: Saying, tmp_path: Path) -> None:
    claim_folder(tmp_path, {})
    ask_shard(saying("A cat."), QUESTIONS, tmp_path, "photos:/x/set[1]")
    assert merge_shards(QUESTIONS, tmp_path, "photos:/x/set[1]")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos-set[1].jsonl", "run.json"]


def test_answers_of_another_suite_are_refused(saying: Saying, tmp_path: Path) -> None:
    whole(saying("A cat."), tmp_path)
    with pytest.raises(RunError, match="q/0"):
        merge_shards(QUESTIONS[1:], tmp_path, "suite")
    (tmp_path / "suite.jsonl").write_text("[1]\n")
    with pytest.raises(RunError, match="not an answer"):
        merge_shards(QUESTIONS, tmp_path, "suite")


def test_a_question_without_an_image_encodes_none(saying: Saying, tmp_path: Path) -> None:
    molmo = saying("A cat.")
    alone = [question(0, 0, words_alone=True)]
    ask_shard(molmo, alone, tmp_path, "suite")
    lines = merge_shards(alone, tmp_path, "suite")
    assert lines
    assert lines[0]["answer"] == "A cat."
    assert molmo.fake.images == 0
    assert len(molmo.fake.fed[0]) < 40


def test_scores_are_averaged_by_group(saying: Saying, tmp_path: Path) -> None:
    claim_folder(tmp_path, {})
    ask_shard(saying("A cat."), QUESTIONS, tmp_path, "suite")
    found = average_scores(merge_shards(QUESTIONS, tmp_path, "suite") or [], QUESTIONS)
    assert found["q"]["right"].value == 0.5
    assert found["q"]["right"].n == 14
    assert found["q"]["right"].low < 0.5 < found["q"]["right"].high


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_shards_that_do_not_exist(text: str) -> None:
    with pytest.raises(RunError):
        Shard.parse(text)


def test_files_are_named_after_their_suite(tmp_path: Path) -> None:
    assert file_stem("ai2d") == "ai2d"
    assert file_stem(f"photos:{tmp_path}/mine/") == "photos-mine"


@pytest.mark.slow
def test_the_command_survives_kill_9(tmp_path: Path) -> None:
    def command(out: str, *more: str) -> list[str]:
        arguments = ["eval", "--tasks", "nano-val", "--limit", "5", "--out", str(tmp_path / out), "--threads", "1"]
        return [sys.executable, "-m", "molmo_edge.cli", *arguments, *more]

    subprocess.run(command("whole"), check=True, capture_output=True)
    expected = (tmp_path / "whole" / "nano-val.jsonl").read_bytes()
    killed = 0
    while killed < 3:
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = count_answered(tmp_path / "killed", "nano-val") if killed else 0
        while process.poll() is None and count_answered(tmp_path / "killed", "nano-val") < before + 4:
            time.sleep(0.02)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        killed += 1
    subprocess.run(command("killed", "--processes", "2"), check=True, capture_output=True)
    assert (tmp_path / "killed" / "nano-val.jsonl").read_bytes() == expected
    results = json.loads((tmp_path / "killed" / "results.json").read_text())
    assert results == json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["nano-val"]["point/scenes"]["f1"]["n"] > 4
