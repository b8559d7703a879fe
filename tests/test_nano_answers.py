"""Nano's stage "answers" on a few drawn pictures: it learns, resumes, and keeps its pictures and its order."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from PIL import Image

from molmo_edge.config import DecoderConfig, ImageConfig, MolmoConfig, VisionConfig
from molmo_edge.data.annotated_photos import load_photos
from molmo_edge.data.drawn.sprites import Assets
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import Molmo, load_checkpoint, save_checkpoint
from molmo_edge.training.attention_loss import AttentionLoss
from molmo_edge.training.encoding import Encoder
from molmo_edge.training.optimizer import OptimizerConfig, Rate
from molmo_edge.training.recipe import ExpertSchedule, Recipe
from molmo_edge.training.trainer import Data, Trainer
from recipes.nano import answers
from recipes.nano.answers import RECIPE, AskedPictures

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parent / "golden"
TINY = dataclasses.replace(
    RECIPE,
    steps=6,
    batch=4,
    micro=2,
    precision="fp32",
    forward=dataclasses.replace(RECIPE.forward, attention_loss=AttentionLoss(0.5, layer=1, heads=3)),
    optimizer=OptimizerConfig(connector=Rate(3e-3, 2), decoder=Rate(3e-3, 2), weight_decay=0.01),
    experts=ExpertSchedule(top_k=2),
    save_every=3,
    log_every=1,
    validate_every=100,
    workers=0,
)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of nano's anatomy, 32 wide, all experts active, with the golden tokenizer."""
    config = MolmoConfig(
        ImageConfig(crop_size=56, overlap_margins=(0, 0), max_crops=1, resize="dino"),
        VisionConfig("dino", 32, 2, 4, 64, n_pos=17, activation="gelu", layers=(-1, -2)),
        DecoderConfig(
            d_model=32,
            n_layers=2,
            n_heads=4,
            n_kv_heads=4,
            ffn_dim=16,
            n_experts=4,
            top_k=4,
            vocab_size=500,
            embedding_size=512,
            additional_vocab_size=16,
            qk_norm=True,
        ),
        projector_dim=32,
    )
    directory = tmp_path_factory.mktemp("start")
    model = Molmo(config).init_weights(std=0.1, generator=torch.Generator().manual_seed(0))
    save_checkpoint(model, GOLDEN / "molmoe" / "tokenizer.json", directory)
    return directory


def assets() -> Assets:
    square = Image.new("RGBA", (40, 40), (220, 30, 30, 255))
    disc = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    disc.paste((30, 30, 220, 255), (4, 4, 36, 36))
    return Assets({"red square": (square,), "blue disc": (disc,)})


@pytest.fixture(scope="module")
def drawn() -> AskedPictures:
    """Eight scenes, of which every one allows a question."""
    return AskedPictures((), 1, assets(), scenes=8, questions=3)


def run(start: Path, pictures: AskedPictures, directory: Path, recipe: Recipe) -> Path:
    return answers.train(start, Data([pictures], [1.0], [pictures]), directory, recipe)


def records(directory: Path) -> dict[int, dict[str, Any]]:
    lines = (json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "loss" in line}


