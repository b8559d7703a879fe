"""What `eval`, `loss`, `ablate` and `quantize` share: options that choose questions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molmo_edge.checkpoints.bundle import is_hub_id
from molmo_edge.cli.output import note, progress
from molmo_edge.cli.streams import print_error
from molmo_edge.export.precisions import QUANTIZED
from molmo_edge.sdk.readable_text import counted

if TYPE_CHECKING:
    from molmo_edge.evaluation.questions import Question

_SUITE = (
    "nano-val (the default), photos:DIR (with or without annotations), or a benchmark such as pixmo_points; separate "
    "several with commas."
)


_KINDS = (
    "Ask only these kinds of questions, separated by commas: point, count, absent, read, clock, caption, task (of a "
    "benchmark), unscored."
)


class Asked:
    """Options that choose questions."""

    Kinds = Annotated[str | None, typer.Option(help=_KINDS, show_default=False)]

    Suite = Annotated[str | None, typer.Option(help=_SUITE, show_default=False)]
    Limit = Annotated[
        int | None, typer.Option(min=1, help="Use at most this many images of a suite, or questions of a benchmark.")
    ]
    Data = Annotated[Path | None, typer.Option(help="A folder with local copies of benchmarks, one folder each.")]


def open_suite(name: str, limit: int | None, data: Path | None, *, quiet: bool) -> list[Question]:
    """Return the questions of a suite; unless `quiet`, note on stderr which rows are left out. Raises SuiteError."""
    from molmo_edge.evaluation.suites import load_suite

    return load_suite(name, data=data, limit=limit, on_skipped=lambda why: note(f"skipped: {why}", quiet=quiet))


def parse_precisions(text: str) -> list[str]:
    """The precisions in "q8,int8,q4". Raises BadParameter."""
    precisions = [name.strip() for name in text.split(",") if name.strip()]
    for name in precisions or [text]:
        if name not in QUANTIZED:
            message = f'"{name}" is not known (known: {", ".join(QUANTIZED)})'
            raise typer.BadParameter(message, param_hint="--precisions")
    return precisions


class SkippedImages:
    """Prints why an image cannot be read, when it is called, and at the end how many there were."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, reason: str) -> None:
        """Print `reason`."""
        self._count += 1
        print_error(reason)

    def finish(self) -> None:
        """Exit with status 1 if there were any."""
        if self._count:
            print_error(f"{counted(self._count, 'image')} could not be read")
            raise typer.Exit(1)


def of_kinds(questions: list[Question], kinds: str | None) -> list[Question]:
    """The questions of the kinds that are listed in `kinds`; None: all. Raises BadParameter if there are none."""
    if kinds is None:
        return questions
    chosen = {kind.strip() for kind in kinds.split(",")}
    there = {question.kind for question in questions}
    if unknown := chosen - there:
        message = f'no question is of the kind "{min(unknown)}" (there are: {", ".join(sorted(there))})'
        raise typer.BadParameter(message, param_hint="--kinds")
    return [question for question in questions if question.kind in chosen]


def named(name: str) -> str:
    """A hub id, or the last part of a path."""
    return name if is_hub_id(name) else Path(name).resolve().name


def open_suites(
    names: str | None, limit: int | None, data: Path | None, *, quiet: bool
) -> tuple[list[str], list[Question]]:
    """The names of the suites and their questions, without repetitions."""
    from molmo_edge.evaluation.suites import expand, unique

    listed = expand([name.strip() for name in (names or "nano-val").split(",") if name.strip()])
    if not listed:
        raise typer.BadParameter("the list is empty: name at least one suite", param_hint="--suite")
    with progress("loading the questions", quiet=quiet):
        asked = [question for name in listed for question in open_suite(name, limit, data, quiet=quiet)]
    return listed, unique(asked)
