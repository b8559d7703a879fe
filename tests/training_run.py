"""A small run of the trainer in a process of its own: python training_run.py CHECKPOINT DIRECTORY [--kill-at STEP] ...

Pictures of noise, 20 steps of 4 sequences, fp32, with everything at work that a difference could hide in: dropout,
several micro-batches, a mixture of two data sets, workers.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
from pathlib import Path

import numpy as np

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.data.examples import Annotation, Example
from molmo_edge.frontend.points import Point, format_points
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.system.log import shown
from molmo_edge.training.attention_loss import AttentionLoss
from molmo_edge.training.distillation import DistillConfig
from molmo_edge.training.encoding import Encoding
from molmo_edge.training.fake_quantization import Qat
from molmo_edge.training.forward import ForwardConfig
from molmo_edge.training.optimizer import OptimizerConfig, Rate
from molmo_edge.training.parallel import world
from molmo_edge.training.recipe import Recipe
from molmo_edge.training.sharding import Layout
from molmo_edge.training.taught_run import open_teacher
from molmo_edge.training.trainer import Data, Trainer, build, cache_features

WORDS = ("red", "blue", "a cup", "two dogs", "nothing")


@dataclasses.dataclass(frozen=True)
class Noise:
    """Pictures of noise with answers that follow from their number."""

    name: str
    size: int
    annotations: int
    pointed: bool = False  # each answer is a point, with the box of its object

    def __len__(self) -> int:
        return self.size

    def example(self, index: int, rng: np.random.Generator) -> Example:
        picture = np.random.default_rng(index).integers(0, 256, (40 + 8 * (index % 3), 40, 3), dtype=np.uint8)
        asked = [
            Annotation("user_qa", (f"What is {k}?", f"{WORDS[(index + k) % len(WORDS)]}, {rng.integers(10)}."))
            for k in range(1 + index % self.annotations)
        ]
        if self.pointed:
            x, y = (float(v) for v in np.random.default_rng([1, index]).integers(10, 90, 2))
            answer = format_points([Point(x, y)], "it")
            asked = [Annotation("user_qa", ("Point to it.", answer), boxes=((x - 10, y - 10, x + 10, y + 10),))]
        return Example(picture, tuple(asked))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kill-at", type=int, default=0)
    parser.add_argument("--stop-at", type=int, default=0)
    parser.add_argument("--kill-in-save", type=int, default=0)
    parser.add_argument("--nan-at", type=int, default=-1)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--few", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pointed", action="store_true")
    parser.add_argument("--features", type=Path)
    parser.add_argument("--experts", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--states", default="fp32")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--qat")
    args = parser.parse_args()
    recipe = Recipe(
        steps=args.steps,
        batch=4,
        micro=1,
        mixture=(),
        precision=args.precision,
        encoding=Encoding(sequence=1024),
        forward=ForwardConfig(residual_dropout=0.05, answer_dropout=0.1),
        optimizer=OptimizerConfig(Rate(3e-3, 3), Rate(1e-3, 5), Rate(3e-3, 5), states=args.states),
        layout=Layout(replicas=args.replicas, experts=args.experts),
        max_crops=1,
        save_every=5,
        log_every=1,
        workers=2,
        validate_every=5,
        validation_batches=2,
    )
    if args.features:
        recipe = dataclasses.replace(recipe, frozen=("vision",))
    if args.pointed:
        forward = dataclasses.replace(recipe.forward, attention_loss=AttentionLoss(1.0, layer=1, heads=2))
        recipe = dataclasses.replace(recipe, forward=forward)
    if args.teacher:
        recipe = dataclasses.replace(recipe, distill=DistillConfig(top_k=8, hidden=0.5, image=0.5))
    if args.qat:
        recipe = dataclasses.replace(recipe, qat=Qat(args.qat))
    start = args.checkpoint
    with world("cpu") as here:
        config, source = read_config(start), open_tensors(start)
        theirs = read_config(args.teacher) if args.teacher else None
        model = build(config, source, str(start), recipe, here, teacher=theirs)
        tokenizer = Tokenizer.from_file(start / "tokenizer.json")
        few = Noise("few", args.few, 1, args.pointed)
        data = Data([few, Noise("many", 12, 3, args.pointed)], [0.4, 0.6], [few] if args.validate else ())
        cache = cache_features(args.features, config, source, data, recipe, here) if args.features else None
        teacher = open_teacher(args.teacher, config, tokenizer, data, recipe, here) if args.teacher else None
        trainer = Trainer(model, tokenizer, data, recipe, args.directory, here, cache, teacher)
        if args.kill_at or args.stop_at:
            one, number = trainer.update, signal.SIGKILL if args.kill_at else signal.SIGTERM

            def killed(micro, window):  # type: ignore[no-untyped-def]
                if trainer.step == (args.kill_at or args.stop_at):
                    os.kill(os.getpid(), number)
                return one(micro, window)

            trainer.update = killed  # type: ignore[method-assign]
        if args.nan_at >= 0:
            norms = trainer.optimizer.norms

            def damaged():  # type: ignore[no-untyped-def]
                if trainer.step == args.nan_at:
                    model.molmo.vision.class_embedding.grad.fill_(float("nan"))
                return norms()

            trainer.optimizer.norms = damaged  # type: ignore[method-assign]
        if args.kill_in_save:
            poll = trainer.checkpoints.poll

            def killed_in_save() -> None:
                if trainer.step == args.kill_in_save:  # it is being written, and has no name yet
                    os.kill(os.getpid(), signal.SIGKILL)
                poll()

            trainer.checkpoints.poll = killed_in_save  # type: ignore[method-assign]
        trainer.train()


if __name__ == "__main__":
    with shown():
        main()
