"""`molmo-edge verify`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molmo_edge.cli import options
from molmo_edge.cli.output import note, print_json, progress

if TYPE_CHECKING:
    from molmo_edge.selfcheck import CheckReport


def verify(
    bundle: Annotated[
        Path | None, typer.Argument(help="Bundle directory. Without it: the embedded nano.", show_default=False)
    ] = None,
    *,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check that a bundle is sound and answers as it should."""
    from molmo_edge.bundle import default_bundle
    from molmo_edge.selfcheck import check_bundle

    with progress("comparing hashes and asking the bundle's own question", quiet=quiet):
        report = check_bundle(default_bundle() if bundle is None else bundle, threads=threads)
    if json:
        print_json(
            {
                "bundle": str(report.bundle.directory),
                "name": report.bundle.name,
                "files": len(report.bundle.components),
                "check": report.check is not None,
                "exact": report.exact,
                "drift": report.drift,
                "gap": report.gap,
                "passed": report.passed,
            }
        )
    else:
        for component in report.bundle.components.values():
            print(f"sound  {component.bytes / 1e6:9.2f} MB  {component.file}")
        print(_verdict(report) if report.check else "the bundle brings no question to check")
    if not report.passed:
        note("molmo-edge: every file is as shipped, but this machine answers otherwise than the bundle says")
        raise typer.Exit(1)


def _verdict(report: CheckReport) -> str:
    if report.exact:
        return "its own question: answered with the same tokens"
    points = "another number of points" if report.drift is None else f"points at most {report.drift:.1f} percent away"
    if report.passed:
        return f"its own question: as recorded but for rounding (at most {report.gap:.2f} logits; {points})"
    end = "" if report.stopped else ", and it does not stop where it should"
    return f"its own question: other tokens than recorded, {report.gap:.2f} logits apart; {points}{end}"
