"""Serve the tools over stdin and stdout, or over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from mcp.server.mcpserver import MCPServer
from mcp.server.transport_security import TransportSecuritySettings
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from molmo_edge.server.errors import ApiError
from molmo_edge.server.gate import check_key
from molmo_edge.server.mcp.tools import Asker, create_mcp_server
from molmo_edge.server.settings import Settings

PATH = "/mcp"


def serve_stdio(asker: Asker) -> None:
    """Serve one client until it closes stdin. SIGINT and SIGTERM end the process, with exit status 128 + the signal."""
    server = create_mcp_server(asker)

    async def run() -> None:
        serving = asyncio.create_task(server.run_stdio_async())
        with _first_signal() as received:
            either: list[asyncio.Future[Any]] = [serving, received]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                # A thread still waits for a line from stdin, and an ordinary exit would wait for that thread.
                asker.close()
                sys.stderr.flush()
                os._exit(128 + received.result())
        await serving

    try:
        asyncio.run(run())
    finally:
        asker.close()


@contextlib.contextmanager
def _first_signal() -> Iterator[asyncio.Future[int]]:
    """A future of the number of the first SIGINT or SIGTERM; outside of the main thread, it stays pending.

    The handlers raise no exception: an exception that enters a task of the event loop is also reported by asyncio.
    """
    loop = asyncio.get_running_loop()
    received: asyncio.Future[int] = loop.create_future()

    def set_result(number: int) -> None:
        if not received.done():
            received.set_result(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda sent, _: loop.call_soon_threadsafe(set_result, sent)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def http_app(server: MCPServer[Any], settings: Settings) -> ASGIApp:
    """The application (ASGI) for streamable HTTP at /mcp. Uses host, key, names, origins and sizes of `settings`."""
    names = ["127.0.0.1", "localhost", "[::1]", settings.host, *settings.server_names]
    security = TransportSecuritySettings(
        enable_dns_rebinding_protection=settings.on_loopback,
        allowed_hosts=[host for name in names for host in (name, f"{name}:*")],
        allowed_origins=[f"http://{name}:*" for name in names] + list(settings.cors_origins),
    )
    app = server.streamable_http_app(
        streamable_http_path=PATH, max_request_body_size=settings.max_body, transport_security=security
    )
    return _with_key(app, settings.api_key)


def serve_http(asker: Asker, settings: Settings, sock: socket.socket, *, ready: Callable[[], None]) -> None:
    """Serve clients on `sock` until SIGINT or SIGTERM. Calls `ready` when it listens."""
    config = uvicorn.Config(
        http_app(create_mcp_server(asker), settings),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.drain),
        ws="none",
        lifespan="on",
    )
    server = uvicorn.Server(config)

    async def run() -> None:
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            ready()
        try:
            await serving
        finally:
            asker.close()

    asyncio.run(run())


def _with_key(app: ASGIApp, key: str | None) -> ASGIApp:
    """`app` behind a bearer key; None: without."""
    if key is None:
        return app

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                check_key(Headers(scope=scope), key)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await app(scope, receive, send)

    return guarded
