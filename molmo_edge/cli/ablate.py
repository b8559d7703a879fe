"""`molmo-edge ablate`"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molmo_edge.cli import options
from molmo_edge.cli.open_model import find_model
from molmo_edge.cli.output import note, print_json, print_table
from molmo_edge.cli.question_options import Asked, bars, interval, named, open_suites, parse_words

if TYPE_CHECKING:
    from molmo_edge.evaluation.ablation import AblationResult
    from molmo_edge.evaluation.fault_localization import WeightDifference

_LIMIT = "Most pictures: each is asked about once for every part and precision."
_SHOWN = 8  # matrices


def ablate(
    reference: Annotated[str, typer.Argument(help="Bundle, checkpoint, hub id or nano.", show_default=False)],
    candidate: Annotated[
        str | None,
        typer.Argument(help="A copy of it to find the fault in. Without it: what rounding each part costs."),
    ] = None,
    *,
    precisions: Annotated[str, typer.Option(help="Of each part, with commas between.")] = "q8,int8,q4",
    suite: Asked.Suite = None,
    limit: Annotated[int, typer.Option(min=1, help=_LIMIT)] = 12,
    data: Asked.Data = None,
    max_crops: options.MaxCrops = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure what each part of a model costs, or which part of a copy is to blame."""
    from molmo_edge.evaluation import require_onnx

    require_onnx("an ablation")
    from molmo_edge.evaluation.ablation import Bench, ablate

    words = parse_words(precisions)
    directory = _find(reference, quiet)
    other = None if candidate is None else _find(candidate, quiet)
    if other is not None:
        from molmo_edge.evaluation.fault_localization import check_candidate, swap_parts, weight_differences

        check_candidate(directory, other)
    _, questions = open_suites(suite, limit, data, quiet=quiet)
    with bars(quiet=quiet) as bar:

        def on_part(what: str) -> Callable[[], None]:
            return bar(what, len(questions))

        advance = bar(f"{named(reference)} in float32", len(questions))
        with Bench(directory, questions, max_crops=max_crops, dither=other is None, on_answer=advance) as bench:
            asked = bench.description
            strange = [] if other is None else weight_differences(bench, other)
            if strange and not json:  # before anything runs: broken weights may not
                _print_matrices(strange)
            if bench.mapped:
                note("the model does not fit into memory in float32: weights stay in their files, which is slower")
            found = [bench.noise(on_part("noise"))]
            parts = (
                ablate(bench, words, on_part=on_part) if other is None else swap_parts(bench, other, on_part=on_part)
            )
            for part in parts:  # each is said before the next runs
                found.append(part)
                note(f"{part.part} {part.precision}: KL {part.kl:.2g} a token", quiet=quiet)
    if json:
        print_json(_to_dict(found, strange))
    elif candidate is None:
        print_parts(found, asked)
    else:
        _print_blame(found, named(candidate), asked)
        if not strange:
            print("all weights are equal")


def _find(name: str, quiet: bool) -> Path:
    return find_model(None if name == "nano" else name, revision=None, quiet=quiet, to_run=False)


def _to_dict(found: Sequence[AblationResult], strange: Sequence[WeightDifference]) -> dict[str, Any]:
    return {
        "parts": [part.to_dict() for part in found],
        "matrices": [{"name": m.name, "part": m.part, "error": m.error, "stands_out": m.is_outlier} for m in strange],
    }


def print_parts(found: Sequence[AblationResult], asked: str) -> None:
    """The cheapest first."""
    rows = []
    for part in sorted(found, key=lambda part: part.kl_per_megabyte):
        price = f"{part.kl_per_megabyte:.2g}" if part.saved > 0 else ""
        saved = f"{part.saved / 1e6:.2f}" if part.precision else ""
        rows.append([f"{part.part} {part.precision}", saved, *_figures(part), price])
    _table(("part", "MB saved", *_HEADS, "KL a MB"), rows, asked)


def _print_blame(found: Sequence[AblationResult], candidate: str, asked: str) -> None:
    ranked = sorted(found, key=lambda part: -part.kl)
    _table((f"part of {candidate}", *_HEADS), [[part.part, *_figures(part)] for part in ranked], asked)


def _print_matrices(strange: Sequence[WeightDifference]) -> None:
    for matrix in strange[:_SHOWN]:
        says = "  <- by far the most of its kind" if matrix.is_outlier else ""
        print(f"{matrix.error:9.3g}  {matrix.name}{says}", flush=True)
    if len(strange) > _SHOWN:
        print(f"           and {len(strange) - _SHOWN} more that differ", flush=True)


_HEADS = ("same points %", "drift %", "same answer %", "same token %", "KL a token")


def _figures(part: AblationResult) -> list[str]:
    cells = []
    for name, scale in (("same_points", 100), ("drift", 1), ("same_answer", 100), ("same_top", 100), ("kl_mean", 1)):
        f = part.metrics.get(name)

        def write(value: float, scale: int = scale) -> str:
            return f"{value * scale:.2g}" if scale == 1 else f"{value * scale:.1f}"

        cells.append("" if f is None else write(f.value) + interval(f.low, f.high, write))
    return cells


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], asked: str) -> None:
    print_table(heads, rows)
    print(f"{asked}; brackets: 95 % intervals")
