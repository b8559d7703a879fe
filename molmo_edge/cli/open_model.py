"""Find and open the model of a command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from molmo_edge.cli.options import CachedModelOptions, llama_options
from molmo_edge.cli.output import note, progress
from molmo_edge.errors import MolmoEdgeError

if TYPE_CHECKING:
    from molmo_edge.checkpoints.hub import Download
    from molmo_edge.cli.options import ModelOptions
    from molmo_edge.molmo import Molmo


class Declined(MolmoEdgeError):  # noqa: N818 (not a failure)
    """The user answered that a model shall not be downloaded."""


def find_model(model: str | None, *, revision: str | None, quiet: bool, to_run: bool = True, ask: bool = True) -> Path:
    """The directory of the model that --model names.

    Says how large a download is before it starts, and shows its progress, unless `quiet`. `to_run`: see
    `resolve_model`. `ask`: on a terminal, ask before the download; its answer "no" raises Declined.
    """
    from molmo_edge.checkpoints.bundle import is_hub_id, resolve_model
    from molmo_edge.model_names import full_name

    if quiet and is_hub_id(full_name(model)):
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()

    def announce(download: Download) -> None:
        asks = ask and sys.stdin.isatty() and sys.stderr.isatty()
        note(str(download), quiet=quiet and not asks)
        if asks and not typer.confirm("Download it?", True, err=True):
            raise Declined(f"{download.hub_id} was not downloaded")

    return resolve_model(model, revision=revision, to_run=to_run, announce=announce)


def open_molmo(options: ModelOptions, *, quiet: bool) -> Molmo:
    """Open the model that `options` describe."""
    from molmo_edge.molmo import Molmo  # imports numpy, which --help does not need

    # Before the spinner: a download shows its own progress bars.
    directory = find_model(options.model, revision=options.revision, quiet=quiet, ask=not options.yes)
    cache: dict[str, Any] = {}
    if isinstance(options, CachedModelOptions):
        cache = {"scene_cache": options.scene_cache, "scene_cache_size": options.scene_cache_size}
    with progress("opening the model", quiet=quiet):
        return Molmo(
            directory,
            device=options.device,
            precision=options.precision,
            max_crops=options.max_crops,
            image_tokens=options.image_tokens,
            reuse_crops=options.reuse_crops,
            alpha=options.alpha,
            threads=options.threads,
            engine_options=llama_options(options.llama),
            draft=options.draft,
            **cache,
        )
