"""`molmo-edge rm`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molmo_edge.cli.list import size
from molmo_edge.cli.output import note
from molmo_edge.errors import MolmoEdgeError

if TYPE_CHECKING:
    from molmo_edge.checkpoints.local_models import LocalModel


class RemovalError(MolmoEdgeError):
    """A model that cannot be removed."""


def rm(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Short names or hub ids of downloaded models, or bundle directories.",
            show_default=False,
        ),
    ],
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete downloaded models and bundles."""
    from molmo_edge.checkpoints.local_models import remove_bundle, remove_cached

    found = [_find(model) for model in models]  # all of them, before the first is deleted
    for model in found:
        if not yes:
            if not sys.stdin.isatty():
                raise RemovalError(f"{model.name} was not deleted: confirm with --yes")
            if not typer.confirm(f"Delete {model.name}, {size(model.bytes)}, in {model.directory}?", err=True):
                continue
        if model.kind == "bundle" and str(model.directory) == model.name:
            remove_bundle(model.directory)
            if model.directory.exists():
                note(f"{model.directory} still has files that are not part of the bundle")
        else:
            remove_cached(model)
        note(f"deleted {model.name}: {size(model.bytes)}")


def _find(model: str) -> LocalModel:
    from molmo_edge.checkpoints.local_models import cached_models, models_in
    from molmo_edge.model_names import full_name

    if Path(model).is_dir():
        here = models_in(Path(model))
        if not here or here[0].directory != Path(model):
            raise RemovalError(f"{model} contains neither a bundle nor a checkpoint")
        if here[0].kind != "bundle":
            raise RemovalError(f"{model} is a checkpoint, and may hold other files: delete the directory yourself")
        return here[0]
    if model == "nano":
        raise RemovalError("nano is part of molmo-edge and cannot be removed")
    name = str(full_name(model))
    if (cached := next((one for one in cached_models() if one.name == name), None)) is None:
        raise RemovalError(f'{name} is not on this machine: "molmo-edge list" shows what is')
    return cached
