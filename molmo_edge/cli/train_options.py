"""Options that the commands of `molmo-edge train` share, and what they make of a recipe."""

from __future__ import annotations

import dataclasses
import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.system.key_values import parse_key_values

if TYPE_CHECKING:
    from molmo_edge.training.recipe import Recipe


class TrainError(MolmoEdgeError):
    """Options that make no run."""


class Precision(str, Enum):
    bf16 = "bf16"
    fp32 = "fp32"


class ProductsIn(str, Enum):
    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


class States(str, Enum):
    fp32 = "fp32"
    eight = "8bit"


_PARTS = '"connector", "vision", "decoder", with commas between.'
_RATES = "Peak learning rates where they are not the stage's: connector=2e-4,vision=6e-6,decoder=2e-5."
Start = Annotated[
    str, typer.Option("--from", help="The checkpoint to start from: a directory, or a hub id.", show_default=False)
]
Out = Annotated[
    Path, typer.Option(help="The run's directory: log, checkpoints, at the end model/.", show_default=False)
]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps in all. Without it: the stage's.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Sequences a step, on all ranks together.")]
Micro = Annotated[int | None, typer.Option(min=1, help="Sequences at once on each rank: what memory allows.")]
Length = Annotated[int | None, typer.Option(min=64, help="Most tokens of a sequence, image included.")]
Crops = Annotated[int | None, typer.Option(min=0, help="Most crops of an image.")]
Rates = Annotated[str | None, typer.Option(help=_RATES, show_default=False)]
Freeze = Annotated[str, typer.Option(help=f"Parts that stay as they are: {_PARTS}")]
OptimizerStates = Annotated[States, typer.Option(help="Of AdamW: 8 bit (bitsandbytes) take a quarter of the memory.")]
Products = Annotated[
    ProductsIn, typer.Option(help="Of matrix products; auto: bf16 on CUDA, else fp32. Weights and sums are fp32.")
]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes of each rank that read ahead.")]
SaveEvery = Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.")]
LogEvery = Annotated[int | None, typer.Option(min=1, help="Steps between lines.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Of the samples' order and all that is left to chance.")]
Device = Annotated[str, typer.Option(help='"auto", "cpu" or "cuda".')]


def names(text: str) -> tuple[str, ...]:
    """ "a, b" -> ("a", "b")."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def starting_checkpoint(start: str, out: Path) -> Path:
    """The directory that --from means, fetched if it is on the hub. Raises TrainError where --out is the same."""
    from molmo_edge.checkpoints.manifest import MANIFEST
    from molmo_edge.cli.open_model import find_model

    directory = find_model(start, revision=None, quiet=False)
    if (directory / MANIFEST).is_file():
        raise TrainError(
            f"{start} is a bundle, and training begins with a checkpoint: molmo-edge export {start} --engine torch "
            "--out DIR makes one of it"
        )
    if out.resolve() == directory.resolve():
        raise TrainError(f"--out {out} is the checkpoint itself: name another directory for the run")
    return directory


def given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def changed(
    recipe: Recipe, *, rates: str | None, freeze: str = "", states: str, sequence: int | None, **rest: Any
) -> Recipe:
    """The stage's recipe with what the command line says otherwise."""
    from molmo_edge.training.optimizer import PARTS, Rate

    frozen = names(freeze)
    if unknown := [part for part in frozen if part not in PARTS]:
        raise typer.BadParameter(f"--freeze takes {_PARTS} Not {', '.join(unknown)}")
    peaks = _peaks(rates or "")
    shorter = min(1.0, (rest["steps"] or recipe.steps) / recipe.steps)  # warm-ups keep their share of a run
    parts: dict[str, Any] = {}
    for part in PARTS:
        stage = getattr(recipe.optimizer, part)
        parts[part] = Rate(peaks.get(part, stage.peak), max(1, round(stage.warmup * shorter)))
    optimizer = dataclasses.replace(recipe.optimizer, states=states, **parts)
    encoding = dataclasses.replace(recipe.encoding, **given(sequence=sequence))
    if rest["micro"] is None:
        rest["micro"] = _micro(rest["batch"] or recipe.batch, recipe.micro)
    return dataclasses.replace(recipe, frozen=frozen, optimizer=optimizer, encoding=encoding, **given(**rest))


def _micro(batch: int, most: int) -> int:
    """The largest number of sequences at once, up to `most`, that divides a rank's share of the batch."""
    share, rest = divmod(batch, int(os.environ.get("WORLD_SIZE", "1")))
    if rest or not share:  # refused by the trainer, with the numbers
        return most
    return next(size for size in range(min(share, most), 0, -1) if share % size == 0)


def _peaks(text: str) -> dict[str, float]:
    from molmo_edge.training.optimizer import PARTS

    try:
        peaks = {part: float(value) for part, value in parse_key_values(text).items()}
    except ValueError:
        peaks = {"": -1.0}
    if any(part not in PARTS or not peak >= 0 for part, peak in peaks.items()):
        raise typer.BadParameter(f'--rates takes {", ".join(f"{p}=NUMBER" for p in PARTS)}, not "{text}"')
    return peaks
