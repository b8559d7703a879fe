"""`molmo-edge ablate`"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molmo_edge.cli import options
from molmo_edge.cli.bars import bars
from molmo_edge.cli.open_model import find_model
from molmo_edge.cli.output import note, print_json, print_table
from molmo_edge.cli.question_options import Asked, SkippedImages, named, of_kinds, open_suites, parse_precisions

if TYPE_CHECKING:
    from molmo_edge.evaluation.ablation import AblationResult
    from molmo_edge.evaluation.fault_localization import WeightDifference

_CANDIDATE = "A faulty copy of the reference, to find the faulty part. Without it, quantizing each part is measured."
_LIMIT = "Maximum number of images. Every part and precision is measured on each of them."
_SHOWN = 8  # weight differences


def ablate(
    reference: Annotated[str, typer.Argument(help="Bundle, checkpoint, hub id or nano.", show_default=False)],
    candidate: Annotated[str | None, typer.Argument(help=_CANDIDATE)] = None,
    *,
    precisions: Annotated[str, typer.Option(help="Precisions of each part, separated by commas.")] = "q8,int8,q4",
    suite: Asked.Suite = None,
    kinds: Asked.Kinds = None,
    limit: Annotated[int, typer.Option(min=1, help=_LIMIT)] = 12,
    data: Asked.Data = None,
    max_crops: options.MaxCrops = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure the loss from quantizing each part of a model, or find the faulty part of a copy.

    An image that cannot be read is reported and left out, and the exit status is 1.
    """
    import onnx  # noqa: F401 (report a missing package now rather than after hours of measuring)

    from molmo_edge.evaluation.ablation import Bench, ablate

    words = parse_precisions(precisions)
    directory = _find(reference, quiet)
    other = None if candidate is None else _find(candidate, quiet)
    if other is not None:
        from molmo_edge.evaluation.fault_localization import (
            check_candidate,
            open_candidate,
            swap_parts,
            weight_differences,
        )

        check_candidate(directory, other)
    _, questions = open_suites(suite, limit, data, quiet=quiet)
    questions = of_kinds(questions, kinds)
    with bars(quiet=quiet) as bar:

        def on_part(name: str) -> Callable[[], None]:
            return bar(name, len(questions))

        advance = bar(f"{named(reference)} in float32", len(questions))
        dither, skipped = other is None, SkippedImages()
        with Bench(
            directory, questions, max_crops=max_crops, dither=dither, on_answer=advance, on_skipped=skipped
        ) as bench:
            description = bench.description
            differences = [] if other is None else weight_differences(bench, open_candidate(directory, other))
            if not json:  # before anything runs: broken weights might not
                _print_differences(differences)
            if bench.mapped:
                note("the float32 model does not fit into memory: weights are read from disk, which is slower")
            if bench.config.point_head and not bench.points:
                note("no answer points by grounding tokens: the loss of the point head cannot be measured")
            results = [bench.noise(on_part("noise"))]
            parts = (
                ablate(bench, words, on_part=on_part) if other is None else swap_parts(bench, other, on_part=on_part)
            )
            for part in parts:
                results.append(part)
                note(f"{part.part} {part.precision}: KL {part.kl:.2g} per token", quiet=quiet)
    if json:
        print_json(_to_dict(results, differences))
    elif candidate is None:
        print_parts(results, description)
    else:
        ranked = sorted(results, key=lambda part: -part.kl)
        rows = [[part.part, *_metrics(part)] for part in ranked]
        _print_table((f"part of {named(candidate)}", *_HEADS), rows, description)
        if not differences:
            print("all weights are equal")
    skipped.finish()


def _find(name: str, quiet: bool) -> Path:
    return find_model(None if name == "nano" else name, revision=None, quiet=quiet, to_run=False)


def _to_dict(results: Sequence[AblationResult], differences: Sequence[WeightDifference]) -> dict[str, Any]:
    return {
        "parts": [part.to_dict() for part in results],
        "matrices": [
            {"name": d.name, "part": d.part, "error": d.error, "stands_out": d.is_outlier} for d in differences
        ],
    }


def print_parts(results: Sequence[AblationResult], description: str) -> None:
    """Print the parts as a table, the cheapest first."""
    rows = []
    for part in sorted(results, key=lambda part: part.kl_per_megabyte):
        price = f"{part.kl_per_megabyte:.2g}" if part.saved > 0 else ""
        saved = f"{part.saved / 1e6:.2f}" if part.precision else ""
        rows.append([f"{part.part} {part.precision}", saved, *_metrics(part), price])
    _print_table(("part", "MB saved", *_HEADS, "KL per MB"), rows, description)


def _print_differences(differences: Sequence[WeightDifference]) -> None:
    for difference in differences[:_SHOWN]:
        remark = "  <- far more than similar weights" if difference.is_outlier else ""
        print(f"{difference.error:9.3g}  {difference.name}{remark}", flush=True)
    if len(differences) > _SHOWN:
        print(f"           and {len(differences) - _SHOWN} more that differ", flush=True)


_HEADS = ("same points %", "drift %", "same answer %", "same token %", "KL per token")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _digits(value: float) -> str:
    return f"{value:.2g}"


_FORMATS = {
    "same_points": _percent,
    "drift": _digits,
    "same_answer": _percent,
    "same_top": _percent,
    "kl_mean": _digits,
}


def _metrics(part: AblationResult) -> list[str]:
    return [part.metrics[name].format(number) if name in part.metrics else "" for name, number in _FORMATS.items()]


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], description: str) -> None:
    print_table(heads, rows)
    print(f"{description}; brackets: 95 % confidence intervals")
