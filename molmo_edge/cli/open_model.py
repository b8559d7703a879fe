"""Open the model that a command names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from molmo_edge.cli.options import llama_options
from molmo_edge.cli.output import progress

if TYPE_CHECKING:
    from molmo_edge.cli.options import Opening
    from molmo_edge.molmo import Molmo


def find_model(model: str | None, *, revision: str | None, quiet: bool, to_run: bool = True) -> Path:
    """The directory that --model means; one of the hub is fetched, which shows its progress unless `quiet`."""
    from molmo_edge.checkpoints.bundle import is_hub_id, resolve_model

    if quiet and is_hub_id(model):
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    return resolve_model(model, revision=revision, to_run=to_run)


def open_molmo(opening: Opening, *, quiet: bool) -> Molmo:
    """Modules that bring numpy are imported here, not to show a --help."""
    from molmo_edge.molmo import Molmo

    # In front of the spinner: the download has progress bars of its own.
    directory = find_model(opening.model, revision=opening.revision, quiet=quiet)
    with progress("opening the model", quiet=quiet):
        return Molmo(
            directory,
            device=opening.device,
            precision=opening.precision,
            max_crops=opening.max_crops,
            threads=opening.threads,
            engine_options=llama_options(opening.llama),
        )
