"""A CSV table of answers that grows picture by picture, so that an interrupted run can continue.

Each point is a row; a picture without points, or that failed, is one row. Rows of a picture are written together.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from molmo_edge.cli.output import OutputError, is_file
from molmo_edge.system.files import atomic_write, name_os_errors

if TYPE_CHECKING:
    from molmo_edge.answer import Answer

COLUMNS = (
    "image",  # the path as given
    "status",  # "ok" or "failed"
    "point",  # its number in the picture, from 1; empty without points
    "label",
    "x",  # pixels
    "y",
    "x_percent",
    "y_percent",
    "time",  # seconds, of a point in a video
    "points",  # number of points of this picture, each of which has a row
    "count",
    "answer",
    "complete",
    "error",
    "saved",  # the drawn picture
    "width",
    "height",
    "seconds",  # to answer
    "bytes",  # of the file
    "modified",  # the file's time, UTC
    "question",
    "model",
    "options",
)
_IMAGE, _STATUS, _POINTS, _SAVED = (COLUMNS.index(name) for name in ("image", "status", "points", "saved"))
_STAMP = slice(COLUMNS.index("bytes"), COLUMNS.index("modified") + 1)
_RUN = slice(COLUMNS.index("question"), len(COLUMNS))
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # spreadsheets run cells that begin with one of these
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


class Run(NamedTuple):
    """What the rows of one command have in common."""

    question: str
    model: str
    options: str


@dataclass(frozen=True)
class AnswerTable:
    """An open table. `done`: the pictures of this run that it already has answers for."""

    path: Path
    run: Run
    done: frozenset[Path]

    def add(self, picture: Path, answer: Answer, saved: Path | None) -> None:
        """Append the rows of one answer. Raises OSError."""
        height, width = answer.images[0].shape[:2] if answer.shown is None else answer.shown.size_of(0)
        whole = {
            "status": "ok",
            "points": len(answer.points),
            "count": answer.count,
            "answer": answer.readable,
            "complete": "yes" if answer.complete else "no",
            "saved": saved,
            "width": width,
            "height": height,
            "seconds": f"{answer.usage.seconds.total:.3f}",
        }
        rows = []
        for number, (point, (x, y)) in enumerate(zip(answer.points, answer.pixels(), strict=True), 1):
            own = {"point": number, "label": point.label, "x": f"{x:.1f}", "y": f"{y:.1f}", "time": point.time}
            rows.append({**whole, **own, "x_percent": f"{point.x:g}", "y_percent": f"{point.y:g}"})
        self._append(picture, rows or [whole])

    def add_failure(self, picture: Path, error: str) -> None:
        """Append a row with the reason why there is no answer. Raises OSError."""
        self._append(picture, [{"status": "failed", "points": 0, "error": error}])

    def _append(self, picture: Path, rows: Sequence[dict[str, object]]) -> None:
        size, modified = _stamp(picture)
        common = {"image": picture, "bytes": size, "modified": modified, **self.run._asdict()}
        lines = _lines([_cell({**common, **row}.get(name)) for name in COLUMNS] for row in rows)
        # One write, after which an interrupt can come: the table has all rows of a picture or none.
        with name_os_errors(self.path), self.path.open("ab", buffering=0) as file:
            file.write(lines)


def check_table(path: Path, pictures: Sequence[Path]) -> None:
    """Raise OutputError for a table that could not be written, before any work is done."""
    if str(path) == "-" or any(str(picture) == "-" for picture in pictures):
        raise OutputError("--csv needs files: it can neither read an image from stdin nor write to stdout")
    if path.is_dir():
        raise OutputError(f"--csv {path} is a directory: name a file in it")
    if not path.parent.is_dir():
        raise OutputError(f"--csv {path}: there is no directory {path.parent}")
    if not os.access(path if is_file(path) else path.parent, os.W_OK):
        raise OutputError(f"--csv {path} is not writable")


def open_table(path: Path, pictures: Sequence[Path], run: Run, *, saves: Sequence[Path | None]) -> AnswerTable:
    """Create the table, or open it to continue the run.

    Answers to the same question by the same model remain unless their picture has changed since, or `saves` names a
    drawn picture that is missing. Rows of failed, changed or half-written pictures are removed. Raises OutputError for
    a path that cannot be written, and for a file that is not such a table; it is left unchanged.
    """
    try:
        old = path.read_bytes() if is_file(path) else b""
        kept, done = _continue(old, path, pictures, run, saves)
        new = _lines([COLUMNS, *kept])
        if new != old:
            with atomic_write(path) as part:
                part.write_bytes(new)
        with path.open("ab"):
            pass
    except OSError as error:
        raise OutputError(f"--csv {path} cannot be written: {error.strerror or error}") from None
    return AnswerTable(path, run, frozenset(done))


def _continue(
    old: bytes, path: Path, pictures: Sequence[Path], run: Run, saves: Sequence[Path | None]
) -> tuple[list[list[str]], set[Path]]:
    """The rows to keep, and the pictures that have an answer in them."""
    if _lines([COLUMNS]).startswith(old):
        return [], set()
    old = old[: old.rfind(b"\n") + 1]  # a row that was cut off may end within a character
    try:
        rows = list(csv.reader(io.StringIO(old.decode("utf-8"), newline="")))
    except (UnicodeDecodeError, csv.Error):
        rows = []
    if not rows or tuple(rows[0]) != COLUMNS:
        raise OutputError(f"--csv {path} exists and is not a table of this command: choose another name")
    wanted = {_cell(picture): (picture, save) for picture, save in zip(pictures, saves, strict=True)}
    ours = [_cell(value) for value in run]
    kept: list[list[str]] = []
    done: set[Path] = set()
    for group in _groups(rows[1:]):
        first = group[0]
        picture, save = wanted.get(first[_IMAGE], (None, None))
        if picture is None or first[_RUN] != ours:
            kept += group
        elif picture not in done and _is_answered(first, picture, save):
            kept += group
            done.add(picture)
    return kept, done


def _is_answered(row: list[str], picture: Path, save: Path | None) -> bool:
    """Whether a row answers for the picture as it is now, and its drawn picture exists if there is to be one."""
    if row[_STATUS] != "ok" or row[_STAMP] != list(map(_cell, _stamp(picture))):
        return False
    return save is None or (row[_SAVED] == _cell(save) and is_file(save))


def _groups(rows: Sequence[list[str]]) -> Iterable[list[list[str]]]:
    """The rows of each picture that has all of them."""
    at = 0
    while at < len(rows):
        row = rows[at]
        whole = len(row) == len(COLUMNS) and row[_POINTS].isdecimal() and len(row[_POINTS]) < 10
        group = list(rows[at : at + max(1, int(row[_POINTS]))]) if whole else [row]
        if whole and len(group) == max(1, int(row[_POINTS])) and all(_alike(row, other) for other in group):
            yield group
            at += len(group)
        else:
            at += 1


def _alike(row: list[str], other: list[str]) -> bool:
    return len(row) == len(other) and row[_IMAGE] == other[_IMAGE] and row[_POINTS] == other[_POINTS]


def _stamp(picture: Path) -> tuple[object, object]:
    """The size of a file in bytes and its time of modification; empty if it cannot be read."""
    try:
        stat = os.stat(picture)
    except (OSError, ValueError):
        return "", ""
    time = _EPOCH + timedelta(microseconds=stat.st_mtime_ns // 1000)
    return stat.st_size, time.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _cell(value: object) -> str:
    """Text for a cell. An apostrophe precedes what a spreadsheet would take for a formula."""
    text = "" if value is None else str(value)
    text = text.replace("\0", "\ufffd").encode("utf-8", "backslashreplace").decode()
    return f"'{text}" if text.startswith(_FORMULA) else text


def _lines(rows: Iterable[Sequence[str]]) -> bytes:
    lines = []
    for row in rows:
        file = io.StringIO(newline="")
        csv.writer(file).writerow(row)  # it ends the row with \r\n, and therefore quotes a cell with either of them
        lines.append(file.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines).encode("utf-8")
