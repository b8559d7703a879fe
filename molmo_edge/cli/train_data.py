"""`molmo-edge train start`, `draw` and `fetch`: what a run begins with."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molmo_edge.cli.output import note

if TYPE_CHECKING:
    from molmo_edge.data.downloads import Counts


class Kind(str, Enum):
    charts = "charts"
    tables = "tables"
    documents = "documents"
    diagrams = "diagrams"
    code = "code"
    clocks = "clocks"
    points = "points"
    counts = "count"  # "count" is a method of every str


class Stored(str, Enum):
    bf16 = "bf16"
    fp32 = "fp32"


def start(
    *,
    decoder: Annotated[str, typer.Option(help="OLMoE, Qwen2 or OLMo: directory or hub id.", show_default=False)],
    tower: Annotated[str, typer.Option(help="CLIP or DINOv2: directory or hub id.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The directory to make; it must not exist.", show_default=False)],
    preset: Annotated[
        str, typer.Option(help='The model to make, of the paper or "auto": what the two parts allow.')
    ] = "molmoe-1b",
    precision: Annotated[Stored, typer.Option(help="Of the weights that are written.")] = Stored.bf16,
    crop_size: Annotated[
        int | None, typer.Option(min=28, help="Side of a crop in pixels, where it is not the preset's.")
    ] = None,
    overlap: Annotated[
        float | None, typer.Option(min=0, max=0.9, help="Share of a crop's side that its neighbour repeats.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the connector.")] = 0,
) -> None:
    """The checkpoint that stage 1 starts from: a language model, a ViT, and a random connector between them."""
    from molmo_edge.training.starting_checkpoint import build_base

    build_base(
        decoder,
        tower,
        out,
        preset=preset,
        precision=precision.value,
        seed=seed,
        crop_size=crop_size,
        overlap=overlap,
    )
    note(f"the starting checkpoint is in {out}")


def draw(
    kind: Annotated[Kind, typer.Argument(help="What to draw.", show_default=False)],
    *,
    count: Annotated[int, typer.Option(min=1, help="Pictures in all, those already there counted.")],
    out: Annotated[Path, typer.Option(help="The folder, DATA/NAME of a data set.", show_default=False)],
    seed: Annotated[int, typer.Option(min=0, help="Another one draws other pictures.")] = 0,
    fonts: Annotated[Path | None, typer.Option(help="A folder with more fonts, .ttf or .otf.")] = None,
    sprites: Annotated[
        Path | None, typer.Option(help="points and count: pictures made by molmo_edge.data.drawn.sprites.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
) -> None:
    """Draw a data set whose answers are exact, in the columns of the PixMo set of that kind."""
    from molmo_edge.data.drawn.generate import generate

    drawn = generate(kind.value, count, out, seed=seed, fonts=fonts, sprites=sprites, jobs=jobs)
    note(f"{drawn} pictures drawn, {count} in {out}")


def fetch(
    sets: Annotated[list[str], typer.Argument(help="Of PixMo: pixmo_cap, pixmo_points, ...", show_default=False)],
    *,
    data: Annotated[Path, typer.Option(help="The folder with the data sets.", show_default=False)],
    jobs: Annotated[int, typer.Option(min=1, max=256, help="Pictures at once; two at most from one host.")] = 16,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again for what failed for good before.")
    ] = False,
) -> None:
    """Fetch the pictures that PixMo names by address. Stopped, it goes on where it was."""
    from molmo_edge.data.catalog import fetch_pictures

    manifest = fetch_pictures(sets, data, jobs=jobs, retry_failed=retry_failed, progress=_Progress())
    note(", ".join(f"{number} {what}" for what, number in manifest.counts().items()))


class _Progress:
    """A line for every thousand pictures."""

    def __init__(self) -> None:
        self._told = 0

    def __call__(self, counts: Counts) -> None:
        if counts.done - self._told >= 1000:
            self._told = counts.done
            note(
                f"{counts.fetched} fetched, {counts.known} were there, {counts.failed} gone, {counts.other_file} others"
                + (f", {counts.busy} at busy hosts: fetch again later" if counts.busy else "")
            )
