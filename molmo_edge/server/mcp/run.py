"""Serve the tools over stdin and stdout, or over HTTP."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable
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
INTERRUPTED = 130  # exit status after SIGINT


def serve_stdio(asker: Asker) -> None:
    """Serve one client until it closes stdin. SIGINT and SIGTERM end the process."""
    server = create_mcp_server(asker)
    try:
        asyncio.run(server.run_stdio_async())
    except (KeyboardInterrupt, SystemExit) as end:
        # A thread still waits for a line from stdin, and an ordinary exit would wait for that thread.
        asker.close()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end, SystemExit) and isinstance(end.code, int) else INTERRUPTED)
    finally:
        asker.close()


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
