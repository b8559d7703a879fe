"""Print notes, tables, JSON and answers."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.sdk.readable_text import counted

if TYPE_CHECKING:
    from rich.console import Console

    from molmo_edge.answer import Answer
    from molmo_edge.sdk.streaming import Stream

_UNLIMITED = 10_000  # columns


class OutputError(MolmoEdgeError):
    """A file that cannot be written."""


def note(text: str, *, quiet: bool = False) -> None:
    """Print a line to stderr."""
    if not quiet:
        with contextlib.suppress(OSError):  # a closed pipe must not cost the answer
            print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(text: str, *, quiet: bool = False) -> Iterator[None]:
    """Show a spinner on stderr while the block runs, if stderr is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.text import Text

    with console(stderr=True).status(Text(text)):
        yield


def console(*, stderr: bool = False) -> Console:
    """A console that prints text unchanged, since names may look like markup or emoji codes.

    Lines are wrapped only on a terminal.
    """
    from rich.console import Console

    output = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not output.file.isatty():
        output.width = _UNLIMITED
    return output


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, lines: bool = False) -> None:
    """Print a table to stdout. Long cells wrap between words; no word is cut.

    Args:
        heads: Title of each column. Line breaks are kept.
        rows: Cells of each row, one for each column.
        left: Number of left-aligned columns; the others are right-aligned.
        lines: Whether to draw lines between rows.
    """
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    table = Table(padding=(0, 1), show_lines=lines)
    for i, cells in enumerate(zip(heads, *rows, strict=True)):
        longest = max((cell_len(word) for cell in cells for word in cell.split()), default=0)
        table.add_column(Text(cells[0]), justify="left" if i < left else "right", min_width=longest)
    for row in rows:
        table.add_row(*map(Text, row))
    console().print(table, crop=False)  # a line that the terminal breaks remains readable


def print_json(data: dict[str, Any]) -> None:
    """Print one line of JSON to stdout, in ASCII, which no terminal or pipe can garble."""
    print(json.dumps(data), flush=True)


def print_stream(stream: Stream) -> Answer:
    """Print the text without point tags as it is generated, then the points. Returns the answer."""
    from molmo_edge.sdk.readable_text import TagStripper

    stripper = TagStripper()
    for piece in stream:
        if isinstance(piece, str):
            print(stripper.feed(piece), end="", flush=True)
    print(stripper.close())
    answer = stream.answer
    print_points(answer)
    return answer


def print_points(answer: Answer) -> None:
    """Print a line for each point: its number in the drawn image, its pixel coordinates and its label.

    With several images or a video, also its image or time.
    """
    shown = answer.shown if len(answer.images) > 1 else None
    for number, (point, (x, y)) in enumerate(zip(answer.points, answer.pixels(), strict=True), 1):
        where = ""
        if shown is not None:
            index = shown.index_of(point)
            where = f"  {'no image' if index is None else shown.title(index):9}"
        print(f"{number:4}{where}  x {x:6.0f}  y {y:6.0f}  {' '.join(point.label.split())}")


def note_usage(answer: Answer, *, quiet: bool) -> None:
    """Print the crops, tokens and seconds that an answer took, and whether it was cut off."""
    note_cut_off(answer, quiet=quiet)
    tokens, seconds = answer.usage.tokens, answer.usage.seconds
    first = seconds.load + seconds.total - seconds.decode
    note(
        f"{counted(answer.usage.crops, 'crop')}, {counted(tokens.image + tokens.prompt, 'token')} in"
        + (f" ({counted(tokens.dropped, 'image token')} left out), " if tokens.dropped else ", ")
        + f"{tokens.generated} out; "
        f"first token after {first:.2f} s, all after {first + seconds.decode:.2f} s",
        quiet=quiet,
    )


def note_cut_off(answer: Answer, *, quiet: bool) -> None:
    """Print a note if the answer was cut off."""
    if not answer.complete:
        tokens = counted(answer.usage.tokens.generated, "token")
        note(f"cut off after {tokens}: raise --max-new-tokens", quiet=quiet)


def is_file(path: Path) -> bool:
    """Like `Path.is_file`, but False for a name that is too long."""
    try:
        return path.is_file()
    except OSError:
        return False
