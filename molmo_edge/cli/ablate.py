"""`molmo-edge ablate`"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molmo_edge.cli import options
from molmo_edge.cli.opening import find_model
from molmo_edge.cli.output import print_json
from molmo_edge.cli.tasks import Asked, bars, open_suites

if TYPE_CHECKING:
    from molmo_edge.evaluation.ablation import Ablated
    from molmo_edge.evaluation.blame import Matrix

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
    from molmo_edge.evaluation import need_onnx

    need_onnx("an ablation")
    from molmo_edge.evaluation.ablation import Bench, ablate
    from molmo_edge.quantize.parts import PART_WORDS

    words = [word.strip() for word in precisions.split(",") if word.strip()]
    if unknown := [word for word in words if word not in PART_WORDS]:
        raise typer.BadParameter(f'"{unknown[0]}" is not known; known are {", ".join(PART_WORDS)}')
    _, questions = open_suites(suite, limit, data, quiet=quiet)
    directory = _find(reference, quiet)
    with bars(quiet=quiet) as bar:

        def on_part(what: str) -> Callable[[], None]:
            return bar(what, len(questions))

        advance = bar(f"{directory.name} in float32", len(questions))
        with Bench(directory, questions, max_crops=max_crops, on_answer=advance) as bench:
            if candidate is None:
                found, strange = list(ablate(bench, words, on_part=on_part)), []
            else:
                from molmo_edge.evaluation.blame import blame_parts, matrices

                other = _find(candidate, quiet)
                strange = matrices(bench, other)
                found = list(blame_parts(bench, other, on_part=on_part))
    if json:
        print_json(_to_dict(found, strange))
    elif candidate is None:
        print_parts(found)
    else:
        _print_blame(found, strange, candidate)


def _find(name: str, quiet: bool) -> Path:
    return find_model(None if name == "nano" else name, revision=None, quiet=quiet, to_run=False)


def _to_dict(found: Sequence[Ablated], strange: Sequence[Matrix]) -> dict[str, Any]:
    return {
        "parts": [part.to_dict() for part in found],
        "matrices": [{"name": m.name, "part": m.part, "error": m.error, "stands_out": m.stands_out} for m in strange],
    }


def print_parts(found: Sequence[Ablated]) -> None:
    """The cheapest first."""
    rows = []
    for part in sorted(found, key=lambda part: part.kl_per_megabyte):
        price = f"{part.kl_per_megabyte:.2g}" if part.saved > 0 else ""
        rows.append([part.part, part.precision, f"{part.saved / 1e6:.2f}", *_figures(part), price])
    _table(("part", "precision", "MB saved", *_HEADS, "KL a MB saved"), rows)


def _print_blame(found: Sequence[Ablated], strange: Sequence[Matrix], candidate: str) -> None:
    ranked = sorted(found, key=lambda part: -part.kl)
    _table((f"part of {candidate}", *_HEADS), [[part.part, *_figures(part)] for part in ranked])
    for matrix in strange[:_SHOWN]:
        says = "  <- by far the most of its kind" if matrix.stands_out else ""
        print(f"{matrix.error:9.3g}  {matrix.name}{says}")
    if not strange:
        print("all weights are equal")


_HEADS = ("mean KL", "same token", "same answer", "drift %")


def _figures(part: Ablated) -> list[str]:
    kl, same, answers, drift = (part.figures.get(name) for name in ("kl_mean", "same_top", "same_answer", "drift"))
    assert kl and same and answers
    return [
        f"{kl.value:.2g} [{kl.low:.2g}, {kl.high:.2g}]",
        f"{100 * same.value:.1f} %",
        f"{100 * answers.value:.0f} %",
        "" if drift is None else f"{drift.value:.2f}",
    ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i < 1 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
