"""Where an export writes until it is whole: beside its target, one at a time, on a disk with room for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from molmo_edge.export.errors import ExportError
from molmo_edge.system.scratch import BusyError, free_bytes, is_full, work_folder

Free = Callable[[Path], int]  # bytes that can be written into a directory

_SPARE = 200_000_000  # bytes that stay free on the disk


@contextmanager
def staged(out: Path, needed: int, *, free: Free = free_bytes) -> Iterator[Path]:
    """An empty folder beside `out`, whose directory is made; write into it, then `publish` what `out` is to be.

    `needed`: bytes that the export takes at most, an estimate. `free`: how much there is. Raises ExportError where they
    do not fit, now or in the middle of the work, and where another process exports to `out`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with work_folder(out) as folder:
            check_disk(out.parent, needed, free=free)
            try:
                yield folder
            except OSError as error:
                if not is_full(error):
                    raise
                written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                raise ExportError(
                    f"the disk of {out.parent} is full: this export needs about {_size(needed)}, {_size(written)} are "
                    f"written and {_size(free(out.parent))} are free; make room, or choose another place"
                ) from error
    except BusyError as error:
        raise ExportError(str(error)) from None


def publish(made: Path, out: Path) -> None:
    """Give what an export made its name. Raises ExportError where something has that name by now."""
    taken = f"{out} was made by another process while this export ran, and is left as it is: choose another directory"
    if out.exists():  # a rename would replace an empty directory
        raise ExportError(taken)
    try:
        os.rename(made, out)
    except OSError as error:
        with contextlib.suppress(OSError):
            if out.exists():
                raise ExportError(taken) from error
        raise


def check_disk(directory: Path, needed: int, *, free: Free = free_bytes) -> None:
    """Raise ExportError where `needed` bytes do not fit."""
    if needed + _SPARE > (left := free(directory)):
        raise ExportError(
            f"this export needs about {_size(needed)}, and {_size(_SPARE)} to spare, but {directory} has only "
            f"{_size(left)} free: make room, or choose another place"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
