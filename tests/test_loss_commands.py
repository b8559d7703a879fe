"""`molmo-edge eval` and `molmo-edge loss` from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from exported import bundle

from molmo_edge.cli.eval import shard_environment

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def photos(tmp_path: Path, golden: Path) -> Path:
    """One photo with short answers: random weights do not generate the end token."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "coffee.png").write_bytes((golden / "coffee.png").read_bytes())
    fields = {"total": "9", "date": "1.1.", "company": "A"}
    (folder / "annotations.jsonl").write_text(
        json.dumps({"image": "coffee.png", "source": "receipts", "fields": fields, "objects": []})
    )
    return folder


def test_eval_writes_answers_and_results(cli: Cli, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["eval", bundle("molmoe"), "--tasks", f"photos:{photos}", "--max-crops", 0, "--out", out]
    status, stdout, stderr = cli(*arguments)
    assert status == 0
    assert "read/receipts" in stdout
    assert "anls" in stdout
    assert str(out) in stderr
    lines = [json.loads(line) for line in (out / "photos-photos.jsonl").read_text().splitlines()]
    assert [line["question"] for line in lines if line["group"] == "read/receipts"] == [
        "What is the total?",
        "What is the date?",
        "Which company is this from?",
    ]
    status, again, _ = cli(*arguments, "--json")
    found = json.loads(again)
    assert found["results"] == json.loads((out / "results.json").read_text())
    assert found["results"][f"photos:{photos}"]["read/receipts"]["anls"]["n"] == 3
    status, _, stderr = cli(*[*arguments[:-3], 1, "--out", out])
    assert status == 1
    assert "another run (max_crops: 0 in the folder, 1 now)" in stderr


def test_eval_runs_in_shards(cli: Cli, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["eval", bundle("molmoe"), "--tasks", f"photos:{photos}", "--max-crops", 0, "--out", tmp_path / "run"]
    for shard in ("1/2", "2/2"):
        status, stdout, stderr = cli(*arguments, "--shard", shard)
        assert (status, stdout) == (0, "")
        assert "without --shard to merge them" in stderr
    status, stdout, _ = cli(*arguments)
    assert status == 0
    assert "anls" in stdout
    monkeypatch.setattr("molmo_edge.system.cores.available_cores", lambda *_: 7)
    status, _, stderr = cli(*arguments, "--threads", 7)
    assert status == 1
    assert "7 now" in stderr, "another number of threads may round to other answers"


def test_each_process_sees_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [shard_environment("cuda", i)["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["3", "5", "3"]
    assert shard_environment("cpu", 1)["CUDA_VISIBLE_DEVICES"] == "3,5"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert shard_environment("cuda", 1)["CUDA_VISIBLE_DEVICES"] == "1"


def test_loss_prints_what_was_lost(cli: Cli, photos: Path, tmp_path: Path) -> None:
    arguments = ["loss", bundle("molmoe"), bundle("molmoe"), bundle("molmoe", "int8"), "--max-crops", 0]
    arguments += ["--precision", "fp32"]  # of checkpoints, which these are not
    arguments += ["--suite", f"photos:{photos}"]
    status, stdout, stderr = cli(*arguments, "--report", tmp_path / "report", "--noise", "none", "--quiet")
    assert (status, stderr) == (0, "")
    assert "KL per token, mean" in stdout
    assert "expert agreement" in stdout
    assert "read/receipts" in stdout
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.html", "loss.json"}
    copy, int8 = json.loads((tmp_path / "report" / "loss.json").read_text())["candidates"]
    assert copy["figures"]["kl_mean"]["value"] == 0 < int8["figures"]["kl_mean"]["value"]
    status, stdout, _ = cli(*arguments, "--kinds", "read, absent", "--noise", "none", "--quiet", "--json")
    assert status == 0
    assert {group.split("/")[0] for group in json.loads(stdout)["candidates"][0]["scores"]} == {"read", "absent"}
    status, _, stderr = cli(*arguments, "--kinds", "read,poems")
    assert status == 2
    assert '"poems"' in stderr


def test_plain_photos_are_compared_without_scores(cli: Cli, golden: Path, tmp_path: Path) -> None:
    """Without annotations there are no scores; all other metrics need no true answers."""
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "coffee.png").write_bytes((golden / "coffee.png").read_bytes())
    (photos / "prompts.jsonl").write_text('{"image": "coffee.png", "question": "What is it?"}')
    suite = f"photos:{photos}"
    arguments = [
        "loss",
        bundle("molmoe"),
        bundle("molmoe"),
        bundle("molmoe", "int8"),
        "--max-crops",
        0,
        "--suite",
        suite,
    ]
    report = tmp_path / "report"
    status, stdout, stderr = cli(*arguments, "--report", report, "--noise", "none", "--quiet")
    assert (status, stderr) == (0, "")
    assert "KL per token, mean" in stdout
    assert "identical answers" in stdout
    assert "scores, %" not in stdout
    copy, int8 = json.loads((report / "loss.json").read_text())["candidates"]
    assert copy["scores"] == int8["scores"] == {}
    assert {"vision", "image", "kl_mean", "same_top", "perplexity_ratio", "router", "same_answer"} <= set(
        int8["figures"]
    )
    assert copy["figures"]["kl_mean"]["value"] == 0 < int8["figures"]["kl_mean"]["value"]
    assert "<h2>Scores</h2>" not in (report / "report.html").read_text()
    status, _, stderr = cli("eval", bundle("molmoe"), "--tasks", suite, "--out", tmp_path / "run")
    assert status == 1
    assert "nothing can be scored. Photos need an annotations.jsonl" in stderr


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--suite", "nothing"], 1, '"nothing" is not a known suite'),
        (["--suite", "photos"], 1, "needs a folder"),
        (["--noise", "luck"], 2, "luck"),
        (["--llama", "cache=q8_0"], 1, "none of these has one"),
        (["--report", "{file}"], 1, "is a file"),
        (["--limit", "0"], 2, "limit"),
    ],
)
def test_errors_are_reported_before_measuring(
    cli: Cli, tmp_path: Path, more: list[str], status: int, message: str
) -> None:
    (tmp_path / "file").write_text("")
    given = [part.replace("{file}", str(tmp_path / "file")) for part in more]
    found, stdout, stderr = cli("loss", bundle("molmoe"), bundle("molmoe"), *given)
    assert (found, stdout) == (status, "")
    assert message in stderr


def test_wrong_arguments_are_refused(cli: Cli, tmp_path: Path) -> None:
    for arguments, status, message in (
        (["eval", "nano", "--tasks", "nano-val", "--shard", "1/2", "--processes", "2"], 2, "--processes"),
        (["eval", tmp_path / "nothing"], 1, "nothing"),
        (["eval", "--shard", "3/2"], 1, "does not exist"),
        (["loss", bundle("molmoe"), bundle("qwen")], 1, "have different tokenizers"),
    ):
        found, _, stderr = cli(*arguments)
        assert found == status, (arguments, stderr)
        assert message in stderr, (arguments, stderr)


def test_tables_are_printed_if_the_report_cannot_be_written(cli: Cli, photos: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"
    (report / "loss.json").mkdir(parents=True)  # a rename onto it fails
    (report / "loss.json" / "full").touch()
    model = bundle("molmoe")
    arguments = ["loss", model, model, "--suite", f"photos:{photos}", "--max-crops", 0, "--noise", "none"]
    status, stdout, stderr = cli(*arguments, "--report", report)
    assert status == 1
    assert "all metrics" in stdout
    assert stderr.splitlines()[-1].endswith(f": {report / 'loss.json'}")
    assert ".part" not in stderr
    assert [path.name for path in report.iterdir()] == ["loss.json"]


def test_tables_are_printed_if_results_cannot_be_written(cli: Cli, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "results.json" / "full").mkdir(parents=True)
    status, stdout, stderr = cli(
        "eval", bundle("molmoe"), "--tasks", f"photos:{photos}", "--max-crops", 0, "--out", out
    )
    assert status == 1
    assert "anls" in stdout
    assert stderr.splitlines()[-1].endswith(f": {out / 'results.json'}")


def test_an_image_that_cannot_be_read_is_reported_and_left_out(cli: Cli, golden: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "coffee.png").write_bytes((golden / "coffee.png").read_bytes())
    (photos / "broken.png").write_bytes((golden / "coffee.png").read_bytes()[:999])
    lines = [{"image": f"{name}.png", "question": "What is it?"} for name in ("broken", "coffee")]
    (photos / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    model, report = bundle("molmoe"), tmp_path / "report"
    arguments = ["loss", model, model, "--suite", f"photos:{photos}", "--max-crops", 0, "--noise", "none", "--quiet"]
    status, stdout, stderr = cli(*arguments, "--report", report)
    assert status == 1
    assert "1 image, 1 question" in stdout
    assert "broken.png" in stderr.splitlines()[0]
    assert stderr.splitlines()[1:] == ["molmo-edge: 1 image could not be read"]
    assert json.loads((report / "loss.json").read_text())["questions"] == 1
    (photos / "coffee.png").unlink()
    (photos / "prompts.jsonl").write_text(json.dumps(lines[0]))
    status, stdout, stderr = cli(*arguments)
    assert (status, stdout) == (1, "")
    assert "no image can be read" in stderr
