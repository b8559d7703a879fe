"""The temporary folder of an export, next to its target, on a disk with enough space."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from molmo_edge.export.errors import ExportError
from molmo_edge.system.scratch import BusyError, free_bytes, is_full, work_folder

Free = Callable[[Path], int]  # bytes that can be written into a directory

SPARE_BYTES = 200_000_000  # left free on the disk


@contextmanager
def staged(out: Path, needed: int, *, free: Free = free_bytes) -> Iterator[Path]:
    """Yield an empty folder next to `out`: write into it, then `publish` the result. Creates the parent of `out`.

    `needed`: an upper estimate in bytes. `free`: how to find the free bytes. Raises ExportError if the disk is too
    small, immediately or when it fills up, and if another process exports to `out`.
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
                    f"written and {_size(free(out.parent))} are free; free some space, or choose another directory"
                ) from error
    except BusyError as error:
        raise ExportError(str(error)) from None


def publish(result: Path, out: Path) -> None:
    """Move `result` to `out`. Raises ExportError if `out` exists by now."""
    taken = f"another process created {out} during this export, so it is left unchanged: choose another directory"
    if out.exists():  # a rename would replace an empty directory
        raise ExportError(taken)
    try:
        os.rename(result, out)
    except OSError as error:
        with contextlib.suppress(OSError):
            if out.exists():
                raise ExportError(taken) from error
        raise


def check_disk(directory: Path, needed: int, *, free: Free = free_bytes) -> None:
    """Raise ExportError if `directory` has no space for `needed` bytes."""
    if needed + SPARE_BYTES > (left := free(directory)):
        raise ExportError(
            f"this export needs about {_size(needed)}, and {_size(SPARE_BYTES)} to spare, but {directory} has only "
            f"{_size(left)} free: free some space, or choose another directory"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
