"""Listen on an address until the process is told to stop."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable
from dataclasses import replace

import uvicorn

from molmo_edge.molmo import Molmo
from molmo_edge.server.app import create_app
from molmo_edge.server.service import Service
from molmo_edge.server.settings import ServerError, Settings


def listen(settings: Settings) -> socket.socket:
    """Open the socket of the server. Raises ServerError if the address cannot be used."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        # A port of a server that was killed is free at once. On Windows, the same option would let another process
        # take the port of a server that runs.
        if sys.platform == "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(1024)
    except OSError as error:
        reason = error.strerror or error
        raise ServerError(
            f"cannot listen on {settings.host} port {settings.port}: {reason}; choose another address with --host or "
            "--port"
        ) from error
    return sock


def address_of(sock: socket.socket) -> str:
    """The URL of a server that listens on `sock`."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(molmo: Molmo, settings: Settings, sock: socket.socket, *, ready: Callable[[], None]) -> None:
    """Serve `molmo` on `sock` until SIGINT or SIGTERM, then let running answers finish. Calls `ready` when it listens.

    A second SIGINT ends the server at once. Raises KeyboardInterrupt after SIGINT.
    """
    service = Service(molmo, replace(settings, port=sock.getsockname()[1]))
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,  # see Gate
        server_header=False,
        timeout_graceful_shutdown=int(settings.drain) + 5,
        ws="none",
        lifespan="on",
    )
    server = uvicorn.Server(config)

    async def run() -> None:
        stopping = asyncio.create_task(_drain_at_exit(server, service))
        started = asyncio.create_task(_tell_when_started(server, ready))
        try:
            await server.serve(sockets=[sock])
        finally:
            for task in (stopping, started):
                task.cancel()
            service.close()

    asyncio.run(run())


async def _tell_when_started(server: uvicorn.Server, ready: Callable[[], None]) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    ready()


async def _drain_at_exit(server: uvicorn.Server, service: Service) -> None:
    while not server.should_exit:
        await asyncio.sleep(0.05)
    await service.drain()
