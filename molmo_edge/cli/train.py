"""`molmo-edge train caption`, `multitask`, `points`: Molmo's two stages, and adapters for your own points."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from molmo_edge.cli import train_answers, train_data, train_points, train_student
from molmo_edge.cli import train_options as options
from molmo_edge.cli.options import expand_options
from molmo_edge.cli.output import note
from molmo_edge.cli.train_sets import DataOptions
from molmo_edge.sdk.readable_text import counted
from molmo_edge.system.extras import with_extra

if TYPE_CHECKING:
    from molmo_edge.training.recipe import Recipe


@dataclass(frozen=True)
class LossOptions:
    """Dropout, separators, auxiliary losses, and rounding of weights."""

    residual_dropout: Annotated[
        float | None, typer.Option(min=0, max=0.9, help="Dropout of the residual stream. Default: the stage's.")
    ] = None
    answer_dropout: Annotated[
        float | None,
        typer.Option(min=0, max=0.9, help="Dropout at positions that predict an answer token. Default: the stage's."),
    ] = None
    separator: Annotated[bool, typer.Option("--separator", help="Put <im_end> between packed annotations.")] = False
    balance_loss: Annotated[float, typer.Option(min=0, help="Weight of the experts' load balancing loss.")] = 0.0
    router_z_loss: Annotated[float, typer.Option(min=0, help="Weight of the routers' z-loss.")] = 0.0
    qat: Annotated[
        Literal["none", "int8", "q8", "q4", "mixed"],
        typer.Option(help="Quantization-aware training: use the weights as a bundle in this precision rounds them."),
    ] = "none"
    qat_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the steps, at the end, with rounded weights, with --qat.")
    ] = 1.0


@dataclass(frozen=True)
class ComputeOptions:
    """How a step is computed. These options do not change its result, except for rounding."""

    attention: Annotated[
        Literal["auto", "flex", "sdpa", "unpadded"],
        typer.Option(
            help="Attention kernel; auto: FlexAttention on CUDA; on a CPU without dropout, unpadded: no padding in the "
            "decoder."
        ),
    ] = "auto"
    experts: Annotated[
        Literal["auto", "grouped", "loop", "wide"],
        typer.Option(help="Kernel of the experts: one grouped product, a loop, or one wide FFN."),
    ] = "auto"
    keep_activations: Annotated[
        bool, typer.Option("--keep-activations", help="Keep activations instead of recomputing them.")
    ] = False
    compile_: Annotated[bool, typer.Option("--compile", help="Compile ViT, norms and dense FFNs.")] = False
    expert_ranks: Annotated[
        int, typer.Option(min=1, help="Expert parallelism: ranks that share the experts of a layer.")
    ] = 1
    replicas: Annotated[int, typer.Option(min=1, help="Replicas of the sharded model (HSDP).")] = 1
    gather: Annotated[Literal["bf16", "fp32"], typer.Option(help="Precision of weights sent between ranks.")] = "bf16"


app = typer.Typer(help="Train a Molmo on one GPU, or on several with torchrun.", no_args_is_help=True)
for _command in (train_data.start, train_data.draw, train_data.fetch):
    app.command()(with_extra(_command, f"train {_command.__name__}", "train"))
app.command()(with_extra(expand_options(train_points.points), "train points", "train"))
app.command()(with_extra(train_answers.answers, "train answers", "train"))
app.command()(with_extra(train_student.student, "train student", "train"))


def _add_stage(stage: str, summary: str) -> None:
    """Add the command of a stage of the paper: both take the same options."""

    def command(
        *,
        start: options.Start,
        data: Annotated[
            Path, typer.Option(help="Folder of the data sets: DATA/NAME each, and DATA/images.", show_default=False)
        ],
        out: options.Out,
        preset: options.Preset = "molmoe-1b",
        sets: DataOptions,
        freeze: options.Freeze = "",
        run: options.RunOptions,
        losses: LossOptions,
        compute: ComputeOptions,
        device: options.Device = "auto",
    ) -> None:
        from molmo_edge.training.recipe import recipe_for

        options.check_preset(preset)
        recipe = with_forward(run.changed(recipe_for(stage, preset), freeze), losses, compute)
        recipe = sets.choose(recipe)
        _run(start, recipe, lambda: sets.open(recipe, data), out, device, sets.features)

    command.__doc__ = summary
    app.command(stage)(with_extra(expand_options(command), f"train {stage}", "train"))


_add_stage("caption", "Stage 1: train all parts on captions, from the checkpoint that `train start` builds.")
_add_stage("multitask", "Stage 2: train on the mixture of pointing, conversation and academic data sets.")


def with_forward(recipe: Recipe, losses: LossOptions, compute: ComputeOptions) -> Recipe:
    """The recipe with these options."""
    from molmo_edge.training.fake_quantization import Qat
    from molmo_edge.training.sharding import Layout

    forward = dataclasses.replace(
        recipe.forward,
        balance_loss=losses.balance_loss,
        router_z_loss=losses.router_z_loss,
        attention=compute.attention,
        experts=compute.experts,
        recompute=not compute.keep_activations,
        compile=compute.compile_,
        **options.given(residual_dropout=losses.residual_dropout, answer_dropout=losses.answer_dropout),
    )
    return dataclasses.replace(
        recipe,
        forward=forward,
        encoding=dataclasses.replace(recipe.encoding, separator=losses.separator),
        qat=None if losses.qat == "none" else Qat(losses.qat, losses.qat_share),
        layout=Layout(compute.replicas, compute.expert_ranks, compute.gather),
    )


def _run(
    start: str, recipe: Recipe, open_data: Callable[[], Any], out: Path, device: str, features: Path | None
) -> None:
    from molmo_edge.checkpoints.hub_config import read_config
    from molmo_edge.checkpoints.weight_files import open_tensors
    from molmo_edge.frontend.tokenizer import Tokenizer
    from molmo_edge.training.parallel import world
    from molmo_edge.training.trainer import Trainer, build, cache_features, check_frozen

    directory = options.starting_checkpoint(start, out)
    config, source = read_config(directory), open_tensors(directory)
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    if features is not None:
        check_frozen(recipe)
    data = open_data()
    with world(device) as here:
        cache = (
            None
            if features is None
            else cache_features(features, config, source, data, recipe, here, tokenizer.special)
        )
        model = build(config, source, str(directory), recipe, here)
        trainer = Trainer(model, tokenizer, data, recipe, out, here, cache)
        if here.first:
            note("training on " + ", ".join(f"{s.name} ({len(s)})" for s in data.sets))
            done = f"{counted(trainer.step, 'step')} done, " if trainer.step else ""
            left = counted(max(0, recipe.steps - trainer.step), "step")
            note(f"{done}{left} left; {counted(recipe.batch, 'sequence')} per step")
        written = trainer.train()
        if here.first:
            note(f"wrote the model to {written}")
