"""Record Ctrl-C, because an interrupt may surface as another error, which must then not be reported.

An extension module that is being imported turns KeyboardInterrupt into ImportError, `__set_name__` of a descriptor
turns it into RuntimeError, and a destructor swallows it.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

_entered: list[Interrupts] = []


def settle_interrupt() -> None:
    """Clear an interrupt that a command has handled and after which it continues, as a chat does."""
    for interrupts in _entered:
        interrupts.pending = False


class Interrupts:
    """Record interrupts while the block runs; each still raises KeyboardInterrupt.

    An error that leaves the block after an interrupt becomes KeyboardInterrupt. `whole_process`: the process ends with
    the block, and an interrupt during its shutdown ends it at once. Does nothing if the process has its own handler of
    SIGINT or ignores it.
    """

    def __init__(self, *, whole_process: bool = False) -> None:
        self.pending = False  # an interrupt arrived and was not handled yet
        self._whole_process = whole_process
        self._ours = False
        self._hook: Any = None

    def __enter__(self) -> Interrupts:
        _entered.append(self)
        on_main = threading.current_thread() is threading.main_thread()
        # Background jobs of a shell ignore interrupts, and a program that calls `main` may have its own handler.
        if on_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
            self._ours = True
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _entered.remove(self)
        if self._ours:
            signal.signal(signal.SIGINT, signal.SIG_DFL if self._whole_process else signal.default_int_handler)
            sys.unraisablehook = self._hook
        if self.pending and error is not None and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self.pending = True
        raise KeyboardInterrupt

    def _unraisable(self, lost: Any) -> None:
        """Raise an interrupt again, shortly after the destructor or callback that swallowed it has returned."""
        if isinstance(lost.exc_value, KeyboardInterrupt):
            again = threading.Timer(0.01, _thread.interrupt_main)
            again.daemon = True
            again.start()
        else:
            self._hook(lost)
