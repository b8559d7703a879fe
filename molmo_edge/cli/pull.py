"""`molmo-edge pull`"""

from __future__ import annotations

from typing import Annotated

import typer

from molmo_edge.cli import options
from molmo_edge.cli.open_model import find_model
from molmo_edge.cli.output import note


def pull(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help='Short names ("molmo-edge list --all") or hub ids.', show_default=False),
    ],
    *,
    revision: options.Revision = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show how large the downloads are.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Download models. The size is shown before a download starts; an interrupted one resumes."""
    from molmo_edge.checkpoints.bundle import is_hub_id
    from molmo_edge.model_names import NAMED_MODELS, full_name

    for model in models:
        if not is_hub_id(full_name(model)) and model not in NAMED_MODELS:
            raise typer.BadParameter(
                f"{model} is neither a hub id of the form owner/name nor a short name ({', '.join(NAMED_MODELS)})"
            )
    for model in models:
        if dry_run:
            from molmo_edge.checkpoints.hub import download_of

            download = download_of(str(full_name(model)), revision) if model != "nano" else None
            print(download or f"{model}: nothing to download")
            continue
        directory = find_model(model, revision=revision, quiet=quiet, to_run=False, ask=False)
        print(directory)
        _advise(model, quiet=quiet)


def _advise(model: str, *, quiet: bool) -> None:
    if model == "nano":
        note("nano is part of molmo-edge: nothing to download", quiet=quiet)
    else:
        note(f'use it: molmo-edge ask photo.jpg "Point to the dog." --model {model}', quiet=quiet)
        note(f"its memory: molmo-edge plan {model}", quiet=quiet)
