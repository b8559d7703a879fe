"""`molmo-edge quantize`"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molmo_edge.cli import options
from molmo_edge.cli.ablate import print_parts
from molmo_edge.cli.opening import find_model
from molmo_edge.cli.output import note, print_json, progress
from molmo_edge.cli.tasks import Asked, bars, open_suites

if TYPE_CHECKING:
    from molmo_edge.quantize.search import Found

_LIMIT = "Most pictures: each is asked about once for every part and precision."
_CALIBRATE = "A folder of photos to round four-bit weights of the bundle with."


def quantize(
    source: Annotated[str, typer.Argument(help="Bundle, checkpoint, hub id or nano.", show_default=False)],
    *,
    out: Annotated[Path, typer.Option(help="The bundle to make; it must not exist.", show_default=False)],
    max_mb: Annotated[
        float | None, typer.Option(help="Least loss within this size, MB of graphs.", show_default=False)
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Smallest within this mean KL, nats a token.", show_default=False)
    ] = None,
    precisions: Annotated[str, typer.Option(help="To choose from, with commas between.")] = "q8,int8,q4",
    suite: Asked.Suite = None,
    limit: Annotated[int, typer.Option(min=1, help=_LIMIT)] = 12,
    data: Asked.Data = None,
    calibrate: Annotated[Path | None, typer.Option(help=_CALIBRATE, show_default=False)] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Choose each part's precision by what it costs, and write the bundle."""
    if (max_mb is None) == (max_kl is None):
        raise typer.BadParameter("give --max-mb or --max-kl")
    from molmo_edge.evaluation import need_onnx

    need_onnx("a search")
    from molmo_edge.evaluation.ablation import Bench, ablate
    from molmo_edge.export import check_bundle_wishes, export_bundle
    from molmo_edge.quantize.search import search

    check_bundle_wishes(out, None)
    words = [word.strip() for word in precisions.split(",") if word.strip()]
    _, questions = open_suites(suite, limit, data, quiet=quiet)
    directory = find_model(None if source == "nano" else source, revision=None, quiet=quiet, to_run=False)
    with bars(quiet=quiet) as bar:

        def on_part(what: str) -> Callable[[], None]:
            return bar(what, len(questions))

        advance = bar(f"{directory.name} in float32", len(questions))
        with Bench(directory, questions, on_answer=advance) as bench:
            parts = list(ablate(bench, words, on_part=on_part))
            size = None if max_mb is None else int(max_mb * 1e6)
            found = search(bench, parts, max_bytes=size, max_kl=max_kl, on_try=on_part)
    if not json and not quiet:
        print_parts(parts)
    with progress(f"writing {out}", quiet=quiet):
        four_bits = "q4" in found.choice.words.values()
        export_bundle(
            directory, out, found.choice.to_precision(), calibrate=calibrate if four_bits else None, name=out.name
        )
    if json:
        print_json({"out": str(out), "parts": [part.to_dict() for part in parts], "found": found.to_dict()})
    else:
        _print(found)
    note(f"wrote {out}", quiet=quiet)


def _print(found: Found) -> None:
    kl, same = found.figures["kl_mean"], found.figures["same_top"]
    for part, word in found.choice.words.items():
        print(f"{part:15} {word}")
    print(
        f"{found.bytes / 1e6:.2f} MB, mean KL {kl.value:.2g} [{kl.low:.2g}, {kl.high:.2g}] "
        f"(the parts' sum: {found.choice.predicted:.2g}), same likeliest token {100 * same.value:.1f} %"
    )
