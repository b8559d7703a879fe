"""The trainer on a handful of tiny pictures: it learns, resumes, and keeps its order."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from molmo_edge.config import DecoderConfig, ImageConfig, MolmoConfig, VisionConfig
from molmo_edge.data.drawn.sprites import Assets
from molmo_edge.frontend.crops import ImageProcessor
from molmo_edge.modeling import Molmo, load_checkpoint, save_checkpoint
from molmo_edge.training.batches import PackedQuestions, Visits, collate
from molmo_edge.training.features import pictures, read_sample, write_features
from molmo_edge.training.nano import Run, TrainConfig, experts_at, scale_at

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["red square", "blue disc"]
TINY = TrainConfig(
    align_steps=4, align_batch=4, steps=6, batch=4, questions=3, warmup=2, looking_layer=1, save_every=3, val_every=100
)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of nano's anatomy, 32 wide, with the golden tokenizer."""
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


@pytest.fixture(scope="module")
def cache(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight drawn pictures as features."""
    square = Image.new("RGBA", (40, 40), (220, 30, 30, 255))
    disc = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    disc.paste((30, 30, 220, 255), (4, 4, 36, 36))
    assets = Assets({"red square": (square,), "blue disc": (disc,)})
    model, tokenizer, config = load_checkpoint(start)
    out = tmp_path_factory.mktemp("cache")
    todo = [(name, make) for name, make in pictures(assets, [], scenes=8, copies=1, seed=0)]
    write_features(model, ImageProcessor(config.image, tokenizer.special), iter(todo), out)
    return out


def run(start: Path, cache: Path, directory: Path, config: TrainConfig) -> Run:
    return Run(start, [cache], [cache], directory, config, NAMES, "cpu")


def records(directory: Path) -> dict[tuple[str, int], dict[str, Any]]:
    lines = (json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines())
    return {(r["stage"], r["step"]): r for r in lines if r["stage"] in ("align", "answer")}


def test_features_are_the_vits_own(start: Path, cache: Path) -> None:
    model, _, _ = load_checkpoint(start)
    sample = read_sample(sorted(cache.glob("*.npz"))[0])
    assert sample.features.dtype == np.float16
    assert sample.annotation["objects"]
    assert len(sample.features) == len(sample.masks) == len(sample.token_index)
    assert sample.features.shape[2] == model.config.vision.feature_dim


def test_a_resumed_run_equals_one_that_was_never_stopped(start: Path, cache: Path, tmp_path: Path) -> None:
    whole = run(start, cache, tmp_path / "whole", TINY)
    whole.train()
    stopped = run(start, cache, tmp_path / "stopped", TINY)
    stopped._stage("align", TINY.align_steps, TINY.align_batch)
    # Stop after step 3 of 6 of the second stage, without the schedule noticing.
    update, seen = stopped._update, []

    def stop_after_three(stage: str, step: int, steps: int, batch: Any) -> dict[str, float]:
        if step == 3:
            raise KeyboardInterrupt
        seen.append(step)
        return update(stage, step, steps, batch)

    stopped._update = stop_after_three  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped._stage("answer", TINY.steps, TINY.batch)
    assert seen == [0, 1, 2]
    resumed = run(start, cache, tmp_path / "stopped", TINY)
    assert resumed.step == {"align": 4, "answer": 3}
    resumed.train()
    for (name, ours), (_, theirs) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)
    again, _, config = load_checkpoint(tmp_path / "stopped" / "checkpoint")
    assert config.decoder.top_k == 2
    assert torch.equal(again.decoder.head.weight, resumed.model.decoder.head.weight)


def test_it_learns_and_leaves_the_frozen_parts_alone(start: Path, cache: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, steps=61, lr_connector=3e-3, lr_decoder=3e-3, save_every=1000)
    trained = run(start, cache, tmp_path, config)
    trained.train()
    log = records(tmp_path)
    assert log["answer", 60]["answer"] < 0.5 * log["answer", 0]["answer"]
    before, _, _ = load_checkpoint(start)
    for name, parameter in before.vision.named_parameters():
        assert torch.equal(parameter, trained.model.vision.get_parameter(name)), name
    assert torch.equal(before.decoder.embedding, trained.model.decoder.embedding)


def test_point_queries_stand_before_each_x(start: Path, cache: Path) -> None:
    _, tokenizer, config = load_checkpoint(start)
    data = PackedQuestions([cache], tokenizer, config, questions=6, names=NAMES, seed=0)
    checked = 0
    for index in range(len(data)):
        item = data[index, 0]
        ids = item["packed"].input_ids
        for at in item["queries"]:
            text = tokenizer.decode(ids[: at + 1].tolist())
            assert text.endswith('="') and text[-5:-2].strip(" x0123456789t") == "", text[-20:]
            assert tokenizer.decode([int(ids[at + 1])]).isdigit()
            checked += 1
    assert checked


def test_every_picture_is_visited_once_a_round() -> None:
    first = [key for batch in Visits([7, 9], 2, 0, 7, seed=1) for key in batch]
    assert len(set(first)) == len(first) == 14, "the odd ones of both groups wait for the next round"
    assert [key for batch in Visits([7, 9], 2, 4, 7, seed=1) for key in batch] == first[8:]
    for batch in Visits([7, 9], 2, 0, 14, seed=1):
        assert len({index < 7 for index, _ in batch}) == 1, "a batch is of one group"


def test_batches_are_padded_to_few_lengths(start: Path, cache: Path) -> None:
    _, tokenizer, config = load_checkpoint(start)
    data = PackedQuestions([cache], tokenizer, config, questions=3, names=NAMES, seed=0)
    batch = collate([data[i, 0] for i in range(3)])
    assert batch["ids"].shape[1] % 64 == 0
    assert len(batch["answered"]) % 64 == 0
    assert torch.isfinite(batch["loss_weights"]).all()
    assert (batch["targets"] != -100).sum() == (batch["loss_weights"] > 0).sum()


def test_schedules() -> None:
    assert scale_at(0, 100, 10) == pytest.approx(0.1)
    assert scale_at(10, 100, 10) == 1.0
    assert scale_at(100, 100, 10) == pytest.approx(0.1)
    config = TrainConfig(steps=100, dense_share=0.5)
    assert [experts_at(s, config, 8, 4) for s in (0, 49, 50, 99)] == [8, 8, 7, 4]
