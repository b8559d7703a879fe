"""`molmo-edge verify`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from molmo_edge.cli import options
from molmo_edge.cli.open_model import find_model
from molmo_edge.cli.output import note, print_json, progress

if TYPE_CHECKING:
    from molmo_edge.sdk.stage_checksums import Part
    from molmo_edge.selfcheck import CheckReport

# The meaning of a part that differs from the recorded one.
_MEANINGS = {
    "settings": "`model` or `special_ids` in molmo_edge.json were changed",
    "layout": "images are cut into different crops, or questions into different tokens",
    "pixels": "images are resized or normalised differently",
    "features": "the vision tower, the connector or the embeddings compute different features",
    "logits": "the decoder computes different probabilities",
}


def verify(
    bundle: Annotated[
        str | None,
        typer.Argument(help="Bundle directory, hub id or nano. Default: nano.", show_default=False),
    ] = None,
    *,
    revision: options.Revision = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check that a bundle is intact and reproduces its recorded answer."""
    directory = find_model(bundle, revision=revision, quiet=quiet)
    with progress("checking hashes and asking the bundle's question", quiet=quiet):
        from molmo_edge.selfcheck import check_bundle

        report = check_bundle(directory, threads=threads)
    if json:
        print_json(
            {
                "bundle": str(report.bundle.directory),
                "name": report.bundle.name,
                "files": len(report.bundle.components),
                "check": report.check is not None,
                "exact": report.exact,
                "drift": report.drift,
                "tolerance": report.check and report.check.tolerance,
                "gap": report.gap,
                "parts": [
                    {"name": p.name, "same": p.same, "distance": p.distance, "limit": p.limit} for p in report.parts
                ],
                "passed": report.passed,
            }
        )
    else:
        for component in report.bundle.components.values():
            print(f"ok       {component.bytes / 1e6:9.2f} MB  {component.file}")
        for part in report.parts:
            print(_part_line(part))
        print(_verdict(report))
    if report.check and not report.parts:
        note(
            "molmo-edge: an older molmo-edge exported this bundle without checksums of settings, layout, pixels, "
            "features and logits: only its files and its answer are checked. Export it again to check all of them",
            quiet=quiet,
        )
    if not report.passed:
        note(f"molmo-edge: {_failure(report)}")
        raise typer.Exit(1)


def _part_line(part: Part) -> str:
    word = "ok     " if part.same else "DIFFERS"
    if part.limit is None:
        return f"{word}  {part.name}"
    if part.distance is None:
        return f"{word}  {part.name}: another shape"
    return f"{word}  {part.name}: relative distance {part.distance:.2g}, at most {part.limit:.2g}"


def _verdict(report: CheckReport) -> str:
    check = report.check
    if check is None:
        return "the bundle has no check question"
    if report.different is not None:
        return "check question: not asked, because an earlier part differs"
    if report.drift is None:
        points = "a different number of points"
    else:
        points = f"points differ by at most {report.drift:.1f} percent (tolerance {check.tolerance:.1f})"
    if report.exact:
        same = "check question: answered with the same tokens"
        return same if report.same_points else f"{same}, but the manifest has other points for these: {points}"
    if report.passed:
        return f"check question: same answer up to rounding (at most {report.gap:.2f} logits; {points})"
    end = "" if report.stopped else ", and the answer stops at a different token"
    return f"check question: tokens differ from the recorded ones by {report.gap:.2f} logits; {points}{end}"


def _failure(report: CheckReport) -> str:
    if (part := report.different) is not None:
        return (
            f"all files match the manifest, but the checksum of {part.name} differs from the recorded one: "
            f"{_MEANINGS[part.name]}. Fetch or export the bundle again"
        )
    return "all files match the manifest, but the answer on this machine differs from the recorded one"
