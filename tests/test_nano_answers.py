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
from safetensors.torch import load_file, save_file

from molmo_edge.config import DecoderConfig, ImageConfig, MolmoConfig, VisionConfig
from molmo_edge.data.annotated_photos import Photo
from molmo_edge.data.drawn.sprites import Assets
from molmo_edge.data.examples import Annotation
from molmo_edge.data.grounded_questions import write_questions
from molmo_edge.data.regions import Box
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import Molmo, load_checkpoint, save_checkpoint
from molmo_edge.training.attention_loss import AttentionLoss
from molmo_edge.training.encoding import Encoder
from molmo_edge.training.optimizer import OptimizerConfig, Rate
from molmo_edge.training.recipe import ExpertSchedule, Recipe
from molmo_edge.training.regions import HeatMapHead
from molmo_edge.training.trainer import Trainer
from recipes.nano import answers, student
from recipes.nano.answers import RECIPE
from recipes.nano.asked_pictures import AskedPictures, asked_pictures, follow_ups, photo_annotation, scene_regions
from recipes.nano.photos import Augmentation, Picture, Vocabulary, cut, mosaic
from recipes.nano.pointing import add_point_head, with_point_head

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parent / "golden"
TINY = dataclasses.replace(
    RECIPE,
    steps=6,
    batch=4,
    micro=2,
    precision="fp32",
    optimizer=OptimizerConfig(
        connector=Rate(3e-3, 2), decoder=Rate(3e-3, 2), point_head=Rate(3e-3, 2), weight_decay=0.01
    ),
    experts=ExpertSchedule(top_k=2),
    save_every=3,
    log_every=1,
    validate_every=100,
    workers=0,
)


@pytest.fixture(scope="module")
def sight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stage "sight" leaves: a checkpoint of nano's anatomy, 32 wide, all experts active, and its heat maps."""
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
    directory = tmp_path_factory.mktemp("sight")
    torch.manual_seed(0)
    save_file(HeatMapHead(config).state_dict(), directory / "heat_maps.safetensors")
    model = Molmo(config).init_weights(std=0.1, generator=torch.Generator().manual_seed(0))
    save_checkpoint(model, GOLDEN / "molmoe" / "tokenizer.json", directory)
    return directory


