"""`molmo-edge train start`, `draw` and `fetch`: the checkpoint and the data that a run needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from molmo_edge.cli.output import note
from molmo_edge.sdk.readable_text import counted

if TYPE_CHECKING:
    from molmo_edge.data.downloads import Counts


def start(
    *,
    decoder: Annotated[str, typer.Option(help="OLMoE, Qwen2 or OLMo: directory or hub id.", show_default=False)],
    tower: Annotated[str, typer.Option(help="CLIP or DINOv2: directory or hub id.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Directory to write; it must not exist.", show_default=False)],
    preset: Annotated[
        str, typer.Option(help='Configuration: a model of the paper, or "auto" to derive it from the two parts.')
    ] = "molmoe-1b",
    precision: Annotated[Literal["bf16", "fp32"], typer.Option(help="Precision of the written weights.")] = "bf16",
    crop_size: Annotated[
        int | None, typer.Option(min=28, help="Side of a crop in pixels. Default: the preset's.")
    ] = None,
    overlap: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.9,
            help="Share of a crop that its neighbour overlaps. Default: the preset's.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the connector's weights.")] = 0,
) -> None:
    """Build the starting checkpoint of stage 1 from a language model, a ViT and a random connector."""
    from molmo_edge.training.starting_checkpoint import build_base

    build_base(
        decoder,
        tower,
        out,
        preset=preset,
        precision=precision,
        seed=seed,
        crop_size=crop_size,
        overlap=overlap,
    )
    note(f"wrote the starting checkpoint to {out}")


def draw(
    kind: Annotated[
        Literal["charts", "tables", "documents", "diagrams", "code", "clocks", "points", "count"],
        typer.Argument(help="Kind of data set.", show_default=False),
    ],
    *,
    count: Annotated[int, typer.Option(min=1, help="Total number of pictures, including those that exist.")],
    out: Annotated[Path, typer.Option(help="Folder of the data set: DATA/NAME.", show_default=False)],
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the pictures.")] = 0,
    fonts: Annotated[Path | None, typer.Option(help="Folder with more fonts, .ttf or .otf.")] = None,
    sprites: Annotated[
        Path | None, typer.Option(help="For points and count: folder made by molmo_edge.data.drawn.sprites.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 1,
) -> None:
    """Generate a synthetic data set with exact answers, in the format of the PixMo set of that kind."""
    from molmo_edge.data.drawn.generate import generate

    drawn = generate(kind, count, out, seed=seed, fonts=fonts, sprites=sprites, jobs=jobs)
    note(f"drew {counted(drawn, 'picture')}; {out} now has {count}")


def fetch(
    sets: Annotated[list[str], typer.Argument(help="Sets of PixMo: pixmo_cap, pixmo_points, ...", show_default=False)],
    *,
    data: Annotated[Path, typer.Option(help="Folder of the data sets.", show_default=False)],
    jobs: Annotated[int, typer.Option(min=1, max=256, help="Simultaneous downloads, at most two per host.")] = 16,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Also retry pictures that failed permanently.")
    ] = False,
) -> None:
    """Download the pictures of PixMo. Running the command again resumes a stopped download."""
    from molmo_edge.data.catalog import fetch_pictures

    manifest = fetch_pictures(sets, data, jobs=jobs, retry_failed=retry_failed, progress=_Progress())
    note(", ".join(f"{number} {what}" for what, number in manifest.counts().items()))


class _Progress:
    """Print a line for every thousand pictures."""

    def __init__(self) -> None:
        self._printed = 0

    def __call__(self, counts: Counts) -> None:
        if counts.done - self._printed >= 1000:
            self._printed = counts.done
            note(
                f"{counts.fetched} fetched, {counts.known} present, {counts.failed} unavailable, "
                f"{counts.other_file} changed"
                + (f", {counts.busy} at busy hosts: run the command again later" if counts.busy else "")
            )
