"""The logger "molmo_edge". The library logs and never prints; the app decides what is shown:

    logging.getLogger("molmo_edge").setLevel(logging.DEBUG)

DEBUG: models that are opened, answers, and their timings. INFO: the progress of a training run. WARNING: data that was
skipped or may be wrong.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

logger = logging.getLogger("molmo_edge")
logger.addHandler(logging.NullHandler())  # otherwise Python prints warnings if the app has no handlers
steps_log = logging.getLogger("molmo_edge.training.steps")  # the progress of a training run


class _Terminal(logging.Handler):
    """Prints the progress of a training run to stdout and everything else to stderr, without decoration."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = (
            sys.stdout if record.name == steps_log.name else sys.stderr
        )  # looked up now: they may have been replaced
        try:
            print(self.format(record), file=stream, flush=True)
        except OSError:
            if stream is sys.stdout:
                raise
            # A closed stderr must not cost the answer.


@contextlib.contextmanager
def shown(level: int = logging.INFO) -> Iterator[None]:
    """Print records of `level` and above while the block runs. For command-line programs."""
    handler, before = _Terminal(), logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
