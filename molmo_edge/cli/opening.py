"""Open the model that a command names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo_edge.cli.output import is_file, progress

if TYPE_CHECKING:
    from molmo_edge.molmo import Molmo


def find_model(model: str | None, *, revision: str | None, quiet: bool, to_run: bool = True) -> Path:
    """The directory that --model means; one of the hub is fetched, which shows its progress unless `quiet`."""
    from molmo_edge.bundle import is_hub_id, resolve_model

    if quiet and is_hub_id(model):
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    return resolve_model(model, revision=revision, to_run=to_run)


def open_molmo(
    image: Path,
    *,
    model: str | None,
    revision: str | None,
    device: str,
    precision: str,
    max_crops: int | None,
    threads: int | None,
    llama: str | None,
    quiet: bool,
) -> tuple[Molmo, Any]:
    """A Molmo, and what to give it as the image. Modules that bring numpy are imported here, not to show a --help."""
    with progress("opening the photo", quiet=quiet):
        from molmo_edge.loading import load_image
        from molmo_edge.molmo import Molmo

        photo = image if is_file(image) else load_image(image)  # what is no file is found out before a model opens
    # In front of the spinner: the download has progress bars of its own.
    directory = find_model(model, revision=revision, quiet=quiet)
    with progress("opening the model", quiet=quiet):
        molmo = Molmo(
            directory,
            device=device,
            precision=precision,
            max_crops=max_crops,
            threads=threads,
            llama=llama,
        )
    return molmo, photo
