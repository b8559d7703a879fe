"""A run that is asked to stop ends its step, writes a checkpoint and goes: Ctrl-C, SIGTERM, and SIGUSR1 from Slurm."""

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
    number: int = 0  # of the signal that came; 0: none


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """What signals ask for while the block runs. A second one ends it on the spot, as KeyboardInterrupt."""
    request = StopRequest()

    def note(number: int, _frame: FrameType | None) -> None:
        if request.number:
            raise KeyboardInterrupt
        request.number = number
        logger.warning("stopping after this step; a second signal stops at once, without a checkpoint")

    if threading.current_thread() is not threading.main_thread():  # no other may listen
        yield request
        return
    before: dict[int, Any] = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_interrupts(_worker: int) -> None:
    """Of a data loader's worker: signals to the whole run reach it as well, and it has nothing to save."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
