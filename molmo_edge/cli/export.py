"""`molmo-edge export`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from molmo_edge.cli import options
from molmo_edge.cli.output import note, print_json, progress

_PRECISION = '"fp32", "int8" (fast) or "q8" (8 bit in blocks of 32, exact); or by component: decoder=int8,...'


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory in hub layout.", show_default=False)],
    *,
    out: Annotated[Path, typer.Option(help="The bundle directory to make; it must not exist.", show_default=False)],
    precision: Annotated[str, typer.Option(help=_PRECISION)] = "fp32",
    name: Annotated[str | None, typer.Option(help="Name in the manifest. Without it: that of --out.")] = None,
    check_image: Annotated[Path | None, typer.Option(help="A photo that the bundle is to be checked with.")] = None,
    check_question: Annotated[str, typer.Option(help="What the check asks.")] = "Describe this image.",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Convert a checkpoint to a bundle of ONNX graphs."""
    from molmo_edge.export import CheckPhoto, export_bundle

    check = None if check_image is None else CheckPhoto(check_image, check_question)
    with progress(f"exporting {checkpoint}", quiet=quiet):
        manifest = export_bundle(checkpoint, out, _by_component(precision), name=name, check=check)
    if json:
        print_json({"out": str(out), "manifest": manifest})
    for component in manifest["components"].values():
        error = component.get("relative_error")
        detail = "" if error is None else f"  relative error {error:.2g}"
        note(f"{component['bytes'] / 1e6:9.2f} MB  {component['file']}{detail}", quiet=quiet)
    note(f"wrote {out}", quiet=quiet)


def _by_component(precision: str) -> str | dict[str, str]:
    if "=" not in precision:
        return precision
    pairs = [pair.partition("=") for pair in precision.split(",")]
    if not all(component and kind for component, _, kind in pairs):
        raise typer.BadParameter(
            f"{precision!r} is not of the form decoder=int8,connector=fp32", param_hint="--precision"
        )
    return {component.strip(): kind.strip() for component, _, kind in pairs}
