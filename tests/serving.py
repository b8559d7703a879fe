"""A server on loopback for tests, in a thread of the test's process or as a process of its own."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

import uvicorn

from molmo_edge import Molmo
from molmo_edge.server.app import create_app
from molmo_edge.server.pictures import PictureReader
from molmo_edge.server.run import listen
from molmo_edge.server.service import Service
from molmo_edge.server.settings import Settings

ROOT = Path(__file__).parent.parent
PATIENCE = 60.0  # seconds for anything that a test waits for


def png(red: int = 0, size: tuple[int, int] = (32, 24)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (red % 256, red // 256 % 256, 90)).save(file, "PNG")
    return file.getvalue()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def chat_body(question: str, image: str | None = None, **more: Any) -> dict[str, Any]:
    """The body of /v1/chat/completions with one question."""
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if image is not None:
        content.append({"type": "image_url", "image_url": {"url": image}})
    return {"messages": [{"role": "user", "content": content}], **more}


@dataclass
class Reply:
    status: int
    body: bytes
    headers: http.client.HTTPMessage

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Server:
    """A server in a thread of this process."""

    port: int
    service: Service

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def send(
        self, path: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None
    ) -> Reply:
        return send(self.port, path, body, method=method, headers=headers)


def send(
    port: int, path: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None
) -> Reply:
    """One request. `body`: bytes as they are, anything else as JSON; None: a GET."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **(headers or {})} if data is not None else headers or {}
        connection.request(method or ("GET" if data is None else "POST"), path, data, given)
        response = connection.getresponse()
        return Reply(response.status, response.read(), response.headers)
    finally:
        connection.close()


@contextlib.contextmanager
def serving(molmo: Molmo, pictures: PictureReader | None = None, **settings: Any) -> Iterator[Server]:
    """Serve `molmo` on a free port while the block runs. `settings`: fields of Settings."""
    sock = listen(Settings(port=0, **settings))
    port = sock.getsockname()[1]
    service = Service(molmo, replace(Settings(port=port, **settings), drain=0.0), pictures)
    config = uvicorn.Config(create_app(service), log_config=None, lifespan="on", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Server(port, service)
    finally:
        service.close()
        server.should_exit = True
        thread.join(PATIENCE)
        sock.close()
    assert not thread.is_alive()


def wait_until(true: Any, seconds: float = PATIENCE) -> None:
    """Return when `true()` is; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@dataclass
class ServerProcess:
    """`molmo-edge serve` in a process of its own."""

    process: subprocess.Popen[str]
    port: int


@contextlib.contextmanager
def serving_process(*options: object, port: int = 0, seconds: float = 4 * PATIENCE) -> Iterator[ServerProcess]:
    """Run `molmo-edge serve` while the block runs. It is killed after `seconds`, so that no test hangs."""
    command = [sys.executable, "-m", "molmo_edge.cli", "serve", "--port", str(port), *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(seconds, process.kill)
    watchdog.start()
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "answers at" in line, line + process.stderr.read()
        yield ServerProcess(process, int(line.partition("127.0.0.1:")[2].partition("/")[0]))
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()
