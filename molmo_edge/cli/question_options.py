"""What `eval`, `loss`, `ablate` and `quantize` share: the questions they ask, and bars over them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molmo_edge.checkpoints.bundle import is_hub_id
from molmo_edge.cli.output import console, note, progress

if TYPE_CHECKING:
    from molmo_edge.evaluation.questions import Question

_SUITE = (
    "nano-val (the default), photos:DIR (with annotations or without), or a benchmark such as pixmo_points; several "
    "with commas between."
)


class Asked:
    """Options."""

    Suite = Annotated[str | None, typer.Option(help=_SUITE, show_default=False)]
    Limit = Annotated[int | None, typer.Option(min=1, help="Most pictures of a suite, or questions of a benchmark.")]
    Data = Annotated[Path | None, typer.Option(help="Local copies of benchmarks, a folder for each.")]


def open_suite(name: str, limit: int | None, data: Path | None, *, quiet: bool) -> list[Question]:
    from molmo_edge.evaluation.suites import load_suite

    return load_suite(name, data=data, limit=limit, skipped=lambda why: note(f"left out: {why}", quiet=quiet))


def parse_words(text: str) -> list[str]:
    """Precisions out of "q8,int8,q4". Raises BadParameter."""
    known = ("q8", "int8", "q4")
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words or [text]:
        if word not in known:
            raise typer.BadParameter(f'"{word}" is not known; known are {", ".join(known)}', param_hint="--precisions")
    return words


def named(name: str) -> str:
    """A model as the user calls it, but for the folders in front."""
    return name if is_hub_id(name) else Path(name).resolve().name


def interval(low: float, high: float, write: Callable[[float], str]) -> str:
    """ " [low, high]", nothing for an interval without width, and "?" for one that cannot be told."""
    if low == high:
        return ""
    return " [?]" if math.isnan(low) else f" [{write(low)}, {write(high)}]"


def open_suites(
    names: str | None, limit: int | None, data: Path | None, *, quiet: bool
) -> tuple[list[str], list[Question]]:
    """The suites' names and their questions, each once."""
    from molmo_edge.evaluation.suites import expand, unique

    listed = expand([name.strip() for name in (names or "nano-val").split(",") if name.strip()])
    if not listed:
        raise typer.BadParameter("it names nothing to ask", param_hint="--suite")
    with progress("opening the questions", quiet=quiet):
        asked = [question for name in listed for question in open_suite(name, limit, data, quiet=quiet)]
    return listed, unique(asked)


@contextmanager
def bars(*, quiet: bool) -> Iterator[Callable[..., Callable[[], None]]]:
    """Yields a function (text, total, done=0) that adds a bar on stderr and returns what advances it by one."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), disable=quiet or not sys.stderr.isatty()) as shown:

        def add(text: str, total: int, done: int = 0) -> Callable[[], None]:
            task = shown.add_task(text, total=total, completed=done)
            return lambda: shown.advance(task)

        yield add
