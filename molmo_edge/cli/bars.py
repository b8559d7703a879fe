"""Progress bars on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from molmo_edge.cli.output import console


@contextmanager
def bars(*, quiet: bool) -> Iterator[Callable[..., Callable[[], None]]]:
    """Yields a function (text, total, done=0) that adds a bar on stderr and returns what advances it by 1."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), disable=quiet or not sys.stderr.isatty()) as shown:

        def add(text: str, total: int, done: int = 0) -> Callable[[], None]:
            task = shown.add_task(text, total=total, completed=done)
            return lambda: shown.advance(task)

        yield add
