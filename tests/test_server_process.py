"""`molmo-edge serve` as a process: it starts, stops gracefully, survives being killed, and keeps its memory."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving import PATIENCE, chat_body, data_uri, png, send, serving_process, wait_until

from molmo_edge.server.run import listen
from molmo_edge.server.settings import Settings

CHAT = "/v1/chat/completions"
windows = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")


def started(port: int, body: dict[str, object]) -> socket.socket:
    """A connection on which a streamed answer has begun."""
    data = json.dumps({**body, "stream": True}).encode()
    sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode())
    sock.sendall(f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    assert sock.recv(1000).startswith(b"HTTP/1.1 200")
    return sock


def rest(sock: socket.socket) -> bytes:
    data = b""
    while part := sock.recv(65536):
        data += part
    return data


@windows
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_lets_a_running_answer_finish(number: signal.Signals, status: int) -> None:
    with serving_process("--max-crops", 0) as server:
        # An answer whose text arrives in pieces: a tag arrives whole, at the end of its answer.
        sock = started(server.port, chat_body("Describe this image.", data_uri(png())))
        server.process.send_signal(number)
        answer = rest(sock)
        assert answer.count(b'"finish_reason": "stop"') == 1
        assert b"data: [DONE]" in answer
        assert server.process.wait(PATIENCE) == status
        out, err = server.process.communicate()
        assert (out, err) == ("", "")
        with pytest.raises(OSError, match="refused"):
            send(server.port, "/health")


@windows
def test_the_time_to_finish_is_limited() -> None:
    with serving_process("--max-crops", 0, "--drain", 0) as server, ThreadPoolExecutor(1) as pool:
        long = {"max_tokens": 1000, "temperature": 2.0, "seed": 0}  # so that the model goes on and on
        sock = started(server.port, chat_body("Describe this image.", data_uri(png()), **long))
        waiting = pool.submit(send, server.port, CHAT, chat_body("What?", data_uri(png(1)), **long))
        wait_until(lambda: b"molmo_edge_places_taken 2.0" in send(server.port, "/metrics").body)
        server.process.send_signal(signal.SIGTERM)
        rest(sock)
        assert waiting.result().status in (200, 503)
        assert server.process.wait(PATIENCE) == 0


@windows
def test_a_server_that_was_killed_starts_again_on_its_port() -> None:
    body = chat_body("Point to the cup.", data_uri(png()))
    with serving_process("--max-crops", 0) as server:
        port, first = server.port, send(server.port, CHAT, body).json["choices"]
        sock = started(port, body)
        server.process.kill()
        server.process.wait(PATIENCE)
        sock.close()
    with serving_process("--max-crops", 0, port=port):
        assert send(port, CHAT, body).json["choices"] == first


def test_windows_gives_the_port_to_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, SO_REUSEADDR lets another process take the port of a server that runs."""
    if sys.platform != "win32":  # an option of this system stands for that of Windows
        monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_KEEPALIVE, raising=False)
        monkeypatch.setattr(sys, "platform", "win32")
    with listen(Settings(port=0)) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE)  # type: ignore[attr-defined]
        assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)


def test_mistakes_of_the_command_line_are_one_line(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, out, err = cli("serve", "--port", taken.getsockname()[1])
    assert (status, out) == (1, "")
    assert "cannot listen on 127.0.0.1 port" in err
    assert "--port" in err
    for options, message in (
        (("--host", "nowhere.invalid"), "cannot listen on nowhere.invalid"),
        (("--api-key-file", tmp_path / "missing"), "cannot be read"),
        (("--model", tmp_path / "missing"), "missing"),
    ):
        status, out, err = cli("serve", "--port", 0, *options)
        assert (status, out) == (1, "")
        assert message in err
        assert len(err.splitlines()) == 1
    (tmp_path / "key").write_text("\n", encoding="utf-8")
    assert "is empty" in cli("serve", "--api-key-file", tmp_path / "key")[2]
    assert cli("serve", "--api-key-file", tmp_path / "key", "--api-key", "x")[0] == 2


@pytest.mark.parametrize("how", ["file", "variable"])
def test_the_key_comes_from_a_file_or_the_environment(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("s3cret\nsecond line\n", encoding="utf-8")
    if how == "variable":
        monkeypatch.setenv("MOLMO_EDGE_API_KEY", "s3cret")
    with serving_process("--access-log", *(("--api-key-file", tmp_path / "key") if how == "file" else ())) as server:
        assert send(server.port, "/v1/models").status == 401
        assert send(server.port, "/v1/models", headers={"Authorization": "Bearer s3cret"}).status == 200
        assert server.process.stderr is not None
        log = [server.process.stderr.readline() for _ in range(2)]
    assert [line.split()[:3] for line in log] == [["GET", "/v1/models", "401"], ["GET", "/v1/models", "200"]]


def resident(process: int) -> int:
    """Memory of a process in bytes."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_is_flat_after_a_thousand_requests() -> None:
    """Different pictures, malformed bodies and clients that leave; the scenes of 20 pictures fit into the cache."""
    with serving_process("--max-crops", 0, "--scene-cache-mb", 100, seconds=1500) as server:
        port = server.port
        measured = []
        for i in range(1000):
            body = chat_body("Point to the cup.", data_uri(png(i)), max_tokens=4)
            if i % 10 == 3:
                assert send(port, CHAT, {"messages": i}).status == 400
            elif i % 10 == 7:
                started(port, body).close()
            else:
                assert send(port, CHAT, body).status == 200
            if i % 100 == 99:  # when the answers of clients that left have ended, too
                wait_until(lambda: b"molmo_edge_places_taken 0.0" in send(port, "/metrics").body)
                measured.append(resident(server.process.pid))
    assert measured[-1] < measured[2] * 1.05, measured


@pytest.mark.slow
@windows
def test_a_killed_server_serves_again_within_three_seconds() -> None:
    """The only test of a time: on an idle machine it takes about 1.5 s."""
    with serving_process() as server:
        port = server.port
    best = 100.0
    for _ in range(5):
        began = time.monotonic()
        with serving_process(port=port):
            assert send(port, "/health").status == 200
            best = min(best, time.monotonic() - began)
    assert best < 3
