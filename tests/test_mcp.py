"""`molmo-edge mcp` with the SDK's own client: over stdio, over HTTP and in one process."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image
from serving import PATIENCE, ROOT, data_uri, png, send, wait_until

from molmo_edge import Molmo
from molmo_edge.server.run import listen
from molmo_edge.server.settings import Settings

pytest.importorskip("mcp.server.mcpserver")

import uvicorn
from mcp import Client
from mcp.client.stdio import StdioServerParameters

from molmo_edge.server.mcp.run import http_app
from molmo_edge.server.mcp.sources import SourceError, Sources
from molmo_edge.server.mcp.tools import Asker, create_mcp_server

CUPS = 'I see <points x1="10.0" y1="20.0" x2="30.5" y2="40.0" alt="cups">cups</points>.'


@pytest.fixture(scope="module")
def nano() -> Iterator[Molmo]:
    with Molmo(max_crops=0) as molmo:
        yield molmo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """secret.png, and the folder `allowed`, with cup.png and with links out of it."""
    (tmp_path / "allowed" / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(png(1))
    (tmp_path / "allowed" / "cup.png").write_bytes(png(2))
    (tmp_path / "allowed" / "sub" / "cup 2.png").write_bytes(png(3))
    (tmp_path / "allowed" / "notes.txt").write_text("no image")
    (tmp_path / "allowed" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "allowed" / "up").symlink_to(tmp_path)
    return tmp_path


def in_process(molmo: Molmo, sources: Sources, talk: Callable[[Client], Awaitable[Any]], **options: Any) -> Any:
    """The result of `talk` with a client of a server in this process."""

    async def run() -> Any:
        asker = Asker(lambda: molmo, sources, **options)
        try:
            async with Client(create_mcp_server(asker), read_timeout_seconds=PATIENCE) as client:
                return await talk(client)
        finally:
            asker.close()

    return asyncio.run(run())


def call(molmo: Molmo, sources: Sources, tool: str, **arguments: Any) -> Any:
    return in_process(molmo, sources, lambda client: client.call_tool(tool, arguments))


def test_points_come_as_data_as_text_and_in_a_picture(any_saying: Callable[..., Molmo], folder: Path) -> None:
    async def talk(client: Client) -> tuple[Any, Any]:
        listed = await client.list_tools()
        return {tool.name: tool for tool in listed.tools}, await client.call_tool(
            "point", {"image": "cup.png", "object": "cups"}
        )

    tools, result = in_process(any_saying(CUPS), Sources((folder / "allowed",)), talk)
    assert set(tools) == {"point", "count", "ask", "caption"}
    assert not result.is_error
    assert result.structured_content == {
        "answer": "I see cups.",
        "points": [
            {"label": "cups", "x": 10.0, "y": 20.0, "pixel": [3.2, 4.8]},
            {"label": "cups", "x": 30.5, "y": 40.0, "pixel": [9.8, 9.6]},
        ],
        "count": 2,
        "complete": True,
        "width": 32,
        "height": 24,
        "model": "molmo",
    }
    jsonschema.validate(result.structured_content, tools["point"].output_schema)
    text, picture = result.content
    assert "I see cups.\nCount: 2\n" in text.text
    assert "2. cups: 10, 10 px (30.5 %, 40.0 %)" in text.text
    assert picture.mime_type == "image/png"
    with Image.open(io.BytesIO(base64.b64decode(picture.data))) as image:
        assert image.format == "PNG"
        assert image.size == (32, 24)
    without = call(
        any_saying(CUPS), Sources((folder / "allowed",)), "count", image="cup.png", object="cups", annotate=False
    )
    assert len(without.content) == 1


def test_the_questions_are_those_of_the_sdk(nano: Molmo, golden: Path) -> None:
    photo = (golden / "coffee.png").read_bytes()

    async def talk(client: Client) -> list[Any]:
        asked = [
            ("point", {"object": "cup"}),
            ("count", {"object": "cups"}),
            ("caption", {}),
            ("ask", {"question": "What is it?", "max_tokens": 3}),
        ]
        return [await client.call_tool(tool, {"image": data_uri(photo), **rest}) for tool, rest in asked]

    results = in_process(nano, Sources(), talk)
    expected = [
        nano.point(photo, "cup"),
        nano.count(photo, "cups"),
        nano.caption(photo),
        nano.ask(photo, "What is it?", max_new_tokens=3),
    ]
    for result, answer in zip(results, expected, strict=True):
        found = result.structured_content
        assert found["answer"] == answer.readable
        assert found["count"] == answer.count
        assert found["complete"] == answer.complete
        assert [(p["x"], p["y"], tuple(p["pixel"])) for p in found["points"]] == [
            (p.x, p.y, tuple(round(v, 1) for v in pixel))
            for p, pixel in zip(answer.points, answer.pixels(), strict=True)
        ]


def test_large_pictures_are_returned_smaller(any_saying: Callable[..., Molmo]) -> None:
    result = call(any_saying(CUPS), Sources(), "point", image=data_uri(png(size=(3000, 1000))), object="cup")
    assert result.structured_content["points"][0]["pixel"] == [300.0, 200.0]
    with Image.open(io.BytesIO(base64.b64decode(result.content[1].data))) as image:
        assert image.size == (1024, 341)


def test_files_are_read_below_the_roots_only(folder: Path) -> None:
    inside = Sources((folder / "allowed",))
    for name in ("cup.png", str(folder / "allowed" / "cup.png"), (folder / "allowed" / "cup.png").as_uri()):
        assert inside.read(name) == png(2)
    assert inside.read("sub/cup 2.png") == inside.read((folder / "allowed/sub/cup 2.png").as_uri()) == png(3)
    two = Sources((folder / "allowed" / "sub", folder / "allowed"))
    assert two.read("cup.png") == png(2)
    assert two.read("cup 2.png") == png(3)
    secret = str(folder / "secret.png")
    for name in (secret, "../secret.png", "link.png", "up/secret.png", "sub/../../secret.png", f"file://{secret}"):
        with pytest.raises(SourceError, match="outside of the folders"):
            inside.read(name)
        with pytest.raises(SourceError, match="outside of the folders"):
            inside.read(name.replace("secret", "missing").replace("link", "up/missing"))
    for name in ("~nobody-has-this-name/a.png", "", "a\0b.png", "sub", "missing.png", "https://example.org/a.png"):
        with pytest.raises(SourceError):
            inside.read(name)
    with pytest.raises(SourceError, match="none"):
        Sources().read("cup.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "allowed" / "pipe.png")  # reading it would wait for ever
        with pytest.raises(SourceError, match="not a file"):
            inside.read("pipe.png")


def test_names_that_are_no_paths(folder: Path) -> None:
    inside = Sources((folder / "allowed",))
    raw = base64.b64encode(png(size=(300, 300)) * 9).decode()
    for name in (raw, f"file:///{raw}", "file://[x", "file://[x/a.png", f"file://[{raw}", f"~{raw}", f"/{raw}"):
        with pytest.raises(SourceError) as refused:
            inside.read(name)
        assert len(str(refused.value)) < 600


def test_windows_is_not_asked_about_other_machines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows sends the user's credentials to the machine whose file is looked for."""
    looked: list[Path] = []
    monkeypatch.setattr(Path, "resolve", lambda path, strict=False: looked.append(path) or path)  # noqa: ARG005
    for question in ("exists", "is_file"):
        monkeypatch.setattr(Path, question, lambda _: False)
    monkeypatch.setattr(sys, "platform", "win32")
    inside = Sources((folder / "allowed",))
    for name in (
        r"\\evil\share\a.png",
        "//evil/share/a.png",
        r"\/evil/a.png",
        r"\\?\UNC\evil\a.png",
        "file:////evil/a.png",
    ):
        with pytest.raises(SourceError, match="another machine"):
            inside.read(name)
    assert looked == []
    with pytest.raises(SourceError, match="there is no file"):
        Sources((Path(r"\\nas\photos"),)).read(r"\\NAS\photos\a.png")
    assert looked != []


