"""An answer that is being made, as its client receives it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from molmo_edge.server.answers import Delta, Finished
from molmo_edge.server.queue import Cancelled, Ticket


class Running:
    """The events of a ticket, for one client. A client that disconnects cancels the ticket."""

    def __init__(self, ticket: Ticket, request: Request, timeout: float) -> None:
        """`timeout`: seconds to the end of the answer."""
        self._ticket = ticket
        self._deadline = time.monotonic() + timeout
        self._watch = asyncio.create_task(_cancel_when_gone(request, ticket))
        self._first: Delta | Finished | None = None

    async def begin(self) -> None:
        """Wait until the answer begins, so that errors before its first token get a status of their own."""
        try:
            self._first = await self._ticket.event(self._deadline)
        except BaseException:
            self.end()
            raise

    async def events(self) -> AsyncIterator[Delta | Finished]:
        """All events; the last is Finished. Raises Cancelled if the client is gone."""
        event = self._first
        try:
            while event is not None:
                yield event
                event = None if isinstance(event, Finished) else await self._ticket.event(self._deadline)
        finally:
            self.end()

    async def finished(self) -> Finished:
        """The whole answer. Raises Cancelled if the client is gone."""
        async for event in self.events():
            if isinstance(event, Finished):
                return event
        raise Cancelled

    def end(self) -> None:
        """Free the model if it still works on this answer."""
        self._watch.cancel()
        self._ticket.cancel()


async def _cancel_when_gone(request: Request, ticket: Ticket) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    ticket.cancel()


def event_stream(events: AsyncIterator[str]) -> Response:
    """An answer as server-sent events. If the client disconnects, its `Running` ends `events`."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx must pass each event on at once
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


def sse(data: dict[str, Any], event: str | None = None) -> str:
    """One server-sent event."""
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {json.dumps(data)}\n\n"