def test_a_resumed_run_equals_one_that_was_never_stopped(
    start: Path, drawn: AskedPictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after step 3 of 6, without the schedules of rates and experts noticing."""
    whole = run(start, drawn, tmp_path / "whole", TINY)
    update, steps = Trainer.update, []

    def stop_after_three(self: Trainer, *args: Any) -> Any:
        if self.step == 3:
            self.checkpoints.finish()
            raise KeyboardInterrupt
        steps.append(self.step)
        return update(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            run(start, drawn, tmp_path / "stopped", TINY)
    assert steps == [0, 1, 2]
    resumed = run(start, drawn, tmp_path / "stopped", TINY)
    assert min(records(tmp_path / "stopped")) == 1
    (ours, _, config), (theirs, _, _) = load_checkpoint(resumed), load_checkpoint(whole)
    assert config.decoder.top_k == 2, "as sparse as the schedule ends"
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    a, b = records(tmp_path / "stopped"), records(tmp_path / "whole")
    assert a.keys() == b.keys() == set(range(1, 7))
    for step, line in a.items():
        assert line["loss"] == pytest.approx(b[step]["loss"], rel=1e-5)
        assert line["attention_loss"] == pytest.approx(b[step]["attention_loss"], rel=1e-5)


def test_it_learns_and_leaves_the_frozen_parts_alone(start: Path, drawn: AskedPictures, tmp_path: Path) -> None:
    recipe = dataclasses.replace(TINY, steps=61, save_every=1000)
    after, _, _ = load_checkpoint(run(start, drawn, tmp_path, recipe))
    log = records(tmp_path)
    assert log[61]["loss"] < 0.5 * log[1]["loss"]
    assert log[61]["attention_loss"] < log[1]["attention_loss"]
    before, _, _ = load_checkpoint(start)
    for name, parameter in before.vision.named_parameters():
        assert torch.equal(parameter, after.vision.get_parameter(name)), name
    assert torch.equal(before.decoder.embedding, after.decoder.embedding)


def test_experts_are_dropped_one_by_one() -> None:
    schedule = ExpertSchedule(top_k=4, dense_share=0.5)
    assert [schedule.at(step, 100, 8) for step in (0, 49, 50, 99)] == [8, 8, 7, 4]
    counts = [schedule.at(step, 100, 8) for step in range(100)]
    assert counts == sorted(counts, reverse=True)
    assert counts[88] == 4, "after three quarters of the second half"


def test_pictures_stay_and_questions_change(drawn: AskedPictures) -> None:
    for index in range(len(drawn)):
        first, again = (drawn.example(index, np.random.default_rng(n)) for n in (0, 1))
        same = drawn.example(index, np.random.default_rng(0))
        assert np.array_equal(first.image, again.image), "so that its features can be cached"
        assert first.annotations == same.annotations
    asked = [[drawn.example(i, np.random.default_rng(n)).annotations for i in range(8)] for n in (0, 1)]
    assert asked[0] != asked[1]


def test_points_have_the_boxes_of_their_objects(start: Path, drawn: AskedPictures) -> None:
    tokenizer = Tokenizer.from_file(start / "tokenizer.json")
    _, _, config = load_checkpoint(start)
    encode = Encoder(tokenizer, config.image, RECIPE.encoding)
    checked = 0
    for index in range(len(drawn)):
        example = drawn.example(index, np.random.default_rng(index))
        for annotation in example.annotations:
            points = annotation.messages[-1].count('x="') or annotation.messages[-1].count(" x")
            if annotation.messages[-1].startswith("<point"):
                assert len(annotation.boxes) == points
        sample = encode(example, np.random.default_rng(index))
        if sample.attended is not None:
            for at in sample.attended.queries:
                assert tokenizer.decode(sample.packed.input_ids[: at + 1].tolist()).endswith('="')
                checked += 1
    assert checked


def test_photographs_come_unchanged_and_augmented(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    cup = {"label": "cup", "boxes": [[10, 10, 60, 60]], "points": [[35, 35]]}
    row = {"image": "a.png", "source": "coco", "split": "train", "objects": [cup]}
    (tmp_path / "annotations.jsonl").write_text(json.dumps(row) + "\n")
    data = AskedPictures(load_photos(tmp_path, "train"), 3, assets(), scenes=2)
    assert len(data) == 5
    assert np.array_equal(data.picture(0)[0], rgb)
    assert not np.array_equal(data.picture(1)[0], data.picture(2)[0])
    assert data.picture(3)[1]["source"] == data.picture(4)[1]["source"] == "scene"
    assert data.vocabulary == ["blue disc", "cup", "red square"]
    sets = answers.data([tmp_path], None)
    assert len(sets.sets[0]) == answers.COPIES, "without sprites there are photographs alone"