def test_errors_are_results_in_a_sentence(any_saying: Callable[..., Molmo], folder: Path) -> None:
    def no_display() -> Image.Image:
        raise OSError("X connection failed: error 1")

    cases: list[tuple[Sources, dict[str, Any], str]] = [
        (Sources((folder / "allowed",)), {"image": "missing.png"}, "there is no file"),
        (Sources((folder / "allowed",)), {"image": "notes.txt"}, "the image is not a JPEG, PNG"),
        (Sources((folder / "allowed",)), {"image": "/etc/passwd"}, "allow it with --root"),
        (Sources(), {"image": "data:image/png;base64,@"}, "not valid base64"),
        (Sources(), {"image": "data:text/plain,a"}, "must be of type image/"),
        (Sources(screen=False), {"image": "screen"}, "--screen"),
        (Sources(grab=no_display), {"image": "Screen"}, "no display"),
        (Sources(), {"image": data_uri(png()), "object": " "}, "the object is empty"),
        (Sources(), {"image": data_uri(png()), "object": "?!"}, "the label is empty"),
        (Sources(), {"image": data_uri(png()), "max_tokens": 0}, "max_tokens"),
    ]
    for sources, arguments, sentence in cases:
        result = call(any_saying(CUPS), sources, "point", **{"object": "cup", **arguments})
        assert result.is_error
        assert sentence in result.content[0].text
        assert "Traceback" not in result.content[0].text


