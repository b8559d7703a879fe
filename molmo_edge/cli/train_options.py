"""Options that the commands of `molmo-edge train` share, and how they change a stage's recipe."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.presets import PRESETS

if TYPE_CHECKING:
    from molmo_edge.training.recipe import Recipe


class TrainError(MolmoEdgeError):
    """Options from which a run cannot start."""


_PARTS = '"connector", "vision", "decoder", "point_head", separated by commas.'
_STATES = "Precision of the AdamW states; 8bit (bitsandbytes) takes a quarter of the memory."
Start = Annotated[str, typer.Option("--from", help="Checkpoint directory or hub id to start from.", show_default=False)]
Out = Annotated[
    Path, typer.Option(help="Directory of the run: log, checkpoints and, at the end, model/.", show_default=False)
]
Preset = Annotated[str, typer.Option(help=f"Model whose training recipe to use: {', '.join(PRESETS)}.")]
Freeze = Annotated[str, typer.Option(help=f"Parts that are not trained: {_PARTS}")]
Device = Annotated[str, typer.Option(help='"auto", "cpu" or "cuda".')]


def check_preset(preset: str) -> None:
    """Raise typer.BadParameter if the name is not in PRESETS."""
    if preset not in PRESETS:
        raise typer.BadParameter(f'"{preset}" is not a known preset (known: {", ".join(PRESETS)})')


@dataclass(frozen=True)
class RunOptions:
    """What a run changes of its stage's recipe; None keeps the stage's value."""

    steps: Annotated[int | None, typer.Option(min=1, help="Total steps. Default: the stage's.")] = None
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences per step, over all ranks.")] = None
    micro: Annotated[
        int | None, typer.Option(min=1, help="Micro-batch size: sequences per forward pass on each rank.")
    ] = None
    sequence: Annotated[
        int | None, typer.Option(min=64, help="Maximum length of a sequence in tokens, image included.")
    ] = None
    max_crops: Annotated[int | None, typer.Option(min=0, help="Maximum number of crops of an image.")] = None
    rates: Annotated[
        str | None,
        typer.Option(help="Peak learning rates: connector=2e-4,vision=6e-6,decoder=2e-5. Default: the stage's."),
    ] = None
    states: Annotated[Literal["fp32", "8bit"], typer.Option(help=_STATES)] = "fp32"
    precision: Annotated[
        Literal["auto", "bf16", "fp32"],
        typer.Option(help="Precision of matrix products; auto: bf16 on CUDA, else fp32. Weights and sums are fp32."),
    ] = "auto"
    workers: Annotated[int | None, typer.Option(min=0, help="Processes per rank that prepare batches.")] = None
    save_every: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.")] = None
    log_every: Annotated[int | None, typer.Option(min=1, help="Steps between lines of the log.")] = None
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the samples' order and all random choices.")] = None

    def changed(self, recipe: Recipe, freeze: str = "") -> Recipe:
        """The stage's recipe with these options."""
        from molmo_edge.training.optimizer import PARTS, Rate

        frozen = names(freeze)
        if unknown := [part for part in frozen if part not in PARTS]:
            raise typer.BadParameter(f"{', '.join(unknown)} cannot be frozen. --freeze takes {_PARTS}")
        peaks = _peaks(self.rates or "")
        shorter = min(1.0, (self.steps or recipe.steps) / recipe.steps)  # warm-ups keep their share of a run
        parts: dict[str, Any] = {}
        for part in PARTS:
            stage = getattr(recipe.optimizer, part)
            parts[part] = Rate(peaks.get(part, stage.peak), max(1, round(stage.warmup * shorter)))
        fields = ("steps", "batch", "max_crops", "precision", "workers", "save_every", "log_every", "seed")
        return dataclasses.replace(
            recipe,
            frozen=frozen,
            micro=self.micro or _micro(self.batch or recipe.batch, recipe.micro),
            optimizer=dataclasses.replace(recipe.optimizer, states=self.states, **parts),
            encoding=dataclasses.replace(recipe.encoding, sequence=self.sequence or recipe.encoding.sequence),
            **given(**{name: getattr(self, name) for name in fields}),
        )


def names(text: str) -> tuple[str, ...]:
    """ "a, b" -> ("a", "b")."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def starting_checkpoint(start: str, out: Path) -> Path:
    """The directory that --from names, downloaded if it is on the hub. Raises TrainError if --out is the same."""
    from molmo_edge.checkpoints.bundle import is_bundle
    from molmo_edge.cli.open_model import find_model

    directory = find_model(start, revision=None, quiet=False)
    if is_bundle(directory):
        raise TrainError(
            f"{start} is a bundle, but training starts from a checkpoint: convert it with "
            f"`molmo-edge export {start} --engine torch --out DIR`"
        )
    if out.resolve() == directory.resolve():
        raise TrainError(f"--out {out} is the checkpoint itself: choose another directory for the run")
    return directory


def given(**values: Any) -> dict[str, Any]:
    """Return the arguments that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def _micro(batch: int, most: int) -> int:
    """The largest number of sequences per pass, up to `most`, that divides the batch size per rank."""
    share, rest = divmod(batch, int(os.environ.get("WORLD_SIZE", "1")))
    if rest or not share:  # the trainer raises an error with the numbers
        return most
    return next(size for size in range(min(share, most), 0, -1) if share % size == 0)


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
