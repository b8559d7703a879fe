"""`molmo-edge distill`: train a student on what a teacher says, with the trainer of `molmo-edge train`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molmo_edge.cli import train_options as options
from molmo_edge.cli.options import expand_options
from molmo_edge.cli.output import note
from molmo_edge.cli.train import ComputeOptions, LossOptions, with_forward
from molmo_edge.cli.train_sets import DataOptions
from molmo_edge.sdk.readable_text import counted

if TYPE_CHECKING:
    from molmo_edge.training.distillation import DistillConfig
    from molmo_edge.training.recipe import Recipe


@dataclass(frozen=True)
class TeacherOptions:
    """The losses that compare the student with its teacher."""

    divergence: Annotated[
        float, typer.Option(min=0, help="Weight of the divergence of the distributions of answer tokens.")
    ] = 1.0
    reverse: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the reverse divergence: 0 forward KL, 1 reverse KL.")
    ] = 0.0
    temperature: Annotated[float, typer.Option(help="Temperature of both distributions.")] = 1.0
    top_k: Annotated[
        int, typer.Option(min=0, help="The teacher's most likely tokens, beside one class for the rest; 0: all logits.")
    ] = 64
    cross_entropy: Annotated[float, typer.Option(min=0, help="Weight of the cross entropy on the data.")] = 1.0
    hidden: Annotated[float, typer.Option(min=0, help="Weight of the distance of hidden states.")] = 0.0
    image: Annotated[float, typer.Option(min=0, help="Weight of the distance of image features.")] = 0.0
    grounding: Annotated[
        float, typer.Option(min=0, help="Weight of the divergence of the grounding heads' choices.")
    ] = 0.0

    def config(self) -> DistillConfig:
        """Raises DistillError for impossible settings."""
        from molmo_edge.training.distillation import DistillConfig

        return DistillConfig(**dataclasses.asdict(self))


@dataclass(frozen=True)
class ExpertOptions:
    """From all experts of a student to a few of them."""

    active_experts: Annotated[
        int | None,
        typer.Option(min=1, help="Experts that are active at the end; all at first. Default: the checkpoint's number."),
    ] = None
    dense_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the steps with all experts active, with --active-experts.")
    ] = 0.5

    def changed(self, recipe: Recipe, n_experts: int) -> Recipe:
        """The recipe with these options, for a student with `n_experts`."""
        from molmo_edge.training.recipe import ExpertSchedule

        if self.active_experts is None:
            return recipe
        if self.active_experts > n_experts:
            raise options.TrainError(f"--active-experts {self.active_experts}: the student has {n_experts} experts")
        return dataclasses.replace(recipe, experts=ExpertSchedule(self.active_experts, self.dense_share))


def distill(
    *,
    teacher: Annotated[str, typer.Option(help="Checkpoint of the teacher: directory or hub id.", show_default=False)],
    student: Annotated[
        str, typer.Option(help="Checkpoint that the student starts from: directory or hub id.", show_default=False)
    ],
    data: Annotated[
        Path, typer.Option(help="Folder of the data sets: DATA/NAME each, and DATA/images.", show_default=False)
    ],
    out: options.Out,
    preset: options.Preset = "molmoe-1b",
    lessons: TeacherOptions,
    schedule: ExpertOptions,
    answers: Annotated[
        Path | None, typer.Option(help="Folder of `train answers`, to train on the teacher's own answers as well.")
    ] = None,
    answers_share: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the sequences that are from --answers.")
    ] = 0.5,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder in which the teacher's targets are cached before the run. Default: no cache."),
    ] = None,
    sets: DataOptions,
    freeze: options.Freeze = "",
    run: options.RunOptions,
    losses: LossOptions,
    compute: ComputeOptions,
    device: options.Device = "auto",
) -> None:
    """Distill a teacher into a student: train on the data and on the teacher's distributions and states."""
    from molmo_edge.checkpoints.hub_config import read_config
    from molmo_edge.checkpoints.weight_files import open_tensors
    from molmo_edge.data.written_answers import open_answers
    from molmo_edge.frontend.tokenizer import Tokenizer
    from molmo_edge.training.parallel import world
    from molmo_edge.training.recipe import recipe_for
    from molmo_edge.training.run_checkpoints import completed_steps
    from molmo_edge.training.taught_run import check_teacher, open_teacher
    from molmo_edge.training.trainer import Trainer, build, cache_features, check_frozen

    options.check_preset(preset)
    recipe = with_forward(run.changed(recipe_for("multitask", preset), freeze), losses, compute)
    recipe = sets.choose(dataclasses.replace(recipe, distill=lessons.config()))
    directory, wise = options.starting_checkpoint(student, out), options.starting_checkpoint(teacher, out)
    config, source = read_config(directory), open_tensors(directory)
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    recipe = schedule.changed(recipe, config.decoder.n_experts)
    check_teacher(wise, config, tokenizer, recipe, cached=cache is not None)
    if sets.features is not None:
        check_frozen(recipe)
    examples = sets.open(recipe, data)
    if answers is not None:
        rates = [*((1 - answers_share) * rate for rate in examples.rates), answers_share]
        examples = dataclasses.replace(examples, sets=[*examples.sets, open_answers(answers)], rates=rates)
    with world(device) as here:
        features = None
        if sets.features is not None:
            features = cache_features(sets.features, config, source, examples, recipe, here, tokenizer.special)
        targets = open_teacher(
            wise, config, tokenizer, examples, recipe, here, cache=cache, features=features,
            features_root=sets.features, step=completed_steps(out, here),
        )  # fmt: skip
        model = build(config, source, str(directory), recipe, here, teacher=read_config(wise))
        trainer = Trainer(model, tokenizer, examples, recipe, out, here, features, targets)
        if here.first:
            note("training on " + ", ".join(f"{s.name} ({len(s)})" for s in examples.sets))
            done = f"{counted(trainer.step, 'step')} done, " if trainer.step else ""
            left = counted(max(0, recipe.steps - trainer.step), "step")
            note(f"{done}{left} left; {counted(recipe.batch, 'sequence')} per step")
        written = trainer.train()
        if here.first:
            note(f"wrote the student to {written}")


command = expand_options(distill)
