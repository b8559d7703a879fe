"""Stage 2: connector and decoder learn to answer, from annotated photographs and drawn scenes with questions.

The towers are frozen and their features cached, so that a picture is encoded once. The experts of the starting
checkpoint compute the dense FFN together; half of the steps are trained so, then experts are dropped one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.data.annotated_photos import Photo, augment, load_photos
from molmo_edge.data.drawn.scenes import draw_scene
from molmo_edge.data.drawn.sprites import Assets, load_assets
from molmo_edge.data.examples import Annotation, Example
from molmo_edge.data.grounded_questions import QA, write_questions
from molmo_edge.evaluation.annotated_pictures import RECEIPTS
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.training.attention_loss import AttentionLoss
from molmo_edge.training.encoding import Encoding
from molmo_edge.training.forward import ForwardConfig
from molmo_edge.training.optimizer import OptimizerConfig, Rate
from molmo_edge.training.parallel import world
from molmo_edge.training.recipe import ExpertSchedule, Recipe
from molmo_edge.training.trainer import Data, Trainer, build, cache_features

RECIPE = Recipe(
    steps=6000,
    batch=6,
    micro=6,
    mixture=(),
    frozen=("vision",),
    encoding=Encoding(sequence=1536),
    forward=ForwardConfig(
        answer_dropout=0.0, recompute=False, attention_loss=AttentionLoss(weight=0.5, layer=3, heads=3)
    ),
    optimizer=OptimizerConfig(connector=Rate(4e-4, 150), decoder=Rate(6e-4, 150), weight_decay=0.01),
    experts=ExpertSchedule(top_k=4, dense_share=0.5),
    max_crops=None,
    save_every=250,
    validate_every=500,
    workers=1,
)
SCENES, COPIES, QUESTIONS = 20_000, 2, 6  # drawn scenes; of each photograph; most questions about a picture


@dataclass(frozen=True, eq=False)
class AskedPictures:
    """A data set of photographs and drawn scenes: picture i is always the same, its questions differ by epoch.

    A photograph comes `copies` times: unchanged, then augmented.
    """

    photos: Sequence[Photo]
    copies: int
    assets: Assets | None  # of the scenes; None: no scenes
    scenes: int
    seed: int = 0
    questions: int = QUESTIONS
    name: str = "answers"

    def __len__(self) -> int:
        return len(self.photos) * self.copies + self.scenes

    def picture(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        """uint8 [h, w, 3] and its annotation."""
        photo, copy = divmod(index, max(1, self.copies))
        if photo >= len(self.photos):
            assert self.assets is not None
            return draw_scene(np.random.default_rng([self.seed, 1, index]), self.assets)
        rgb, annotation = self.photos[photo].rgb(), self.photos[photo].annotation
        return (
            augment(rgb, annotation, np.random.default_rng([self.seed, 2, photo, copy])) if copy else (rgb, annotation)
        )

    def example(self, index: int, rng: np.random.Generator) -> Example:
        rgb, annotation = self.picture(index)
        asked = write_questions(annotation, rng, max_questions=self.questions, vocabulary=self.vocabulary)
        return Example(rgb, tuple(map(_annotation, asked)))

    @cached_property
    def vocabulary(self) -> list[str]:
        """What absent objects are chosen from."""
        labels = {o["label"] for photo in self.photos for o in photo.annotation.get("objects", ())}
        return sorted(labels | set(self.assets.sprites if self.assets else ()))


def _annotation(asked: QA) -> Annotation:
    boxes = () if asked.target_boxes is None else tuple(tuple(map(float, box)) for box in asked.target_boxes)
    return Annotation("demo", (asked.question, asked.answer), boxes=boxes)  # type: ignore[arg-type]


def data(roots: Sequence[Path], sprites: Path | None) -> Data:
    """Training and validation sets. sprites: the folder of `molmo_edge.data.drawn.sprites`; without it no scenes."""

    def one(split: str, copies: int, scenes: int) -> AskedPictures:
        photos = [photo for root in roots for photo in load_photos(root, split)]
        photos = [p for p in photos if p.annotation["source"] != RECEIPTS]  # nano cannot read lines so small
        assets = load_assets(sprites, split=split, photos=photos) if sprites else None
        return AskedPictures(photos, copies, assets, scenes if sprites else 0, name=f"answers_{split}")

    return Data([one("train", COPIES, SCENES)], [1.0], [one("val", 1, 500)])


def train(start: Path, sets: Data, run: Path, recipe: Recipe) -> Path:
    """Run the stage, from where `run` has got to; returns the checkpoint it ends with."""
    config, source = read_config(start), open_tensors(start)
    tokenizer = Tokenizer.from_file(start / "tokenizer.json")
    with world("auto") as here:
        features = cache_features(run / "features", config, source, sets, recipe, here)
        model = build(config, source, str(start), recipe, here)
        return Trainer(model, tokenizer, sets, recipe, run, here, features).train()
