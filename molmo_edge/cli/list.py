"""`molmo-edge list`"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molmo_edge.cli import options
from molmo_edge.cli.output import note, print_json, print_table

if TYPE_CHECKING:
    from molmo_edge.checkpoints.local_models import LocalModel


def list_models(
    folder: Annotated[
        Path, typer.Argument(help="A folder with bundles and checkpoints.", file_okay=False, exists=True)
    ] = Path(),
    *,
    every: Annotated[
        bool, typer.Option("--all", "-a", help="Show the published models, with their short names, instead.")
    ] = False,
    json: options.Json = False,
) -> None:
    """List the models on this machine: nano, those of the hub's cache, and those in a folder."""
    if every:
        _published(json=json)
        return
    from molmo_edge.checkpoints.local_models import cached_models, embedded_model, models_in
    from molmo_edge.model_names import short_name

    models = [embedded_model(), *cached_models(), *models_in(folder)]
    if json:
        print_json({"models": [_to_dict(model) for model in models]})
        return
    rows = [
        (
            model.name,
            short_name(model.name) or "",
            " ".join(filter(None, [model.kind, model.precision])),
            size(model.bytes),
        )
        for model in models
    ]
    print_table(("model", "short name", "kind", "size"), rows, left=3)


def size(count: int) -> str:
    """ "28.9 GB", "68 MB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _to_dict(model: LocalModel) -> dict[str, Any]:
    from molmo_edge.model_names import short_name

    return asdict(model) | {"short_name": short_name(model.name), "directory": str(model.directory)}


def _published(*, json: bool) -> None:
    from molmo_edge.model_names import NAMED_MODELS

    if json:
        print_json({"models": [asdict(model) for model in NAMED_MODELS.values()]})
        return
    rows = []
    for model in NAMED_MODELS.values():
        bases = ", ".join(f"{name} ({license})" for name, license in model.bases)
        download = (
            "unknown" if model.download is None else f"{model.download / 1e9:.1f} GB" if model.download else "none"
        )
        rows.append((model.name, model.hub_id or "embedded", model.license, bases, download))
    print_table(("short name", "hub id", "license", "trained from", "download"), rows, left=4)
    note("download: of the checkpoint in float32. molmo-edge plan MODEL shows the memory that a model needs")
