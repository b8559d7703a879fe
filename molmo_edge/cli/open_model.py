"""Find and open the model of a command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from molmo_edge.cli.options import llama_options
from molmo_edge.cli.output import progress

if TYPE_CHECKING:
    from molmo_edge.cli.options import ModelOptions
    from molmo_edge.molmo import Molmo


def find_model(model: str | None, *, revision: str | None, quiet: bool, to_run: bool = True) -> Path:
    """The directory of the model that --model names.

    Downloads a hub id and shows the progress unless `quiet`. `to_run`: see `resolve_model`.
    """
    from molmo_edge.checkpoints.bundle import is_hub_id, resolve_model

    if quiet and is_hub_id(model):
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    return resolve_model(model, revision=revision, to_run=to_run)


def open_molmo(options: ModelOptions, *, quiet: bool) -> Molmo:
    """Open the model that `options` describe."""
    from molmo_edge.molmo import Molmo  # imports numpy, which --help does not need

    # Before the spinner: a download shows its own progress bars.
    directory = find_model(options.model, revision=options.revision, quiet=quiet)
    with progress("opening the model", quiet=quiet):
        return Molmo(
            directory,
            device=options.device,
            precision=options.precision,
            max_crops=options.max_crops,
            alpha=options.alpha,
            threads=options.threads,
            engine_options=llama_options(options.llama),
        )
