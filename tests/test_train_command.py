"""molmo-edge train: from drawn pictures to a model that can be asked, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from molmo_edge import Molmo as Sdk
from molmo_edge.cli import main
from molmo_edge.data.drawn.generate import generate

GOLDEN = Path(__file__).parent / "golden"
SMALL = ["--steps", "3", "--batch", "2", "--micro", "1", "--workers", "0", "--device", "cpu", "--log-every", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for kind, name in (("points", "pixmo-points"), ("charts", "pixmo_docs_charts"), ("clocks", "pixmo_clocks")):
        generate(kind, 25, folder / name)
    captions = folder / "pixmo_cap_with_transcripts"
    captions.mkdir()
    pictures = sorted((folder / "pixmo-points").rglob("*.jpg")) + sorted((folder / "pixmo-points").rglob("*.png"))
    rows = [
        {"image": str(path), "caption": f"Shapes, {i} of them.", "transcripts": ["um, shapes", "a few shapes"]}
        for i, path in enumerate(pictures[:25])
    ]
    (captions / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return int(end.value.code or 0)


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_multitask_on_drawn_pictures(
    small_molmoe: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    options = ["--from", small_molmoe, "--data", data, "--out", run, *SMALL, "--validate", "pixmo_docs_charts"]
    assert command("train", "multitask", *options) == 0
    said = capsys.readouterr()
    assert "step 3/3" in said.out
    assert "data sets left out: pixmo_ask_model_anything" in said.err
    lines = log(run)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    last = lines[-2]
    for name in ("tokens_per_second", "utilisation", "expert_load_max", "norm_vision", "rate_decoder", "accuracy"):
        assert name in last
    assert 0 < lines[-1]["validation_loss"] < 20
    before = Sdk(small_molmoe).ask(GOLDEN / "astronaut.png", "Point to her.", max_new_tokens=5)
    after = Sdk(run / "model").ask(GOLDEN / "astronaut.png", "Point to her.", max_new_tokens=5)
    assert len(before.token_ids) == len(after.token_ids) == 5
    # The same command once more: there is nothing left to do.
    assert command("train", "multitask", *options) == 0
    assert log(run) == lines


def test_features_of_a_frozen_tower_are_cached(
    small_molmoe: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--from", small_molmoe, "--data", data, *SMALL, "--sets", "pixmo_cap_with_transcripts"]
    cache = ["--features", tmp_path / "features"]
    assert command("train", "caption", *options, "--out", tmp_path / "trained", *cache) == 1
    assert 'add "vision" to the frozen parts' in capsys.readouterr().err
    for name, features in (("cached", cache), ("crops", [])):
        assert command("train", "caption", *options, "--out", tmp_path / name, "--freeze", "vision", *features) == 0
    files = len(list((tmp_path / "features").rglob("*.safetensors")))
    assert f"training on pixmo_cap_with_transcripts ({files})" in capsys.readouterr().err
    cached, crops = ([line["loss"] for line in log(tmp_path / name) if "loss" in line] for name in ("cached", "crops"))
    assert cached == pytest.approx(crops, rel=1e-4)


def test_captions_know_a_length_and_no_roles(small_molmoe: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--freeze", "vision", "--rates", "connector=1e-3", "--states", "fp32", "--separator"]
    assert command("train", "caption", "--from", small_molmoe, "--data", data, "--out", run, *SMALL, *options) == 0
    last = log(run)[-1]
    assert "norm_vision" not in last
    assert last["rate_connector"] > last["rate_decoder"]
    from safetensors.numpy import load_file

    old, new = (load_file(folder / "model.safetensors") for folder in (small_molmoe, run / "model"))
    name = "model.vision_backbone.image_vit.patch_embedding.weight"
    assert (old[name] == new[name]).all(), "frozen"
    assert (old["model.transformer.wte.embedding"] == new["model.transformer.wte.embedding"]).all(), "always frozen"
    assert (old["lm_head.weight"] != new["lm_head.weight"]).any()


def test_it_says_what_is_wrong(small_molmoe: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def complaint(status: int, *options: object) -> str:
        base = ["--from", small_molmoe, "--data", data, "--out", tmp_path / "run", *SMALL]
        assert command("train", "multitask", *base, *options) == status
        return " ".join(capsys.readouterr().err.split())

    assert "has none of the stage's data sets" in complaint(1, "--data", tmp_path)
    assert "unknown data sets: vqa9" in complaint(1, "--sets", "pixmo_cap,vqa9")
    assert "has no copies of pixmo_cap" in complaint(1, "--sets", "pixmo_cap,pixmo_points")
    assert '"molmo-9b" is not a known preset' in complaint(2, "--preset", "molmo-9b")
    assert "--rates takes connector=NUMBER" in complaint(2, "--rates", "decoder=fast")
    assert "--freeze takes" in complaint(2, "--freeze", "head")
    assert "not a multiple of 1 ranks x 3" in complaint(1, "--micro", "3")
    assert "every part of the model is frozen" in complaint(1, "--freeze", "vision,connector,decoder")


def write_points(folder: Path, side: int = 64, count: int = 12) -> Path:
    from PIL import Image

    folder.mkdir()
    lines = ["image,label,x,y"]
    for i in range(count):
        Image.new("RGB", (side, side), (10 * i, 200, 30)).save(folder / f"{i}.png")
        lines += [f"{i}.png,cup,{i + 3},{20 + i}", f"{i}.png,cup,50,{i + 1}"]
    (folder / "points.csv").write_text("\n".join(lines))
    return folder


def stored_in(checkpoint: Path) -> set[str]:
    from molmo_edge.checkpoints.weight_files import open_tensors

    tensors = open_tensors(checkpoint)
    return {tensors.dtype(name) for name in tensors.names()}


@pytest.mark.parametrize("base", ["auto", "nf4"])
def test_points_of_ones_own(small_molmoe: Path, tmp_path: Path, base: str, capsys: pytest.CaptureFixture) -> None:
    folder, run = write_points(tmp_path / "points"), tmp_path / "run"
    options = ["--from", small_molmoe, "--out", run, *SMALL, "--base", base, "--rank", "4"]
    assert command("train", "points", folder, *options) == 0
    said = capsys.readouterr()
    assert "11 pictures for training, 1 for validation" in said.err
    assert "validation: loss" in said.out
    assert (run / "adapters.safetensors").stat().st_size < 500_000
    answer = Sdk(run / "model").ask(folder / "3.png", "Point to the cup.", max_new_tokens=5)
    assert len(answer.token_ids) == 5
    assert stored_in(run / "model") == {"F32"}, "as the checkpoint"
    assert command("train", "points", folder, *options, "--merge-dtype", "bf16") == 0
    assert stored_in(run / "model") == {"BF16"}
    capsys.readouterr()
    assert command("train", "points", folder, "--from", small_molmoe, "--out", small_molmoe) == 1
    assert "is the checkpoint itself" in capsys.readouterr().err
    assert command("train", "points", folder, "--from", small_molmoe, "--out", folder / ".") == 1
    assert "is the folder of the pictures" in capsys.readouterr().err
    assert command("train", "points", folder, "--from", "nano", "--out", run) == 1
    assert "nano is a bundle, but training starts from a checkpoint" in capsys.readouterr().err
    other = write_points(tmp_path / "other")
    assert command("train", "points", other, *options) == 1
    assert "a run with different settings: data" in capsys.readouterr().err
    with (folder / "points.csv").open("a") as file:  # said twice, so that it is the same run
        file.write("\n0.png,cup,50,1\n")
    assert command("train", "points", folder, *options) == 0
    assert "counted once: line 26 of " in capsys.readouterr().err
    (folder / "points.csv").write_text("image,label,x,y\n0.png,cup,999,3")
    assert command("train", "points", folder, *options) == 1
    assert "points.csv" in capsys.readouterr().err


def test_data_that_cannot_be_used_is_one_sentence(small_molmoe: Path, tmp_path: Path) -> None:
    folder = write_points(tmp_path / "points", side=600)
    options = ["--from", small_molmoe, "--out", tmp_path / "run", *SMALL, "--sequence", "64", "--workers", "1"]
    arguments = [sys.executable, "-m", "molmo_edge.cli", "train", "points", *map(str, [folder, *options])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("molmo-edge: 20 examples in a row cannot be used"), done.stderr
    assert not any(word in done.stderr for word in ("Traceback", "worker", "rank0"))


@pytest.mark.parametrize(("batch", "ranks", "micro"), [(1, 1, 1), (6, 1, 3), (8, 1, 4), (8, 4, 2)])
def test_the_default_micro_batch_divides_the_batch(
    batch: int, ranks: int, micro: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from molmo_edge.cli.train_options import RunOptions
    from molmo_edge.training.recipe import Recipe

    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert RunOptions(batch=batch).changed(Recipe(10, 16, ())).micro == micro


def test_ctrl_c_leaves_a_checkpoint_that_goes_on(small_molmoe: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--from", small_molmoe, "--data", data, "--out", run, *SMALL, "--steps", "400", "--workers", "1"]
    arguments = [sys.executable, "-m", "molmo_edge.cli", "train", "multitask", *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 100
    while not (run / "log.jsonl").exists() or len(log(run)) < 3:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "stopped by a signal after saving a checkpoint" in out
    (checkpoint,) = (run / "checkpoints").iterdir()
    stopped = int(checkpoint.name.removeprefix("step-"))
    assert log(run)[-1]["step"] == stopped < 400
    shorter = [str(o) for o in options]
    shorter[shorter.index("400")] = str(stopped + 1)
    assert command("train", "multitask", *shorter) == 0
    assert [line["step"] for line in log(run) if "loss" in line][-1] == stopped + 1
