"""`molmo-edge train caption`, `multitask`, `points`: Molmo's two stages, and points of one's own."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.cli import train_data, train_points
from molmo_edge.cli import train_options as options
from molmo_edge.cli.output import note
from molmo_edge.config import PRESETS
from molmo_edge.system.extras import with_extra

if TYPE_CHECKING:
    from molmo_edge.training.recipe import Recipe


class Attention(str, Enum):
    auto = "auto"
    flex = "flex"
    sdpa = "sdpa"


class Kernel(str, Enum):
    auto = "auto"
    grouped = "grouped"
    loop = "loop"
    wide = "wide"


app = typer.Typer(help="Train a Molmo: on one card, or on many through torchrun.", no_args_is_help=True)
for _command in (train_data.start, train_data.draw, train_data.fetch):
    app.command()(with_extra(_command, f"train {_command.__name__}", "train"))


def _stage(stage: str, summary: str) -> Callable[..., None]:
    """The command of a stage of the paper: both take the same options."""

    def command(
        *,
        start: options.Start,
        data: Annotated[
            Path, typer.Option(help="The folder with the data sets: DATA/NAME each, DATA/images.", show_default=False)
        ],
        out: options.Out,
        preset: Annotated[str, typer.Option(help=f"Whose recipe: {', '.join(PRESETS)}.")] = "molmoe-1b",
        sets: Annotated[
            str | None,
            typer.Option(help="Data sets with commas between. Without it: those of the stage's mixture in --data."),
        ] = None,
        validate: Annotated[
            str | None, typer.Option(help="Data sets whose validation split is measured now and then.")
        ] = None,
        hub: Annotated[bool, typer.Option("--hub", help="Fetch sets from the hub that --data has no copy of.")] = False,
        steps: options.Steps = None,
        batch: options.Batch = None,
        micro: options.Micro = None,
        sequence: options.Length = None,
        max_crops: options.Crops = None,
        rates: options.Rates = None,
        freeze: options.Freeze = "",
        states: options.OptimizerStates = options.States.fp32,
        precision: options.Products = options.ProductsIn.auto,
        residual_dropout: Annotated[float | None, typer.Option(min=0, max=0.9, help="On all positions.")] = None,
        answer_dropout: Annotated[
            float | None, typer.Option(min=0, max=0.9, help="Where an answer's token is predicted, instead of it.")
        ] = None,
        separator: Annotated[bool, typer.Option("--separator", help="An <im_end> between packed annotations.")] = False,
        balance_loss: Annotated[float, typer.Option(min=0, help="Weight of the experts' load balancing.")] = 0.0,
        router_z_loss: Annotated[float, typer.Option(min=0, help="Weight of the routers' z-loss.")] = 0.0,
        attention: Annotated[Attention, typer.Option(help="auto: FlexAttention on CUDA.")] = Attention.auto,
        experts: Annotated[Kernel, typer.Option(help="How experts are multiplied.")] = Kernel.auto,
        keep_activations: Annotated[
            bool, typer.Option("--keep-activations", help="Do not compute them again in the backward pass.")
        ] = False,
        compile_: Annotated[
            bool, typer.Option("--compile", help="ViT, norms and dense FFNs through torch.compile.")
        ] = False,
        expert_ranks: Annotated[int, typer.Option(min=1, help="Ranks that share a layer's experts.")] = 1,
        replicas: Annotated[int, typer.Option(min=1, help="Copies of the sharded model.")] = 1,
        gather: Annotated[
            options.Precision, typer.Option(help="In what weights travel between ranks.")
        ] = options.Precision.bf16,
        workers: options.Workers = None,
        save_every: options.SaveEvery = None,
        log_every: options.LogEvery = None,
        seed: options.Seed = None,
        device: options.Device = "auto",
    ) -> None:
        from molmo_edge.data.catalog import open_sets
        from molmo_edge.data.mixture import Group, mixture_rates
        from molmo_edge.training.recipe import recipe_for
        from molmo_edge.training.sharding import Layout
        from molmo_edge.training.trainer import Data

        if preset not in PRESETS:
            raise typer.BadParameter(f'preset "{preset}" is not known; known are {", ".join(PRESETS)}')
        recipe = options.changed(
            recipe_for(stage, preset),
            steps=steps,
            batch=batch,
            micro=micro,
            sequence=sequence,
            max_crops=max_crops,
            rates=rates,
            freeze=freeze,
            states=states.value,
            precision=precision.value,
            workers=workers,
            save_every=save_every,
            log_every=log_every,
            seed=seed,
        )
        forward = options.given(residual_dropout=residual_dropout, answer_dropout=answer_dropout)
        forward |= {"balance_loss": balance_loss, "router_z_loss": router_z_loss}
        forward |= {"attention": attention.value, "experts": experts.value, "recompute": not keep_activations}
        forward["compile"] = compile_
        recipe = dataclasses.replace(
            recipe,
            forward=dataclasses.replace(recipe.forward, **forward),
            encoding=dataclasses.replace(recipe.encoding, separator=separator),
            layout=Layout(replicas, expert_ranks, gather.value),
        )
        if sets is not None:
            mine = options.names(sets)
            groups = [
                Group(group.rate, {n: s for n, s in group.sizes.items() if n in mine}) for group in recipe.mixture
            ]
            rest = {name: None for name in mine if all(name not in group.sizes for group in groups)}
            recipe = dataclasses.replace(recipe, mixture=(*groups, *([Group(1.0, rest)] if rest else [])))

        def open_data() -> Data:
            names = _sets_of(recipe, data, chosen=sets is not None, hub=hub)
            opened = open_sets(names, data, hub=hub)
            shares = mixture_rates(recipe.mixture, {each.name: len(each) for each in opened})
            used = [each for each in opened if each.name in shares]
            validation = open_sets(options.names(validate or ""), data, split="validation", hub=hub)
            return Data(used, [shares[each.name] for each in used], validation)

        _run(start, recipe, open_data, out, device)

    command.__doc__ = summary
    return with_extra(command, f"train {stage}", "train")


app.command()(with_extra(train_points.points, "train points", "train"))
app.command("caption")(
    _stage(
        "caption", "Stage 1: captions, all parts, from a language model and a ViT (train start makes the checkpoint)."
    )
)
app.command("multitask")(_stage("multitask", "Stage 2: the mixture of pointing, conversation and academic sets."))


def _sets_of(recipe: Recipe, data: Path, *, chosen: bool, hub: bool) -> list[str]:
    from molmo_edge.data.catalog import at_hand, in_mixture

    names = in_mixture(recipe.mixture)
    if chosen or hub:
        return names
    here = at_hand(recipe.mixture, data)
    if not here:
        raise options.TrainError(
            f"{data} has none of the stage's data sets ({', '.join(names)}): copy or draw some there, each in a folder "
            "of its name, or let --hub fetch them"
        )
    if len(here) < len(names):
        others = int(os.environ.get("RANK", "0")) > 0  # of the same run
        note(f"without {', '.join(name for name in names if name not in here)}: {data} has no copies", quiet=others)
    return here


def _run(start: str, recipe: Recipe, open_data: Callable[[], Any], out: Path, device: str) -> None:
    from molmo_edge.checkpoints.weight_files import open_tensors
    from molmo_edge.frontend.tokenizer import Tokenizer
    from molmo_edge.training.parallel import world
    from molmo_edge.training.trainer import Trainer, build

    directory = options.starting_checkpoint(start, out)
    config = read_config(directory)
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    data = open_data()
    with world(device) as here:
        model = build(config, open_tensors(directory), str(directory), recipe, here)
        trainer = Trainer(model, tokenizer, data, recipe, out, here)
        if here.first:
            note("training on " + ", ".join(f"{s.name} ({len(s)})" for s in data.sets))
            done = f"{trainer.step} steps are done, " if trainer.step else ""
            note(f"{done}{max(0, recipe.steps - trainer.step)} steps of {recipe.batch} sequences are left")
        written = trainer.train()
        if here.first:
            note(f"the model is in {written}: ask it, or export it")
