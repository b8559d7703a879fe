"""`molmo-edge train caption`, `multitask`, `points`: Molmo's two stages, and points of one's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molmo_edge.cli import train_data
from molmo_edge.cli.output import note
from molmo_edge.config import PRESETS
from molmo_edge.errors import MolmoEdgeError

if TYPE_CHECKING:
    from molmo_edge.training.recipe import Recipe

app = typer.Typer(help="Train a Molmo: on one card, or on many through torchrun.", no_args_is_help=True)
for _command in (train_data.start, train_data.draw, train_data.fetch):
    app.command()(_command)


class TrainError(MolmoEdgeError):
    """Options that make no run."""


class Precision(str, Enum):
    bf16 = "bf16"
    fp32 = "fp32"


class States(str, Enum):
    fp32 = "fp32"
    eight = "8bit"


class Attention(str, Enum):
    auto = "auto"
    flex = "flex"
    sdpa = "sdpa"


class Kernel(str, Enum):
    auto = "auto"
    grouped = "grouped"
    loop = "loop"
    wide = "wide"


_FROM = typer.Option("--from", help="The checkpoint to start from: a directory, or a hub id.", show_default=False)
_DATA = typer.Option(help="The folder with the data sets: DATA/NAME each, DATA/images.", show_default=False)
_OUT = typer.Option(help="The run's directory: log, checkpoints, at the end model/.", show_default=False)
_PARTS = '"connector", "vision", "decoder", with commas between.'
_RATES = "Peak learning rates where they are not the stage's: connector=2e-4,vision=6e-6,decoder=2e-5."
Steps = Annotated[int | None, typer.Option(min=1, help="Steps in all. Without it: the stage's.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Sequences a step, on all ranks together.")]
Micro = Annotated[int | None, typer.Option(min=1, help="Sequences at once on each rank: what memory allows.")]
Length = Annotated[int | None, typer.Option(min=64, help="Most tokens of a sequence, image included.")]
Crops = Annotated[int | None, typer.Option(min=0, help="Most crops of an image.")]
Rates = Annotated[str | None, typer.Option(help=_RATES, show_default=False)]
Freeze = Annotated[str, typer.Option(help=f"Parts that stay as they are: {_PARTS}")]
OptimizerStates = Annotated[States, typer.Option(help="Of AdamW: 8 bit (bitsandbytes) take a quarter of the memory.")]
Products = Annotated[Precision, typer.Option(help="Of matrix products. Weights and sums are fp32.")]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes of each rank that read ahead.")]
SaveEvery = Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.")]
LogEvery = Annotated[int | None, typer.Option(min=1, help="Steps between lines.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Of the samples' order and all that is left to chance.")]
Device = Annotated[str, typer.Option(help='"auto", "cpu" or "cuda".')]


def _stage(stage: str, summary: str) -> Callable[..., None]:
    """The command of a stage of the paper: both take the same options."""

    def command(
        *,
        start: Annotated[str, _FROM],
        data: Annotated[Path, _DATA],
        out: Annotated[Path, _OUT],
        preset: Annotated[str, typer.Option(help=f"Whose recipe: {', '.join(PRESETS)}.")] = "molmoe-1b",
        sets: Annotated[
            str | None,
            typer.Option(help="Data sets with commas between. Without it: those of the stage's mixture in --data."),
        ] = None,
        validate: Annotated[
            str | None, typer.Option(help="Data sets whose validation split is measured now and then.")
        ] = None,
        hub: Annotated[bool, typer.Option("--hub", help="Fetch sets from the hub that --data has no copy of.")] = False,
        steps: Steps = None,
        batch: Batch = None,
        micro: Micro = None,
        sequence: Length = None,
        max_crops: Crops = None,
        rates: Rates = None,
        freeze: Freeze = "",
        states: OptimizerStates = States.fp32,
        precision: Products = Precision.bf16,
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
        expert_ranks: Annotated[int, typer.Option(min=1, help="Ranks that share a layer's experts.")] = 1,
        replicas: Annotated[int, typer.Option(min=1, help="Copies of the sharded model.")] = 1,
        gather: Annotated[Precision, typer.Option(help="In what weights travel between ranks.")] = Precision.bf16,
        workers: Workers = None,
        save_every: SaveEvery = None,
        log_every: LogEvery = None,
        seed: Seed = None,
        device: Device = "auto",
    ) -> None:
        from molmo_edge.training.data.catalog import open_sets
        from molmo_edge.training.mixture import Group, mixture_rates
        from molmo_edge.training.parallel import Layout
        from molmo_edge.training.recipe import recipe_for
        from molmo_edge.training.trainer import Data

        if preset not in PRESETS:
            raise typer.BadParameter(f'preset "{preset}" is not known; known are {", ".join(PRESETS)}')
        recipe = _changed(
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
        forward = _given(residual_dropout=residual_dropout, answer_dropout=answer_dropout)
        forward |= {"balance_loss": balance_loss, "router_z_loss": router_z_loss}
        forward |= {"attention": attention.value, "experts": experts.value, "recompute": not keep_activations}
        recipe = dataclasses.replace(
            recipe,
            forward=dataclasses.replace(recipe.forward, **forward),
            encoding=dataclasses.replace(recipe.encoding, separator=separator),
            layout=Layout(replicas, expert_ranks, gather.value),
        )
        if sets is not None:
            mine = [name.strip() for name in sets.split(",") if name.strip()]
            groups = [
                Group(group.rate, {n: s for n, s in group.sizes.items() if n in mine}) for group in recipe.mixture
            ]
            rest = {name: None for name in mine if all(name not in group.sizes for group in groups)}
            recipe = dataclasses.replace(recipe, mixture=(*groups, *([Group(1.0, rest)] if rest else [])))

        def open_data() -> Data:
            names = _sets_of(recipe, data, chosen=sets is not None, hub=hub)
            opened = open_sets(names, data, hub=hub)
            shares = mixture_rates(recipe.mixture, {each.name: len(each) for each in opened})
            measured = [name.strip() for name in (validate or "").split(",") if name.strip()]
            used = [each for each in opened if each.name in shares]
            validation = open_sets(measured, data, split="validation", hub=hub)
            return Data(used, [shares[each.name] for each in used], validation)

        _run(start, recipe, open_data, out, device)

    command.__doc__ = summary
    return command


app.command("caption")(
    _stage(
        "caption", "Stage 1: captions, all parts, from a language model and a ViT (train start makes the checkpoint)."
    )
)
app.command("multitask")(_stage("multitask", "Stage 2: the mixture of pointing, conversation and academic sets."))


def _sets_of(recipe: Recipe, data: Path, *, chosen: bool, hub: bool) -> list[str]:
    from molmo_edge.training.data.catalog import at_hand, in_mixture

    names = in_mixture(recipe.mixture)
    if chosen or hub:
        return names
    here = at_hand(recipe.mixture, data)
    if not here:
        raise TrainError(
            f"{data} has none of the stage's data sets ({', '.join(names)}): copy or draw some there, each in a folder "
            "of its name, or let --hub fetch them"
        )
    if len(here) < len(names):
        note(f"without {', '.join(name for name in names if name not in here)}: {data} has no copies")
    return here


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _changed(
    recipe: Recipe, *, rates: str | None, freeze: str, states: str, sequence: int | None, **rest: Any
) -> Recipe:
    """The stage's recipe with what the command line says otherwise."""
    from molmo_edge.training.optimizer import PARTS, Rate

    frozen = tuple(part.strip() for part in freeze.split(",") if part.strip())
    if unknown := [part for part in frozen if part not in PARTS]:
        raise typer.BadParameter(f"--freeze takes {_PARTS} Not {', '.join(unknown)}")
    peaks = _peaks(rates or "")
    shorter = min(1.0, (rest["steps"] or recipe.steps) / recipe.steps)  # warm-ups keep their share of a run
    parts = {}
    for part in PARTS:
        stage = getattr(recipe.optimizer, part)
        parts[part] = Rate(peaks.get(part, stage.peak), max(1, round(stage.warmup * shorter)))
    optimizer = dataclasses.replace(recipe.optimizer, states=states, **parts)
    encoding = dataclasses.replace(recipe.encoding, **_given(sequence=sequence))
    return dataclasses.replace(recipe, frozen=frozen, optimizer=optimizer, encoding=encoding, **_given(**rest))


def _peaks(text: str) -> dict[str, float]:
    from molmo_edge.training.optimizer import PARTS

    peaks = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        part, _, value = item.partition("=")
        try:
            peaks[part] = float(value)
        except ValueError:
            peaks[part] = -1.0
        if part not in PARTS or peaks[part] < 0:
            raise typer.BadParameter(f'--rates takes {", ".join(f"{p}=NUMBER" for p in PARTS)}, not "{item}"')
    return peaks


def _run(start: str, recipe: Recipe, open_data: Callable[[], Any], out: Path, device: str) -> None:
    from molmo_edge.cli.opening import find_model
    from molmo_edge.config import MolmoConfig
    from molmo_edge.modeling.checkpoint import open_tensors
    from molmo_edge.tokenizer import Tokenizer
    from molmo_edge.training.parallel import world
    from molmo_edge.training.trainer import Trainer, build

    directory = find_model(start, revision=None, quiet=False)
    config = MolmoConfig.from_hub(directory)
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    data = open_data()
    with world(device) as here:
        model = build(config, open_tensors(directory), str(directory), recipe, here)
        written = Trainer(model, tokenizer, data, recipe, out, here).train()
        if here.first:
            note(f"the model is in {written}: ask it, or export it")
