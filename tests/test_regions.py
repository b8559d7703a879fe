"""Grounding on regions: targets against a plain reading of them, the loss against its formula, and that it learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from test_conv_tower import CONFIG, GOLDEN

from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.config import ImageConfig
from molmo_edge.data.examples import Annotation, Example
from molmo_edge.data.regions import Regions
from molmo_edge.frontend.crops import patch_grid, select_tiling
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import Molmo, save_checkpoint
from molmo_edge.training.encoding import Encoder, Encoding, EncodingError, collate
from molmo_edge.training.forward import ForwardConfig
from molmo_edge.training.optimizer import OptimizerConfig, Rate
from molmo_edge.training.parallel import world
from molmo_edge.training.recipe import Recipe
from molmo_edge.training.regions import PEAK, UNKNOWN, Names, heat_loss, make_targets
from molmo_edge.training.trainer import Data, Trainer, build

NAMES = ("red square", "blue square")


@pytest.mark.parametrize("resize", ["dino", "default"])
def test_each_object_peaks_in_the_cell_and_patch_that_hold_its_centre(resize: str) -> None:
    config = ImageConfig(crop_size=112, overlap_margins=(2, 2), max_crops=4, resize=resize)
    height, width = 180, 240
    tiling = select_tiling(height, width, config)
    assert tiling != (0, 0)
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 80, (20, 2))
    boxes = [(*map(float, c), *map(float, c + rng.uniform(2, 20, 2))) for c in corners]
    regions = Regions(tuple((i % 2, box) for i, box in enumerate(boxes)), np.array([True, True]))
    crops = range(1 + tiling[0] * tiling[1])
    targets = make_targets(regions, config, tiling, height, width, crops)
    patches, sides = patch_grid(config, tiling, height, width)
    found = {tuple(row) for row in targets.centres.tolist()}
    expected = set()
    side = config.patches
    for crop in crops:
        for name, box in regions.objects:
            centre = np.array([box[0] + box[2], box[1] + box[3]]) / 200
            inside = (np.abs(patches[crop] - centre) <= sides[crop] / 2).all(-1).nonzero()[0]
            for patch in inside:  # one, or none where the crop shows another part
                y, x = divmod(int(patch), side)
                cell = y // 2 * config.cells + x // 2
                expected.add((crop, cell, name, 2 * (y % 2) + x % 2))
    assert found == expected
    assert len(found) > len(boxes)
    for crop, cell, name, _ in found:
        assert targets.heat[crop, cell, name] == PEAK
    assert (targets.heat == PEAK).sum() == len({row[:3] for row in found})


def test_what_is_not_known_is_neither_positive_nor_negative() -> None:
    config = ImageConfig(crop_size=112, overlap_margins=(0, 0), max_crops=0, resize="dino")
    known = np.array([True, False, True])
    regions = Regions(((0, (10, 10, 20, 20)), (1, (60, 60, 70, 70))), known, unsure=((2, (0, 0, 50, 100)),))
    heat = make_targets(regions, config, (0, 0), 100, 100, [0]).heat[0].reshape(4, 4, 3)
    assert heat[0, 0, 0] == PEAK
    assert (heat[..., 0] != UNKNOWN).all()
    assert heat[2, 2, 1] == PEAK
    assert (heat[..., 1] == UNKNOWN).sum() == 15, "the others of the name are not known"
    assert (heat[:, :2, 2] == UNKNOWN).all()
    assert (heat[:, 2:, 2] == 0).all()


def test_heat_loss_is_centernets() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (2, 9, 3))
    heat = rng.integers(UNKNOWN, PEAK + 1, (2, 9, 3)).astype(np.int8)
    heat[0, 0] = PEAK
    total = 0.0
    for at in np.ndindex(heat.shape):
        p, y = 1 / (1 + np.exp(-logits[at])), heat[at] / PEAK
        if heat[at] == PEAK:
            total -= (1 - p) ** 2 * np.log(p)
        elif heat[at] != UNKNOWN:
            total -= (1 - y) ** 4 * p**2 * np.log(1 - p)
    ours = heat_loss(torch.from_numpy(logits), torch.from_numpy(heat))
    assert float(ours) == pytest.approx(total, rel=1e-5)


class Squares:
    """A red and a blue square at places that differ from picture to picture."""

    name = "squares"

    def __len__(self) -> int:
        return 6

    def example(self, index: int, _rng: np.random.Generator) -> Example:
        picture = np.full((112, 112, 3), 128, np.uint8)
        objects = []
        for number, colour in enumerate(((220, 20, 20), (20, 20, 220))):
            x, y = (28 * ((index * 5 + 7 * number + k) % 4) for k in (0, index))
            picture[y : y + 28, x : x + 28] = colour
            objects.append((number, (x / 1.12, y / 1.12, (x + 28) / 1.12, (y + 28) / 1.12)))
        return Example(picture, regions=Regions(tuple(objects), np.array([True, True])))


@pytest.mark.usefixtures("one_thread")
def test_heat_maps_learn_where_names_are(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, image=dataclasses.replace(CONFIG.image, max_crops=1, overview=64))
    start = tmp_path / "start"
    model = Molmo(config).init_weights(std=0.15, generator=torch.Generator().manual_seed(0))
    save_checkpoint(model, GOLDEN / "molmoe" / "tokenizer.json", start)
    tokenizer = Tokenizer.from_file(start / "tokenizer.json")
    names = Names(NAMES, tokenizer)
    recipe = Recipe(
        steps=60,
        batch=6,
        micro=3,
        mixture=(),
        precision="fp32",
        frozen=("decoder",),
        encoding=Encoding(sequence=1024),
        forward=ForwardConfig(heat_maps=1.0, recompute=False),
        optimizer=OptimizerConfig(Rate(5e-3, 5), Rate(5e-3, 5), Rate(0.0, 1)),
        max_crops=None,
        save_every=30,
        log_every=10,
        validate_every=60,
        workers=0,
    )
    data = Data([Squares()], [1.0], [Squares()])

    def run(steps: int, directory: str) -> Trainer:
        with world("cpu") as here:
            one = dataclasses.replace(recipe, steps=steps, optimizer=dataclasses.replace(recipe.optimizer, floor=1.0))
            trainer = Trainer(
                build(config, open_tensors(start), "start", one, here, names),
                tokenizer,
                data,
                one,
                tmp_path / directory,
                here,
            )
            trainer.train()
            return trainer

    before = run(1, "first").validate()["validation_heat_map_loss"]
    trainer = run(60, "whole")
    assert trainer.validate()["validation_heat_map_loss"] < 0.2 * before
    trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    run(30, "halves")
    again = run(60, "halves")
    for name, values in again.model.named_parameters():
        if name in trained:
            assert torch.equal(values, trained[name]), f"{name}: a resumed run differs"
    encoder = Encoder(tokenizer, config.image, recipe.encoding)
    rng = np.random.default_rng(0)
    batch = collate([encoder(Squares().example(i, rng), rng) for i in range(6)])
    with torch.no_grad():
        model = trainer.model.eval()
        cells = model.molmo.connector(model.features(batch), batch.masks)
        assert model.heat_maps is not None
        assert batch.heat is not None
        heat = model.heat_maps.heat(names.embed(model.molmo.decoder.embedding), cells)
    flat, target = heat.flatten(1, 1).transpose(1, 2).flatten(0, 1), batch.heat.transpose(1, 2).flatten(0, 1)
    assert (flat.argmax(-1) == target.argmax(-1)).float().mean() > 0.9, "the hottest cell is the object's"


def test_a_batch_has_regions_everywhere_or_nowhere() -> None:
    tokenizer = Tokenizer.from_file(GOLDEN / "molmoe" / "tokenizer.json")
    encoder = Encoder(tokenizer, CONFIG.image, Encoding(crops=1))
    rng = np.random.default_rng(0)
    with_regions = encoder(Squares().example(0, rng), rng)
    assert len(with_regions.crops) == 2, "the global view and one crop"
    picture = np.zeros((50, 60, 3), np.uint8)
    asked = encoder(Example(picture, (Annotation("demo", ("Why?", "Because.")),)), rng)
    with pytest.raises(EncodingError, match="in separate stages"):
        collate([with_regions, asked])
    with pytest.raises(EncodingError, match="no room for an answer"):
        encoder(Example(picture), rng)
