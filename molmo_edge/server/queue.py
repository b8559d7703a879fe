"""One thread that runs the model, and the requests that wait for it in the order of their arrival."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from molmo_edge.server.errors import ApiError


class Cancelled(Exception):  # noqa: N818 (not a failure: nobody waits for the answer any more)
    """The ticket was cancelled, so that it has no further events."""


@dataclass(frozen=True)
class _Failed:
    error: Exception


class Ticket:
    """A job that was submitted, and its events. Made by `ModelQueue.submit` on the event loop."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._lock = threading.Lock()
        self._cancelled: Exception | None = None
        self._stop: Callable[[], None] | None = None

    @property
    def cancelled(self) -> bool:
        """Whether the job should end; any thread may ask."""
        return self._cancelled is not None

    def cancel(self, reason: Exception | None = None) -> None:
        """End the job within one token, or before it starts. `reason` is raised where its events are awaited."""
        with self._lock:
            if self._cancelled is not None:
                return
            self._cancelled = reason or Cancelled()
            self.job = _nothing  # free the pictures of a job that has not started
            stop = self._stop
        self.put(_Failed(self._cancelled))
        if stop is not None:
            stop()

    def on_cancel(self, stop: Callable[[], None]) -> None:
        """Call `stop` when the ticket is cancelled; at once if it is already."""
        with self._lock:
            self._stop = stop
            cancelled = self.cancelled
        if cancelled:
            stop()

    async def event(self, deadline: float) -> Any:
        """The next event. Raises the error of the job, and ApiError after `deadline` (time.monotonic())."""
        try:
            event = await asyncio.wait_for(self._events.get(), max(0.0, deadline - time.monotonic()))
        except asyncio.TimeoutError:
            late = ApiError(504, "the answer took longer than this server allows", code="timeout")
            self.cancel(late)
            raise late from None
        if isinstance(event, _Failed):
            raise event.error
        return event

    def put(self, event: Any) -> None:
        """Add an event, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the event loop has ended, and with it every client
            self._cancelled = self._cancelled or Cancelled()

    def done(self) -> None:
        """Forget the job and what it holds."""
        self.job, self._stop = _nothing, None

    def fail(self, error: Exception) -> None:
        """Add an error as the last event."""
        self.put(_Failed(error))


Job = Callable[[Ticket], Iterator[Any]]  # yields events; a generator, which is closed when its ticket is cancelled


def _nothing(_ticket: Ticket) -> Iterator[Any]:
    return iter(())


class ModelQueue:
    """Runs jobs one after the other in a thread of its own."""

    def __init__(self) -> None:
        self._waiting: deque[Ticket] = deque()
        self._running: Ticket | None = None
        self._changed = threading.Condition()
        self._closed: Exception | None = None
        self._seconds = 1.0  # a moving average of what a job takes
        threading.Thread(target=self._work, name="molmo-edge model", daemon=True).start()

    @property
    def waiting(self) -> int:
        """The number of jobs that have not started."""
        with self._changed:
            return sum(not ticket.cancelled for ticket in self._waiting)

    @property
    def running(self) -> int:
        """1 while a job runs, else 0."""
        return int(self._running is not None)

    @property
    def retry_after(self) -> int:
        """Seconds after which a new job will probably start, 1 to 60."""
        return int(min(60.0, max(1.0, self._seconds * (self.waiting + self.running))))

    def submit(self, job: Job) -> Ticket:
        """Add a job at the end. Call this on the event loop. Raises the reason after `close`."""
        ticket = Ticket(job)
        with self._changed:
            if self._closed is not None:
                raise self._closed
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def close(self, reason: Exception) -> None:
        """End all jobs with `reason`, and take no more."""
        with self._changed:
            self._closed = reason
            tickets = [*self._waiting, *([self._running] if self._running else [])]
            self._waiting.clear()
            self._changed.notify()
        for ticket in tickets:
            ticket.cancel(reason)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = None
                while not self._waiting:
                    if self._closed is not None:
                        return
                    self._changed.wait()
                ticket = self._running = self._waiting.popleft()
            if not ticket.cancelled:
                began = time.monotonic()
                self._run(ticket)
                self._seconds += 0.2 * (time.monotonic() - began - self._seconds)

    def _run(self, ticket: Ticket) -> None:
        events = ticket.job(ticket)
        try:
            for event in events:
                if ticket.cancelled:
                    break
                ticket.put(event)
        except Exception as error:
            # The traceback holds the scene, and the ticket would hold both until the garbage collector runs.
            if not ticket.cancelled:
                ticket.fail(error)
        finally:
            close = getattr(events, "close", None)
            if close is not None:
                close()
            ticket.done()
