"""Stop requests by signal (Ctrl-C, SIGTERM, Slurm's SIGUSR1): the run finishes its step and saves a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from molmo_edge.system.log import logger

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


@dataclass
class StopRequest:
    """The signal that asked the run to stop, if any."""

    number: int = 0  # of the received signal; 0: none


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Record signals while the block runs. A second signal raises KeyboardInterrupt."""
    request = StopRequest()

    def note(number: int, _frame: FrameType | None) -> None:
        if request.number:
            raise KeyboardInterrupt
        request.number = number
        logger.warning("stopping after this step. A second signal stops immediately, without a checkpoint")

    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield request
        return
    before: dict[int, Any] = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_interrupts(_worker: int) -> None:
    """For data loader workers: signals to the process group reach them too, but only the main process saves."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
