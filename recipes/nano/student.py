"""Stage 3: half of the experts are dropped one by one, while the model that "answers" ends with teaches what is left.

The student begins as its teacher. Both read the same pictures and questions; the student's decoder learns the teacher's
distributions of tokens, its choices of patches and its states, as well as the data. Towers and connector stay the
teacher's. Most steps come after the last expert was dropped, with weights that are rounded as in the bundle
(benchmarks/RESULTS.md, "nano's student with more steps").
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
from molmo_edge.training.taught_run import open_teacher
from molmo_edge.training.trainer import Data, Trainer, build
from recipes.nano import answers
from recipes.nano.asked_pictures import AskedPictures

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
    frozen=("vision", "connector"),
    forward=replace(answers.RECIPE.forward, heat_maps=0.0, balance_loss=0.01),
    optimizer=replace(answers.RECIPE.optimizer, decoder=Rate(3e-4, 50), point_head=Rate(3e-4, 50)),
    experts=ExpertSchedule(top_k=4, dense_share=0.0, drop_share=0.3),
    # Hidden states, because the grounding head asks with those of the last layer.
    distill=DistillConfig(divergence=1.0, cross_entropy=0.5, grounding=1.0, hidden=1.0),
    qat=Qat(PRECISION["decoder"], share=0.6),
)


def train(teacher: Path, data: AskedPictures, validation: AskedPictures, run: Path, recipe: Recipe) -> Path:
    """Run the stage from the checkpoint `teacher`, or from where `run` has got to; returns its last checkpoint."""
    config, tokenizer = read_config(teacher), Tokenizer.from_file(teacher / "tokenizer.json")
    sets = Data([data], [1.0], [validation])
    with world("auto") as here:
        taught = open_teacher(teacher, config, tokenizer, sets, recipe, here)
        model = build(config, open_tensors(teacher), str(teacher), recipe, here, teacher=config)
        return Trainer(model, tokenizer, sets, recipe, run, here, teacher=taught).train()
