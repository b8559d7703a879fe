"""Runs that train adapters: to a merged checkpoint, stopped and resumed, on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_checkpoints import PLAIN, a_batch, a_recipe, close, hidden, write_checkpoint
from torch.distributed.checkpoint import FileSystemReader

from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import load_checkpoint
from molmo_edge.training.adapters import (
    ADAPTERS,
    AdaptersFile,
    LoraTrainer,
)
from molmo_edge.training.forward import Trainable
from molmo_edge.training.lora import (
    LoraConfig,
    build_adapted,
)
from molmo_edge.training.parallel import World, world
from molmo_edge.training.recipe import Recipe
from molmo_edge.training.run_checkpoints import ResumeError
from molmo_edge.training.trainer import Data

pytestmark = pytest.mark.usefixtures("one_thread")


def a_trainer(checkpoint: Path, directory: Path, recipe: Recipe, here: World, base: str = "fp32") -> LoraTrainer:
    from training_run import Noise

    lora = LoraConfig(rank=4, expert_rank=2)
    model = build_adapted(checkpoint, recipe, here, lora, base)
    tokenizer = Tokenizer.from_file(checkpoint / "tokenizer.json")
    data = Data([Noise("few", 3, 2)], [1.0])
    return LoraTrainer(model, tokenizer, data, recipe, directory, here, checkpoint=checkpoint, lora=lora)


def losses(directory: Path) -> list[float]:
    lines = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_a_run_from_a_checkpoint_to_a_merged_one(small_checkpoints: dict[str, Path], tmp_path: Path, base: str) -> None:
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    checkpoint = small_checkpoints["experts"]
    frozen = (checkpoint / "model.safetensors").read_bytes()
    with world("cpu") as here:
        trainer = a_trainer(checkpoint, tmp_path, a_recipe(), here, base)
        trainer.train()
        log = losses(tmp_path)
        assert len(log) == 8
        assert log[-1] < 0.9 * log[0]
        assert (checkpoint / "model.safetensors").read_bytes() == frozen
        merged, _, _ = load_checkpoint(tmp_path / "model")
        batch, ours = a_batch(checkpoint), trainer.model.molmo
        if base == "fp32":
            close(hidden(merged, batch), hidden(ours, batch), 1e-4)
        start, _, _ = load_checkpoint(checkpoint)
        trainer.step = 0
        learned = next(iter(trainer.batches())).batch
        before, after = (Trainable(m, PLAIN).eval()(learned).cross_entropy.item() for m in (start, merged))
        assert after < 0.9 * before
        kept = FileSystemReader(tmp_path / "checkpoints" / "step-00000008").read_metadata().state_dict_metadata
        assert {n for n in kept if n.startswith("model.")} == {f"model.{n}" for n in trainer.optimizer.parameters}

        # Resumed at the end, it is unchanged; with another base or other adapters it is refused.
        again = a_trainer(checkpoint, tmp_path, a_recipe(), here, base)
        assert again.step == 8
        for (name, one), other in zip(ours.named_parameters(), again.model.molmo.parameters(), strict=True):
            assert torch.equal(one, other), name
        stranger = write_checkpoint(tmp_path / "stranger", "experts", seed=3)
        with pytest.raises(ResumeError, match="different settings: base"):
            a_trainer(stranger, tmp_path, a_recipe(), here, base)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    small_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint, ends = small_checkpoints["dense"], []
    with world("cpu") as here:
        for name in ("whole", "stopped"):
            trainer = a_trainer(checkpoint, tmp_path / name, a_recipe(), here)
            if name == "stopped":
                one = trainer.update

                def stop(micro, window, trainer=trainer, one=one):  # type: ignore[no-untyped-def]
                    if trainer.step == 5:
                        raise KeyboardInterrupt
                    return one(micro, window)

                trainer.update = stop  # type: ignore[method-assign]
                with pytest.raises(KeyboardInterrupt):
                    trainer.train()
                trainer.checkpoints.finish()
                trainer = a_trainer(checkpoint, tmp_path / name, a_recipe(), here)
                assert trainer.step == 4
            trainer.train()
            ends.append(AdaptersFile.open(tmp_path / name / ADAPTERS))
    for name in ends[0].names:
        close(ends[0].get(name), ends[1].get(name), 1e-4)


@pytest.mark.slow
def test_two_ranks_train_the_adapters_of_one(small_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for ranks in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [__file__, str(small_checkpoints["experts"]), str(tmp_path / str(ranks))]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)
    one, two = (AdaptersFile.open(tmp_path / n / ADAPTERS) for n in "12")
    assert one.names == two.names
    for name in one.names:
        torch.testing.assert_close(two.get(name), one.get(name), rtol=2e-3, atol=5e-5, msg=name)


if __name__ == "__main__":
    with world("cpu") as here:
        a_trainer(Path(sys.argv[1]), Path(sys.argv[2]), a_recipe(), here).train()


def test_a_disk_that_is_full_ends_no_run(
    small_checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures import Future

    from torch.distributed.checkpoint.api import CheckpointException

    whole, failed = torch.distributed.checkpoint.async_save, []

    def full(*args: object, **options: object) -> object:
        if failed:
            return whole(*args, **options)  # type: ignore[arg-type]
        failed.append(Future())
        failed[0].set_exception(CheckpointException("write", {0: (OSError("No space left on device"), None)}))
        return failed[0]

    monkeypatch.setattr("molmo_edge.training.run_checkpoints.async_save", full)
    with world("cpu") as here:
        trainer = a_trainer(small_checkpoints["dense"], tmp_path, a_recipe(), here)
        trainer.train()
    notes = [json.loads(line).get("note", "") for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (note,) = (note for note in notes if note)
    assert "step-00000004 could not be written: No space left on device; it takes " in note
    assert " were free; the run continues" in note
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000008"]


def test_another_rank_is_refused_in_one_sentence(small_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with world("cpu") as here:
        a_trainer(small_checkpoints["dense"], tmp_path, a_recipe(), here).train()
    checkpoint = tmp_path / "checkpoints" / "step-00000008"
    state = json.loads((checkpoint / "run.json").read_text())
    state["identity"]["adapters"]["rank"] = 3
    (checkpoint / "run.json").write_text(json.dumps(state))
    with world("cpu") as here, pytest.raises(ResumeError, match="different settings: adapters"):
        a_trainer(small_checkpoints["dense"], tmp_path, a_recipe(), here)
    (checkpoint / ".metadata").write_bytes(b"damaged")
    state["identity"]["adapters"]["rank"] = 4
    (checkpoint / "run.json").write_text(json.dumps(state))
    with world("cpu") as here, pytest.raises(ResumeError, match=r"cannot resume from .*damaged"):
        a_trainer(small_checkpoints["dense"], tmp_path, a_recipe(), here)
