"""The logger "molmo_edge". The library logs and never prints; an app decides what is shown:

    logging.getLogger("molmo_edge").setLevel(logging.DEBUG)

DEBUG: models that open, answers, and what they took. INFO: the lines of a training run. WARNING: what was left out or
may be wrong.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

logger = logging.getLogger("molmo_edge")
logger.addHandler(logging.NullHandler())  # without it Python prints warnings of an app that has no handlers
steps_log = logging.getLogger("molmo_edge.training.steps")  # a training run's own lines


class _Terminal(logging.Handler):
    """Lines of a training run go to stdout, everything else to stderr, both without decoration."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stdout if record.name == steps_log.name else sys.stderr  # whichever they are now
        try:
            print(self.format(record), file=stream, flush=True)
        except OSError:
            if stream is sys.stdout:
                raise
            # A pipe that nobody reads is no reason to lose the answer.


@contextlib.contextmanager
def shown(level: int = logging.INFO) -> Iterator[None]:
    """Show records of `level` and above while the block runs: for programs, not for apps that use the library."""
    handler, before = _Terminal(), logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
