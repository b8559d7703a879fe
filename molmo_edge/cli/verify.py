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

# What is not as recorded means, and what to do.
_MEANS = {
    "settings": "its `model` or `special_ids` in molmo_edge.json are not those that it was made with",
    "layout": "an image is cut into other crops, or a question into other tokens, than when it was made",
    "pixels": "an image is resized or normalised otherwise than when it was made",
    "features": "its vision tower, connector or embeddings give other features than when it was made",
    "logits": "its decoder answers with other probabilities than when it was made",
}


def verify(
    bundle: Annotated[
        str | None,
        typer.Argument(help="Bundle directory, hub id or nano. Without it: nano.", show_default=False),
    ] = None,
    *,
    revision: options.Revision = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check that a bundle is sound and answers as it should."""
    directory = find_model(bundle, revision=revision, quiet=quiet)
    with progress("comparing hashes and asking the bundle's own question", quiet=quiet):
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
            print(f"sound  {component.bytes / 1e6:9.2f} MB  {component.file}")
        for part in report.parts:
            print(_compared(part))
        print(_verdict(report))
    if report.check and not report.parts:
        note(
            "molmo-edge: an older molmo-edge made this bundle, without sums of settings, layout, pixels, features and "
            "logits: only its files and its answer are checked. Export it again to have all of them checked",
            quiet=quiet,
        )
    if not report.passed:
        note(f"molmo-edge: {_failure(report)}")
        raise typer.Exit(1)


def _compared(part: Part) -> str:
    word = "same " if part.same else "OTHER"
    if part.limit is None:
        return f"{word}  {part.name}"
    if part.distance is None:
        return f"{word}  {part.name}: of another shape"
    return f"{word}  {part.name}: relative distance {part.distance:.2g}, at most {part.limit:.2g}"


def _verdict(report: CheckReport) -> str:
    check = report.check
    if check is None:
        return "the bundle brings no question to check"
    if report.different is not None:
        return "its own question: not asked, since what comes before the answer differs"
    if report.drift is None:
        points = "another number of points"
    else:
        points = f"points at most {report.drift:.1f} percent away, {check.tolerance:.1f} are allowed"
    if report.exact:
        same = "its own question: answered with the same tokens"
        return same if report.same_points else f"{same}, but the manifest records other points for them: {points}"
    if report.passed:
        return f"its own question: as recorded but for rounding (at most {report.gap:.2f} logits; {points})"
    end = "" if report.stopped else ", and it does not stop where it should"
    return f"its own question: other tokens than recorded, {report.gap:.2f} logits apart; {points}{end}"


def _failure(report: CheckReport) -> str:
    if (part := report.different) is not None:
        return (
            f"every file is as the manifest says, but the sum of {part.name} is not the recorded one: "
            f"{_MEANS[part.name]}. Fetch or export the bundle again"
        )
    return "every file is as the manifest says, but this machine answers otherwise than the bundle says"
