"""Stage 3: half of the experts are dropped one by one, while the model that "answers" ends with teaches what is left.

The student begins as its teacher. Both read the same pictures and questions; the student learns the teacher's
distributions of tokens and its choices of patches, as well as the data. In the last steps its weights are rounded as in
the bundle.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.training.distillation import DistillConfig
from molmo_edge.training.fake_quantization import Qat
from molmo_edge.training.optimizer import Rate
from molmo_edge.training.parallel import world
from molmo_edge.training.recipe import ExpertSchedule, Recipe
from molmo_edge.training.regions import Names
from molmo_edge.training.taught_run import open_teacher
from molmo_edge.training.trainer import Data, Trainer, build
from recipes.nano import answers
from recipes.nano.asked_pictures import AskedPictures
from recipes.nano.pointing import load_heat_maps

# Of the bundle. The head of grounding tokens has eight bits, too: in float32 it takes 7 MB.
PRECISION = {
    "vision_encoder": "int8",
    "connector": "q8",
    "embed_tokens": "int8",
    "decoder": "mixed",
    "point_head": "q8",
}
RECIPE = replace(
    answers.RECIPE,
    steps=1000,
    forward=replace(answers.RECIPE.forward, balance_loss=0.01),
    optimizer=replace(
        answers.RECIPE.optimizer, connector=Rate(1e-4, 50), decoder=Rate(3e-4, 50), point_head=Rate(3e-4, 50)
    ),
    experts=ExpertSchedule(top_k=4, dense_share=0.0),
    # Hidden states, because the grounding head asks with those of the last layer.
    distill=DistillConfig(divergence=1.0, cross_entropy=0.5, grounding=1.0, hidden=1.0),
    qat=Qat(PRECISION["decoder"], share=0.3),
)


def train(
    teacher: Path, heat_maps: Path, data: AskedPictures, validation: AskedPictures, run: Path, recipe: Recipe
) -> Path:
    """Run the stage from the checkpoint `teacher`, or from where `run` has got to; returns the checkpoint it ends with.

    heat_maps: file of the heat maps' head.
    """
    config, tokenizer = read_config(teacher), Tokenizer.from_file(teacher / "tokenizer.json")
    names, sets = Names(data.vocabulary.names, tokenizer), Data([data], [1.0], [validation])
    with world("auto") as here:
        taught = open_teacher(teacher, config, tokenizer, sets, recipe, here)
        model = build(config, open_tensors(teacher), str(teacher), recipe, here, names, teacher=config)
        load_heat_maps(model, heat_maps)
        return Trainer(model, tokenizer, sets, recipe, run, here, teacher=taught).train()
