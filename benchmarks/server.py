"""Measures `molmo-edge serve` on loopback: `python benchmarks/server.py [IMAGE] [--model MODEL]`.

Prints: the time to the first token of a first question and of a second one about the same image, with their ids
compared with the SDK's; the same for the tenth turn of a conversation; 200 concurrent requests of which a fifth is
malformed; the time until a client that left frees the model; memory over 1,000 requests; the time from kill -9 to the
first answer of a new process.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from molmo_edge import Molmo

ROOT = Path(__file__).parent.parent
CHAT = "/v1/chat/completions"


@contextlib.contextmanager
def serve(model: str | None, port: int = 0, *more: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`molmo-edge serve` in a process of its own, and its port."""
    command = [sys.executable, "-m", "molmo_edge.cli", "serve", "--port", str(port), *more]
    command += [] if model is None else ["--model", model]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "answers at" in line, line
        yield process, int(line.partition("127.0.0.1:")[2].partition("/")[0])
    finally:
        process.kill()
        process.communicate()


def post(port: int, body: Any, path: str = CHAT) -> tuple[int, bytes, float, float]:
    """Status, body, seconds to the first byte after the headers, and seconds to the last."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    began = time.perf_counter()
    connection.request("POST", path, data, {"Content-Type": "application/json"})
    response = connection.getresponse()
    first = time.perf_counter() - began  # the server sends the headers when the first token is there
    received = response.read()
    connection.close()
    return response.status, received, first, time.perf_counter() - began


def png(number: int, size: tuple[int, int] = (64, 48)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 90)).save(file, "PNG")
    return file.getvalue()


def ask(question: str, image: bytes, **more: Any) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
    return {"messages": [{"role": "user", "content": content}], **more}


def variant(photo: bytes, number: int) -> bytes:
    """The photo with one other pixel: a new picture for the cache of the server."""
    image = Image.open(io.BytesIO(photo)).convert("RGB")
    image.putpixel((0, 0), (number % 256, number // 256, 7))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def first_tokens(port: int, photo: bytes, repeat: int, expected: str) -> None:
    firsts, seconds = [], []
    for i in range(repeat):
        image = variant(photo, i)
        for times in (firsts, seconds):
            status, received, first, _ = post(port, ask("Point to the cup.", image, stream=True))
            assert status == 200
            times.append(first)
            text = "".join(
                json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                for line in received.decode().splitlines()
                if line.startswith("data: {")
            )
            assert i or text == expected, "the answer differs from the SDK's"
    first, second = statistics.median(firsts), statistics.median(seconds)
    print(f"first token: {1e3 * first:.0f} ms; second question: {1e3 * second:.0f} ms; ratio {first / second:.1f}")


def conversation(port: int, photo: bytes, repeat: int) -> None:
    """The tenth turn, after nine that this server answered, and after nine that it has not seen."""
    image, body = variant(photo, 500), ask("Point to cup 0.", variant(photo, 500), max_tokens=24)
    for turn in range(1, 10):
        content = json.loads(post(port, body)[1])["choices"][0]["message"]["content"]
        following = {"role": "user", "content": f"Point to cup {turn}."}
        body["messages"] += [{"role": "assistant", "content": content}, following]
    *known, _ = body["messages"]
    kept, fresh, own = [], [], 0
    for i in range(repeat):
        last = {"role": "user", "content": f"Point to cup {10 + i}."}
        kept.append(post(port, {**body, "stream": True, "messages": [*known, last]})[2])
        # After another first question all turns run again; the picture does not.
        other = ask(f"Point at cup {i}, please.", image)["messages"]
        fresh.append(post(port, {**body, "stream": True, "messages": [*other, *known[1:], last]})[2])
        last = {"role": "user", "content": f"Point to cup {20 + i}."}
        used = json.loads(post(port, {**body, "messages": [*known, last]})[1])["usage"]
        own = used["prompt_tokens"] - used["prompt_tokens_details"]["cached_tokens"]
    print(
        f"tenth turn: first token after {1e3 * min(kept):.0f} ms, {min(fresh) / min(kept):.1f} times sooner than after "
        f"turns that the server has not seen; {own} of its {used['prompt_tokens']} tokens ran"
    )


def concurrent(port: int, photo: bytes) -> None:
    images = [variant(photo, 1000 + i) for i in range(4)]
    alone = [json.loads(post(port, ask(f"Point to cup {i}.", images[i % 4]))[1])["choices"] for i in range(16)]
    bad: list[Any] = [b"{", {}, {"messages": []}, ask("", images[0]), ask("x", b"no image"), b"\xff" * 99]
    bodies = [ask(f"Point to cup {i % 16}.", images[i % 4]) if i % 5 else bad[i // 5 % len(bad)] for i in range(200)]
    began = time.perf_counter()
    with ThreadPoolExecutor(200) as pool:
        replies = list(pool.map(lambda body: post(port, body), bodies))
    right = sum(
        reply[0] == 200 and json.loads(reply[1])["choices"] == alone[i % 16] for i, reply in enumerate(replies) if i % 5
    )
    refused = sum(400 <= reply[0] < 500 for i, reply in enumerate(replies) if i % 5 == 0)
    spent = time.perf_counter() - began
    print(f"200 at once: {right} of 160 answers as alone, {refused} of 40 refused with 4xx, {spent:.1f} s")


def disconnect(port: int, photo: bytes, repeat: int) -> None:
    def running() -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read()
        connection.close()
        return b"molmo_edge_running 1.0" in text

    times = []
    for _ in range(repeat):
        body = json.dumps(ask("Describe this image.", variant(photo, 0), stream=True, temperature=2.0, max_tokens=300))
        sock = socket.create_connection(("127.0.0.1", port), timeout=60)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        sock.recv(1000)
        sock.close()
        began = time.perf_counter()
        while running():
            time.sleep(0.001)
        times.append(time.perf_counter() - began)
    print(f"a client left: the model was free after {1e3 * statistics.median(times):.0f} ms (with one GET /metrics)")


def memory(model: str | None) -> None:
    with serve(model, 0, "--max-crops", "0", "--scene-cache-mb", "100") as (process, port):
        sizes = []
        for i in range(1000):
            assert post(port, ask("Point to the cup.", png(i), max_tokens=4))[0] == 200
            if i % 10 == 0:
                assert post(port, {"messages": i})[0] == 400
            if i + 1 in (100, 200, 500, 1000):
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                sizes.append(f"{i + 1}: {pages * os.sysconf('SC_PAGE_SIZE') / 1e6:.0f} MB")
    print("memory after requests about different pictures:", ", ".join(sizes))


def restart(model: str | None, photo: bytes, repeat: int) -> None:
    healthy, answered = [], []
    with serve(model) as (_, port):
        pass
    for _ in range(repeat):
        began = time.perf_counter()
        with serve(model, port):
            healthy.append(time.perf_counter() - began)
            assert post(port, ask("Point to the cup.", photo))[0] == 200
            answered.append(time.perf_counter() - began)
    print(
        f"kill -9 and a new process: listens after {statistics.median(healthy):.2f} s, "
        f"first answer after {statistics.median(answered):.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", nargs="?", type=Path, default=ROOT / "examples" / "coffee.jpg")
    parser.add_argument("--model")
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    photo = given.image.read_bytes()
    with Molmo(given.model) as molmo:
        expected = molmo.ask(variant(photo, 0), "Point to the cup.").text
    with serve(given.model, 0, "--max-queue", "256") as (_, port):
        first_tokens(port, photo, given.repeat, expected)
        conversation(port, photo, given.repeat)
        concurrent(port, photo)
        disconnect(port, photo, given.repeat)
    memory(given.model)
    restart(given.model, photo, given.repeat)


if __name__ == "__main__":
    main()
