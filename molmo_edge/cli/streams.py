"""Handle standard streams that the caller closed (`>&-`) or that break while a command runs."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any

from molmo_edge.cli.output import OutputError


class ClosedOutput(io.TextIOBase):
    """Replacement for a closed stdout that raises an error instead of losing output silently."""

    def write(self, text: str) -> int:
        """Return 0 for an empty text. Raises OutputError for any other."""
        if text:
            raise OutputError(
                "stdout is closed, so the answer cannot be printed: redirect it to a file, or do not close it"
            )
        return 0

    def writable(self) -> bool:
        """Return True: `write` raises the error."""
        return True


def open_streams() -> None:
    """Replace closed standard streams and their file descriptors.

    Otherwise the next file that is opened, for example a model, gets descriptor 1, and the output of a library is
    written into it. Python sets a stream to None if it was closed before Python started; print(file=None) prints to
    stdout.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # open() takes the lowest free descriptor
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if _is_closed(sys.stdin):
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 (open until the process ends)
    if _is_closed(sys.stdout):
        sys.stdout = ClosedOutput()
    if _is_closed(sys.stderr):
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # do not fail on a character that cannot be encoded or decoded


def flush_streams(status: int) -> int:
    """Flush stdout and stderr. Returns `status`, or 1 instead of 0 if the output could not be written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _drop(sys.stdout)
        if status == 0 and not isinstance(error, BrokenPipeError):  # `molmo-edge ask ... | head` is not an error
            print_error(f"stdout cannot be written: {error.strerror or error}")
        status = status or 1
    try:
        sys.stderr.flush()
    except OSError:
        _drop(sys.stderr)
    return status


def print_error(text: str) -> None:
    """Print the one line on stderr with which a failed command ends."""
    with contextlib.suppress(OSError):  # a closed pipe; the exit status still reports the error
        print(f"molmo-edge: {text}", file=sys.stderr, flush=True)


def _is_closed(stream: Any) -> bool:
    return stream is None or stream.closed


def _drop(stream: Any) -> None:
    """Let Python's own flush at exit succeed: otherwise it prints an error and exits with 120."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
