"""Stage 1: the connector learns heat maps of names, from all labelled objects of annotated photographs.

The towers are frozen. The decoder provides the embeddings of the names, but does not run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.data.annotated_photos import Photo
from molmo_edge.frontend.crops import ImageProcessor
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.training.encoding import Encoding
from molmo_edge.training.flops import device_flops
from molmo_edge.training.forward import ForwardConfig
from molmo_edge.training.optimizer import OptimizerConfig, Rate
from molmo_edge.training.parallel import world
from molmo_edge.training.recipe import Recipe
from molmo_edge.training.regions import Names
from molmo_edge.training.trainer import Data, Trainer, build
from recipes.nano.detector import COCO_NAMES, box_layers, score_layers
from recipes.nano.errors import NotTrainedError
from recipes.nano.photos import Augmentation, RegionPhotos, Vocabulary, read
from recipes.nano.pointing import save_heat_maps
from recipes.nano.score_sight import detector_points, heat_points, report

RECIPE = Recipe(
    steps=5_000,
    batch=16,
    micro=8,
    mixture=(),
    frozen=("vision", "decoder"),
    encoding=Encoding(crops=1),
    forward=ForwardConfig(heat_maps=1.0, recompute=False),
    # The run in benchmarks/RESULTS.md had a constant rate up to step 2,907, where its length was decided.
    optimizer=OptimizerConfig(connector=Rate(1e-3, 100), floor=0.02, weight_decay=0.01),
    max_crops=None,
    save_every=100,
    validate_every=500,
    validation_batches=24,
    workers=1,
)


def precision() -> str:
    """The precision of matrix products: bfloat16 on a GPU, and on a CPU if a measurement shows that it is faster."""
    if torch.cuda.is_available():
        return "bf16"
    cpu = torch.device("cpu")
    return "bf16" if device_flops(cpu, torch.bfloat16) > 1.3 * device_flops(cpu, torch.float32) else "fp32"


def data(roots: Sequence[Path]) -> tuple[Data, Vocabulary, list[Photo]]:
    """Training and validation sets, the vocabulary, and the photographs of validation."""
    photos, held_out = read(list(roots), "train"), read(list(roots), "val")
    vocabulary = Vocabulary([*photos, *held_out], list(roots))
    sets = [RegionPhotos(photos, vocabulary, Augmentation(), "photos")]
    return Data(sets, [1.0], [RegionPhotos(held_out, vocabulary, None, "photos_val")]), vocabulary, held_out


def train(start: Path, roots: Sequence[Path], run: Path, recipe: Recipe) -> Path:
    """Run the stage, from where `run` has got to; returns the checkpoint it ends with, beside HEAT_MAPS."""
    sets, vocabulary, _ = data(roots)
    config, tokenizer = read_config(start), Tokenizer.from_file(start / "tokenizer.json")
    names = Names(vocabulary.names, tokenizer)
    with world("auto") as here:
        model = build(config, open_tensors(start), str(start), recipe, here, names)
        finished = Trainer(model, tokenizer, sets, recipe, run, here).train()
        save_heat_maps(model, run)
        return finished


def score(start: Path, roots: Sequence[Path], run: Path, recipe: Recipe, detector: Path) -> dict[str, object]:
    """Scores of the latest checkpoint of `run` and of the detector alone on the validation photographs."""
    sets, vocabulary, held_out = data(roots)
    config, tokenizer = read_config(start), Tokenizer.from_file(start / "tokenizer.json")
    names = Names(vocabulary.names, tokenizer)
    with world("cpu") as here:
        model = build(config, open_tensors(start), str(start), recipe, here, names)
        trainer = Trainer(model, tokenizer, sets, recipe, run, here)
    if not trainer.step:
        raise NotTrainedError(f'{run} has no checkpoint of the stage "sight" yet')
    model.eval()
    find = heat_points(model, names, ImageProcessor(config.image, tokenizer.special))
    scores: dict[str, object] = {"step": trainer.step, "nano": report(held_out, vocabulary, find)}
    tower = model.molmo.conv_tower
    assert tower is not None
    assert vocabulary.names[: len(COCO_NAMES)] == COCO_NAMES
    alone = detector_points(tower, score_layers(detector), box_layers(detector), config.image.overview)
    scores["detector"] = report(held_out, vocabulary, alone)
    with (run / "scores.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(scores) + "\n")
    return scores
