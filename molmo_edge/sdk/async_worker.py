"""The threads that run a model for asyncio."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from molmo_edge.system import forks

_T = TypeVar("_T")

_THREADS = 4  # answers that are made at the same time; further ones wait


class Worker:
    """Threads for the asynchronous answers of one model, which start with the first of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        forks.on_fork(self)

    def forked(self) -> None:
        """See molmo_edge.system.forks: a child starts its own threads."""
        self._lock, self._pool = threading.Lock(), None

    async def run(self, job: Callable[[], _T]) -> _T:
        """Await the result of `job`. If the awaiting task is cancelled, a job that has not begun never does."""
        import asyncio  # most programs do not need it

        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="molmo-edge-async")
            future = self._pool.submit(job)
        return await asyncio.wrap_future(future)