@pytest.fixture(scope="module")
def start(sight: Path, drawn: AskedPictures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a grounding head."""
    directory = tmp_path_factory.mktemp("start")
    photo = directory / "a.png"
    Image.fromarray(drawn.example(0, np.random.default_rng(0)).image).save(photo)
    add_point_head(sight, sight / "heat_maps.safetensors", [Photo(photo, {})], directory / "model")
    return directory / "model"


def assets() -> Assets:
    square = Image.new("RGBA", (40, 40), (220, 30, 30, 255))
    disc = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    disc.paste((30, 30, 220, 255), (4, 4, 36, 36))
    return Assets({"red square": (square,), "blue disc": (disc,)})


@pytest.fixture(scope="module")
def drawn() -> AskedPictures:
    """Eight scenes, of which every one allows a question."""
    names = Vocabulary([], [], assets().names)
    return AskedPictures([], names, None, assets(), scenes=8, questions=3)


def run(sight: Path, start: Path, pictures: AskedPictures, directory: Path, recipe: Recipe) -> Path:
    return answers.train(start, sight / "heat_maps.safetensors", pictures, pictures, directory, recipe)


def records(directory: Path) -> dict[int, dict[str, Any]]:
    lines = (json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "loss" in line}


def test_a_resumed_run_equals_one_that_was_never_stopped(
    sight: Path, start: Path, drawn: AskedPictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after step 3 of 6, without the schedules of rates and experts noticing."""
    whole = run(sight, start, drawn, tmp_path / "whole", TINY)
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
            run(sight, start, drawn, tmp_path / "stopped", TINY)
    assert steps == [0, 1, 2]
    resumed = run(sight, start, drawn, tmp_path / "stopped", TINY)
    assert min(records(tmp_path / "stopped")) == 1
    (ours, _, config), (theirs, _, _) = load_checkpoint(resumed), load_checkpoint(whole)
    assert config.decoder.top_k == 2, "as sparse as the schedule ends"
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    a, b = records(tmp_path / "stopped"), records(tmp_path / "whole")
    assert a.keys() == b.keys() == set(range(1, 7))
    for step, line in a.items():
        assert line["loss"] == pytest.approx(b[step]["loss"], rel=1e-5)
        assert line["point_loss"] == pytest.approx(b[step]["point_loss"], rel=1e-5)
        assert line["heat_map_loss"] == pytest.approx(b[step]["heat_map_loss"], rel=1e-5)


def test_it_learns_and_leaves_the_frozen_parts_alone(
    sight: Path, start: Path, drawn: AskedPictures, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(TINY, steps=61, save_every=1000)
    after, _, _ = load_checkpoint(run(sight, start, drawn, tmp_path, recipe))
    log = records(tmp_path)
    assert log[61]["loss"] < 0.5 * log[1]["loss"]
    assert log[61]["point_loss"] < log[1]["point_loss"]
    assert log[61]["heat_map_loss"] < log[1]["heat_map_loss"]
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
    quick = ExpertSchedule(top_k=4, dense_share=0.0, drop_share=0.3)
    assert [quick.at(step, 100, 8) for step in (0, 8, 29, 30)] == [7, 6, 4, 4]


def test_digits_are_trained_with_supervised_attention(sight: Path, drawn: AskedPictures, tmp_path: Path) -> None:
    recipe = answers.in_digits(TINY)
    supervised = dataclasses.replace(recipe.forward, attention_loss=AttentionLoss(0.5, layer=1, heads=3))
    run(sight, sight, drawn, tmp_path, dataclasses.replace(recipe, forward=supervised))
    log = records(tmp_path)
    assert log[6]["loss"] < log[1]["loss"]
    assert log[6]["attention_loss"] > 0
    assert "point_loss" not in log[1]


def test_the_grounding_head_begins_with_the_keys_of_the_heat_maps(sight: Path, start: Path) -> None:
    model, _, config = load_checkpoint(start)
    before, _, old = load_checkpoint(sight)
    assert config == with_point_head(old)
    assert config.point_head is not None
    assert config.point_head.patch_token == old.decoder.embedding_size + 5, "after the five special tokens of images"
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    heat = HeatMapHead(old)
    heat.load_state_dict(load_file(sight / "heat_maps.safetensors"))
    assert model.point_head is not None
    cells = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    cells -= cells.mean(1, keepdim=True)
    keys = model.point_head.patch_k(model.point_head.x_norm(cells))
    torch.testing.assert_close(keys, heat.cell(cells), rtol=1e-4, atol=1e-4)


def test_scenes_of_validation_stay_and_those_of_training_change(drawn: AskedPictures) -> None:
    training = dataclasses.replace(drawn, augmentation=Augmentation())
    for index in range(4):
        first, again = (drawn.example(index, np.random.default_rng(n)) for n in (0, 1))
        assert np.array_equal(first.image, again.image)
        assert drawn.example(index, np.random.default_rng(0)).annotations == first.annotations
        other, same = (training.example(index, np.random.default_rng(n)) for n in (1, 0))
        assert not np.array_equal(training.example(index, np.random.default_rng(0)).image, other.image)
        assert training.example(index, np.random.default_rng(0)).annotations == same.annotations
    asked = [[drawn.example(i, np.random.default_rng(n)).annotations for i in range(8)] for n in (0, 1)]
    assert asked[0] != asked[1]


def test_points_have_the_boxes_of_their_objects(sight: Path, drawn: AskedPictures) -> None:
    tokenizer = Tokenizer.from_file(sight / "tokenizer.json")
    _, _, config = load_checkpoint(sight)
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


CUP: Box = (10.0, 10.0, 30.0, 30.0)


def photo(**changed: Any) -> Picture:
    known = {"cup", "kite", "dog", "zebra"}
    picture = Picture(np.zeros((40, 60, 3), np.uint8), [("cup", CUP)], [("dog", CUP), ("cup", CUP)], known, ("A cup.",))
    return dataclasses.replace(picture, **changed)


def test_a_photo_is_asked_about_what_is_sure_and_what_is_absent() -> None:
    found = photo_annotation(photo())
    assert found["objects"] == [{"label": "cup", "boxes": [list(CUP)], "points": [[20.0, 20.0]]}]
    assert found["absent"] == ["kite", "zebra"], "a dog may be there"
    assert found["maybe_present"] == ["dog"]
    assert found["captions"] == ["A cup."]
    assert photo_annotation(photo(known={"kite"}))["maybe_present"] == ["cup", "dog"], "not all cups are known"
    asked = [
        qa
        for seed in range(40)
        for qa in write_questions(found, np.random.default_rng(seed), max_questions=12, vocabulary=found["absent"])
    ]
    for qa in asked:
        if "cup" in qa.question:
            assert qa.answer not in ("There are none.", "No.")
        if "kite" in qa.question or "zebra" in qa.question:
            assert qa.answer in ("There are none.", "No.")
        assert "dog" not in qa.question
    assert {qa.kind for qa in asked} == {"point", "count", "negative", "where", "yes_no", "caption"}


def test_some_questions_follow_another_one() -> None:
    asked = [Annotation("demo", (f"question {i}", f"answer {i}"), boxes=(CUP,) * i) for i in range(5)]
    turns, generator = [], np.random.default_rng(0)
    for _ in range(100):
        after = follow_ups(asked, generator)
        assert [(a.messages[-2:], a.boxes) for a in after] == [(a.messages, a.boxes) for a in asked]
        for annotation in after:
            assert len({*annotation.messages}) == len(annotation.messages), "not after itself"
            turns.append(len(annotation.messages) // 2)
    assert {*turns} == {1, 2}
    assert turns.count(2) / len(turns) == pytest.approx(0.16, abs=0.04)
    assert follow_ups(asked[:1], generator) == asked[:1]


def test_captions_are_dropped_with_a_part_of_the_photo() -> None:
    assert cut(photo(), (0.0, 0.0, 90.0, 90.0), 0.5).captions == ("A cup.",)
    assert cut(photo(), (0.0, 0.0, 80.0, 90.0), 0.5).captions == ()
    assert mosaic([photo()] * 4, np.random.default_rng(0)).captions == ()


def test_a_scene_knows_all_names_but_those_that_it_may_show() -> None:
    vocabulary = Vocabulary([], [], ("taxi", "rose"))
    scene = {"objects": [{"label": "taxi", "boxes": [list(CUP)]}], "maybe_present": ["rose"], "source": "scene"}
    regions = scene_regions(scene, vocabulary)
    assert regions.objects == ((vocabulary.numbers["taxi"], CUP),)
    unknown = {name for name, known in zip(vocabulary.names, regions.known, strict=True) if not known}
    assert unknown == {"rose", "car"}, "a taxi is also a car"


def test_the_sets_hold_photographs_and_scenes(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    cup = {"label": "cup", "boxes": [[10, 10, 60, 60]], "points": [[35, 35]]}
    rows = []
    for name, split in (("a", "train"), ("b", "val")):
        Image.fromarray(rgb).save(tmp_path / f"{name}.png")
        rows.append({"image": f"{name}.png", "source": "coco", "split": split, "objects": [cup]})
    (tmp_path / "annotations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training, validation = asked_pictures([tmp_path], None)
    assert len(training) == len(validation) == 1, "without sprites there are photographs alone"
    assert np.array_equal(validation.example(0, np.random.default_rng(0)).image, rgb)
    assert not np.array_equal(training.example(0, np.random.default_rng(0)).image, rgb)
    assert training.example(0, np.random.default_rng(0)).regions is not None


def test_the_student_ends_with_fewer_experts(sight: Path, start: Path, drawn: AskedPictures, tmp_path: Path) -> None:
    teacher = run(sight, start, drawn, tmp_path / "answers", dataclasses.replace(TINY, experts=None))
    assert load_checkpoint(teacher)[2].decoder.top_k == 4
    recipe = dataclasses.replace(
        student.RECIPE,
        **{name: getattr(TINY, name) for name in ("steps", "batch", "micro", "precision", "optimizer", "workers")},
        experts=ExpertSchedule(top_k=2, dense_share=0.0),
        log_every=1,
    )
    heat_maps = tmp_path / "answers" / "heat_maps.safetensors"
    assert not torch.equal(
        load_file(heat_maps)["cell.1.weight"], load_file(sight / "heat_maps.safetensors")["cell.1.weight"]
    ), "trained on"
    found = student.train(teacher, drawn, drawn, tmp_path / "student", recipe)
    assert load_checkpoint(found)[2].decoder.top_k == 2
    ours, theirs = (dict(load_checkpoint(path)[0].named_parameters()) for path in (found, teacher))
    for name, parameter in theirs.items():
        if name.startswith(("vision.", "connector.")):
            assert torch.equal(ours[name], parameter), f"{name} is the teacher's"
    assert all(line["divergence"] > 0 for line in records(tmp_path / "student").values())