def test_a_screenshot(any_saying: Callable[..., Molmo]) -> None:
    sources = Sources(grab=lambda: Image.new("RGBA", (200, 100)))
    result = call(any_saying(CUPS), sources, "point", image="screen", object="cup")
    assert result.structured_content["points"][0]["pixel"] == [20.0, 20.0]
    assert (result.structured_content["width"], result.structured_content["height"]) == (200, 100)


def test_the_model_is_opened_once_by_the_first_call(any_saying: Callable[..., Molmo]) -> None:
    opened: list[Molmo] = []

    def open_molmo() -> Molmo:
        opened.append(any_saying(CUPS))
        return opened[-1]

    async def run() -> None:
        asker = Asker(open_molmo, Sources())
        async with Client(create_mcp_server(asker)) as client:
            await client.list_tools()
            assert opened == []
            calls = (client.call_tool("caption", {"image": data_uri(png(i))}) for i in range(4))
            results = await asyncio.gather(*calls)
        asker.close()
        assert not any(result.is_error for result in results)

    asyncio.run(run())
    assert len(opened) == 1


def test_a_call_beyond_the_limit_is_told_that_the_server_is_busy(any_saying: Callable[..., Molmo]) -> None:
    opened = threading.Event()

    def open_molmo() -> Molmo:
        assert opened.wait(PATIENCE)
        return any_saying(CUPS)

    async def run() -> None:
        asker = Asker(open_molmo, Sources(), max_calls=2)
        async with Client(create_mcp_server(asker), read_timeout_seconds=PATIENCE) as client:
            image = {"image": data_uri(png())}
            waiting = [asyncio.create_task(client.call_tool("caption", image)) for _ in range(5)]
            deadline = time.monotonic() + PATIENCE / 3
            while sum(one.done() for one in waiting) < 3 and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            opened.set()
            results = await asyncio.gather(*waiting)
            assert not (await client.call_tool("caption", image)).is_error
        asker.close()
        refused = [result.content[0].text for result in results if result.is_error]
        assert len(refused) == 3
        assert all("busy" in text for text in refused)

    asyncio.run(run())


# Over HTTP


@pytest.fixture
def http(any_saying: Callable[..., Molmo]) -> Iterator[tuple[str, int, Molmo, list[int]]]:
    """(URL, port, a slow model with a long answer, the list to which each of its steps adds)."""
    molmo = any_saying("one " * 2000)
    forward, steps = molmo.fake.forward, []  # type: ignore[attr-defined]

    def slowly(*given: Any) -> Any:
        steps.append(1)
        time.sleep(0.02)
        return forward(*given)

    molmo.fake.forward = slowly  # type: ignore[attr-defined]
    settings = Settings(port=0, api_key="key-5")
    sock = listen(settings)
    asker = Asker(lambda: molmo, Sources())
    app = http_app(create_mcp_server(asker), settings)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    port = sock.getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/mcp", port, molmo, steps
    finally:
        asker.close()
        server.should_exit = True
        thread.join(PATIENCE)
        sock.close()


