"""What every request passes first: host, key, type and size, a place in the queue; and what is counted of it."""

from __future__ import annotations

import asyncio
import hmac
import time
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from molmo_edge.server.errors import ApiError
from molmo_edge.server.service import stopping
from molmo_edge.system.log import logger

if TYPE_CHECKING:
    from molmo_edge.server.service import Service

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_SWALLOW = 4  # a body that is too large is read up to this many times the limit, so that its client sees the error


class Gate:
    """Middleware (ASGI) around the application."""

    def __init__(self, app: ASGIApp, service: Service, endpoints: frozenset[str]) -> None:
        """`endpoints`: paths that metrics name; others count as "other"."""
        self._app, self._service, self._endpoints = app, service, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the application's lifespan."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 499  # of a client that is gone before its answer begins

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self._check(scope)
                await self._pass_on(scope, receive, watched)
            except ApiError as error:
                response = error.response()
                response.headers["Connection"] = "close"  # the rest of the request may still be on its way
                await response(scope, receive, watched)
        finally:
            endpoint, spent = (
                scope["path"] if scope["path"] in self._endpoints else "other",
                time.perf_counter() - began,
            )
            self._service.metrics.request(endpoint, status, spent)
            if self._service.settings.access_log:
                path = scope["path"].encode("unicode_escape").decode()[:200]
                logger.info("%s %s %d %.3f s", scope["method"], path, status, spent)

    def _check(self, scope: Scope) -> None:
        settings, headers = self._service.settings, Headers(scope=scope)
        if settings.on_loopback:
            # A page on the internet whose name resolves to 127.0.0.1 must not reach a server without a key.
            name = headers.get("host", "").lower()
            name = name if name.endswith("]") else name.rpartition(":")[0] or name
            if name not in (*_LOOPBACK, settings.host.lower(), *(known.lower() for known in settings.server_names)):
                raise ApiError(403, "the header Host names another server: allow it with --server-name")
        if settings.api_key is not None and _needs_key(scope["path"]):
            check_key(headers, settings.api_key)
        if self._service.draining and scope["path"] != "/health":
            raise stopping()

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # browsers send other types to any server, without asking it
            raise ApiError(415, "the header Content-Type must be application/json")
        with self._service.places.take(lambda: self._service.queue.retry_after):
            body = await self._body(receive)
            if body is None:
                return  # the client is gone
            await self._app(scope, _replay(body, receive), send)

    async def _body(self, receive: Receive) -> bytes | None:
        settings = self._service.settings
        parts = _Body(receive, settings.max_body)
        try:
            return await asyncio.wait_for(parts.read(), settings.upload_timeout)
        except asyncio.TimeoutError:
            raise ApiError(408, "the request did not arrive in time", code="timeout") from None


def _needs_key(path: str) -> bool:
    """The page, its files, /health and /openapi.json are open: they say nothing that is not public."""
    return path.startswith("/v1/") or path == "/metrics"


def check_key(headers: Headers, key: str) -> None:
    """Raise ApiError unless a request has the key of the server."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    given = given.strip() if scheme.lower() == "bearer" else headers.get("x-moondream-auth", "")
    if not hmac.compare_digest(given.encode(), key.encode()):
        what = "is wrong" if given else "is missing: send the header Authorization: Bearer KEY"
        raise ApiError(401, f"the API key {what}", code="invalid_api_key")


class _Body:
    """Reads the body of a request up to a limit."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive, self._limit = receive, limit

    async def read(self) -> bytes | None:
        """The whole body; None if the client disconnected. Raises ApiError if it is too large."""
        body, size = bytearray(), 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size <= self._limit:
                body += part
            else:
                body.clear()
            more = message.get("more_body", False)
            if size > self._limit and (not more or size > _SWALLOW * self._limit):
                raise ApiError(413, f"the request has more than {self._limit} bytes: send a smaller image")
            if not more:
                return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` first."""
    pending = [body]

    async def replayed() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return replayed
