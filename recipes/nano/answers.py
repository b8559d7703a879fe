"""Stage 2: connector, decoder and grounding head learn to answer, from photographs and drawn scenes with questions.

The towers are frozen. The heat maps of the stage "sight" are trained on. All experts are active: together they compute
a dense FFN. The result is the teacher of the stage "student".
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.training.attention_loss import AttentionLoss
from molmo_edge.training.encoding import Encoding
from molmo_edge.training.forward import ForwardConfig
from molmo_edge.training.optimizer import OptimizerConfig, Rate
from molmo_edge.training.parallel import world
from molmo_edge.training.recipe import Recipe
from molmo_edge.training.regions import Names
from molmo_edge.training.trainer import Data, Trainer, build
from recipes.nano.asked_pictures import AskedPictures
from recipes.nano.pointing import load_heat_maps, save_heat_maps

RECIPE = Recipe(
    steps=1600,
    batch=8,
    micro=8,
    mixture=(),
    frozen=("vision",),
    encoding=Encoding(sequence=1536),
    forward=ForwardConfig(answer_dropout=0.0, recompute=False, heat_maps=0.3),
    optimizer=OptimizerConfig(
        connector=Rate(3e-4, 100),
        decoder=Rate(6e-4, 100),
        point_head=Rate(1e-3, 100),
        floor=0.02,
        weight_decay=0.01,
    ),
    max_crops=None,
    save_every=100,
    validate_every=500,
    validation_batches=24,
    workers=1,
)


def in_digits(recipe: Recipe) -> Recipe:
    """The recipe of a model that writes the coordinates of points as text, whose attention is supervised."""
    supervised = AttentionLoss(weight=0.5, layer=3, heads=3)
    return replace(recipe, forward=replace(recipe.forward, attention_loss=supervised))


def train(
    start: Path,
    heat_maps: Path,
    data: AskedPictures,
    validation: AskedPictures,
    run: Path,
    recipe: Recipe,
) -> Path:
    """Run the stage from the checkpoint `start`, or from where `run` has got to; returns the checkpoint it ends with.

    heat_maps: file of the heat maps' head.
    """
    config, tokenizer = read_config(start), Tokenizer.from_file(start / "tokenizer.json")
    names = Names(data.vocabulary.names, tokenizer)
    with world("auto") as here:
        model = build(config, open_tensors(start), str(start), recipe, here, names)
        load_heat_maps(model, heat_maps)
        finished = Trainer(model, tokenizer, Data([data], [1.0], [validation]), recipe, run, here).train()
        save_heat_maps(model, run)
        return finished
