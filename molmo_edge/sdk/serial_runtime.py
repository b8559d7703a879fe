"""A runtime that several threads share."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, cast

from molmo_edge.system import forks

if TYPE_CHECKING:
    from molmo_edge.runtimes.protocol import Runtime


class _Serial:
    """Runs one call of `runtime` at a time, whichever methods it has.

    The lock covers one call, not a whole answer, so two streams can interleave.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._lock = threading.Lock()
        forks.on_fork(self)

    def forked(self) -> None:
        self._lock = threading.Lock()  # a thread that does not exist in the child may have held the old one

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._runtime, name)
        if not callable(value):
            return value

        def run(*args: Any, **named: Any) -> Any:
            with self._lock:
                return value(*args, **named)

        return run


def serial_runtime(runtime: Runtime) -> Runtime:
    """Return a view of `runtime` for several threads: engines share scratch memory, and some are not re-entrant."""
    return cast("Runtime", _Serial(runtime))
