"""stdin, stdout and stderr where a caller has closed them (`>&-`), or where they break while a command runs."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any

from molmo_edge.cli.output import OutputError


class ClosedOutput(io.TextIOBase):
    """Stands in for a stdout that is closed: what a command prints would be lost without a word."""

    def write(self, text: str) -> int:
        if text:
            raise OutputError(
                "stdout is closed, so the answer cannot be printed: redirect it to a file, or leave it open"
            )
        return 0

    def writable(self) -> bool:
        return True


def open_streams() -> None:
    """Replace standard streams that are closed, and their descriptors.

    Without the latter the next file that is opened, a model say, becomes descriptor 1, and what a library prints
    lands in it. Python gives None for a stream that was closed before it started; print(file=None) means stdout.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # the lowest one that is free is the one that open() takes
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if _is_closed(sys.stdin):
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 (as long as the process)
    if _is_closed(sys.stdout):
        sys.stdout = ClosedOutput()
    if _is_closed(sys.stderr):
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that cannot be shown, or read, is no reason to fail


def flush_streams(status: int) -> int:
    """Write what is left, and return the exit status: 1 instead of 0 where it could not be written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _drop(sys.stdout)
        if status == 0 and not isinstance(error, BrokenPipeError):  # `molmo-edge ask ... | head` is nobody's mistake
            complain(f"stdout cannot be written: {error.strerror or error}")
        status = status or 1
    try:
        sys.stderr.flush()
    except OSError:
        _drop(sys.stderr)
    return status


def complain(text: str) -> None:
    """The one line on stderr that a failed command ends with."""
    with contextlib.suppress(OSError):  # a pipe that nobody reads; the exit status still tells
        print(f"molmo-edge: {text}", file=sys.stderr, flush=True)


def _is_closed(stream: Any) -> bool:
    return stream is None or stream.closed


def _drop(stream: Any) -> None:
    """Let Python's own flush at exit succeed; it would complain, and exit with 120."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