@pytest.mark.parametrize("mode", ["legacy", "auto"])
def test_a_client_that_leaves_frees_the_model(http: tuple[str, int, Molmo, list[int]], mode: str) -> None:
    url, _, _, steps = http

    async def run() -> None:
        async with client_with_key(url, mode) as client:
            arguments = {"image": data_uri(png()), "question": "Why?", "max_tokens": 2000}
            asking = asyncio.create_task(client.call_tool("ask", arguments))
            while len(steps) < 5:
                await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            before = -1
            while before != len(steps):  # until a second passes without a step
                before = len(steps)
                await asyncio.sleep(1.0)
            assert before < 1000
            short = await client.call_tool("ask", {**arguments, "max_tokens": 2})
            assert short.structured_content["complete"] is False

    asyncio.run(asyncio.wait_for(run(), PATIENCE))


def client_with_key(url: str, mode: str) -> Client:
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    http_client = httpx2.AsyncClient(headers={"Authorization": "Bearer key-5"}, timeout=PATIENCE)
    return Client(streamable_http_client(url, http_client=http_client), mode=mode, read_timeout_seconds=PATIENCE)


def test_strangers_are_refused_over_http(http: tuple[str, int, Molmo, list[int]]) -> None:
    _, port, _, _ = http
    accepts = {"Accept": "application/json, text/event-stream"}
    with_key = {**accepts, "Authorization": "Bearer key-5"}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
    assert send(port, "/mcp", body, headers=accepts).status == 401
    assert send(port, "/mcp", body, headers={**accepts, "Authorization": "Bearer key-6"}).status == 401
    assert send(port, "/mcp", body, headers={**with_key, "Host": "evil.example"}).status == 421
    assert send(port, "/mcp", body, headers={**with_key, "Origin": "http://evil.example"}).status == 403
    assert send(port, "/mcp", b"x" * 25_000_000, headers=with_key).status == 413


# As a process


def test_over_stdio(folder: Path, golden: Path) -> None:
    (folder / "allowed" / "coffee.png").write_bytes((golden / "coffee.png").read_bytes())
    server = StdioServerParameters(
        command=sys.executable,
        args=["-m", "molmo_edge.cli", "mcp", "--no-screen"],
        cwd=str(folder / "allowed"),  # the root without --root
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )

    async def run() -> tuple[Any, Any]:
        async with Client(server, read_timeout_seconds=2 * PATIENCE) as client:
            return (
                await client.call_tool("point", {"image": "coffee.png", "object": "cup"}),
                await client.call_tool("point", {"image": "link.png", "object": "cup"}),
            )

    found, refused = asyncio.run(run())
    assert found.structured_content["model"] == "nano"
    with Molmo() as nano:
        expected = nano.point(golden / "coffee.png", "cup").points
    points = found.structured_content["points"]
    assert [(point["x"], point["y"]) for point in points] == [(point.x, point.y) for point in expected]
    assert points
    assert [block.type for block in found.content] == ["text", "image"]
    assert refused.is_error


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("end", [None, signal.SIGINT, signal.SIGTERM])
def test_the_process_ends_with_its_client(end: signal.Signals | None, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "molmo_edge.cli", "mcp"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(2 * PATIENCE, process.kill)
    watchdog.start()
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
        message = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello}
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["result"]["serverInfo"]["name"] == "molmo-edge"
        if end is None:
            process.stdin.close()
        else:  # while tasks of the event loop run: an exception of a signal handler would enter one of them
            pings = "".join(json.dumps({"jsonrpc": "2.0", "id": 2 + k, "method": "ping"}) + "\n" for k in range(200))
            process.stdin.write(pings)
            process.stdin.flush()
            process.stdout.readline()
            process.send_signal(end)
        assert process.wait(PATIENCE) == (0 if end is None else 128 + end)
        assert process.stderr is not None
        assert process.stderr.read() == ""
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
