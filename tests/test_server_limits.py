"""The server refuses what is malformed, too large, too much or not allowed, with OpenAI's errors."""

from __future__ import annotations

import io
import json
import random
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import Reply, Server, chat_body, data_uri, png, serving, wait_until

from molmo_edge import Molmo
from molmo_edge.server.chat_schema import ChatRequest
from molmo_edge.server.responses_schema import ResponsesRequest
from molmo_edge.server.settings import ServerError, Settings

openai = pytest.importorskip("openai")
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def ok(any_saying: Callable[..., Molmo]) -> Iterator[Server]:
    with serving(any_saying("ok"), max_body=100_000, max_pixels=10_000) as server:
        yield server


def check_error(reply: Reply, status: int) -> dict[str, Any]:
    """The error of a reply, which must be in OpenAI's format."""
    assert reply.status == status, reply.body
    error: dict[str, Any] = reply.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in error["message"]
    return error


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


GOOD = chat_body("What?", data_uri(png()))
MESSAGES = [
    # body, a part of the message, param
    ({}, "Field required", "messages"),
    ({"messages": []}, "at least 1", "messages"),
    (user(5), "valid string", "messages.0.content"),
    (user(""), "no text", "messages"),
    (user([{"type": "text"}]), "Field required", "messages.0.content.0.text"),
    (user([{"type": "audio", "text": "?"}]), "audio", "messages.0.content.0"),
    (user([{"type": "image_url", "image_url": {"url": 7}}]), "string", "messages.0.content.0.image_url.url"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "system", "messages.0.role"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "alternate", "messages"),
    ({"messages": [{"role": "system", "content": "x"}]}, "last message", "messages"),
    ({**GOOD, "temperature": -1}, "greater than or equal to 0", "temperature"),
    ({**GOOD, "temperature": "hot"}, "number", "temperature"),
    ({**GOOD, "top_p": 0}, "greater than 0", "top_p"),
    ({**GOOD, "seed": -1}, "greater than or equal to 0", "seed"),
    ({**GOOD, "max_tokens": 0}, "greater than or equal to 1", "max_tokens"),
    ({**GOOD, "max_tokens": 10**30}, "", "max_tokens"),
    ({**GOOD, "stop": ["a"] * 5}, "at most 4", "stop"),
    ({**GOOD, "stop": ""}, "at least 1", "stop"),
    ({**GOOD, "n": 2}, "not supported", "n"),
    ({**GOOD, "tools": [{"type": "function"}]}, "not supported", "tools"),
    ({**GOOD, "logprobs": True}, "not supported", "logprobs"),
    ({**GOOD, "frequency_penalty": 0.5}, "not supported", "frequency_penalty"),
    ({**GOOD, "response_format": {"type": "grammar"}}, "use text, json_object", "response_format"),
    ({**GOOD, "response_format": {"type": "json_schema", "schema": {"$ref": "#"}}}, "no text matches", None),
    ({**GOOD, "response_format": {"type": "json_schema"}}, "no schema", "response_format"),
    ({**GOOD, "response_format": {"type": "json_schema", "json_schema": {"schema": 1}}}, "no schema", None),
    ({**GOOD, "response_format": {"type": "json_schema", "schema": {"type": "x"}}}, "Invalid type", None),
    (user([{"type": "image_url", "image_url": {"url": data_uri(png())}}]), "no text", "messages"),
    (chat_body("What?", "data:image/png;base64,????"), "base64", "messages"),
    (chat_body("What?", "data:text/html;base64,aGk="), "image/", "messages"),
    (chat_body("What?", "data:image/png;base64"), "invalid", "messages"),
    (chat_body("What?", "data:image/png;base64,"), "empty", "messages"),
    (chat_body("What?", data_uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")), "not a JPEG", "messages"),
    (chat_body("What?", data_uri(png()[:60])), "damaged", None),
    (chat_body("What?", "photo.jpg"), "data:image/", "messages"),
    (chat_body("What?", "file:///etc/passwd"), "data:image/", "messages"),
    (chat_body("What?", "https://example.org/cat.jpg"), "--allow-host", "messages"),
    (chat_body("x" * 20_001), "20001 characters", None),
    (chat_body("lone \ud800 surrogate"), "", None),
]


@pytest.mark.parametrize(("body", "message", "param"), MESSAGES, ids=[str(i) for i in range(len(MESSAGES))])
def test_a_malformed_request_says_what_is_wrong(ok: Server, body: Any, message: str, param: str | None) -> None:
    error = check_error(ok.send(CHAT, body), 400)
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b"NaN", b"[" * 50_000, b'{"messages": ' + b"9" * 9000 + b"}"],
    ids=str,
)
@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/point"])
def test_what_is_not_json_or_no_object(ok: Server, path: str, body: bytes) -> None:
    check_error(ok.send(path, body), 400)


@pytest.mark.parametrize(("messages", "parts"), [(1, 20_000), (900, 1), (900, 50)])
def test_a_list_of_mistakes_gives_few_errors(messages: int, parts: int) -> None:
    """Pydantic collects all errors on the event loop, where a body of 20 MB would have a hundred thousand."""
    given = [{"role": "user", "content": [{}] * parts}] * messages
    for schema, field in ((ChatRequest, "messages"), (ResponsesRequest, "input")):
        with pytest.raises(ValueError, match=r"^[1-4] validation error"):
            schema.model_validate({field: given})


def test_a_message_has_at_most_1000_parts(ok: Server) -> None:
    part = {"type": "text", "text": "What?"}
    assert "at most 1000" in check_error(ok.send(CHAT, user([part] * 1001)), 400)["message"]
    assert ok.send(CHAT, user([part] * 1000)).status == 200
    part["type"] = "input_text"
    body = {"input": [{"role": "user", "content": [part] * 1001}]}
    assert "at most 1000" in check_error(ok.send("/v1/responses", body), 400)["message"]


def test_other_endpoints_refuse_too(ok: Server) -> None:
    image = data_uri(png())
    for path, body, status in (
        ("/v1/point", {"image_url": image}, 400),
        ("/v1/point", {"image_url": image, "object": "  "}, 400),
        ("/v1/count", {"object": "cup"}, 400),
        ("/v1/query", {"image_url": image, "question": ""}, 400),
        ("/v1/query", {"image_url": image, "question": "?", "spatial_refs": [[0.5, 0.5]]}, 400),
        ("/v1/caption", {"image_url": image, "length": "endless"}, 400),
        ("/v1/responses", {"input": []}, 400),
        ("/v1/responses", {"input": "x", "previous_response_id": "resp_1"}, 400),
        ("/v1/responses", {"input": "x", "text": {"format": {"type": "json_schema"}}}, 400),
        ("/v1/detect", {"image_url": image, "object": "cup"}, 404),
    ):
        check_error(ok.send(path, body), status)
    check_error(ok.send(CHAT), 405)
    check_error(ok.send("/v1/models", {}), 405)
    check_error(ok.send("/nothing"), 404)


def test_several_images_need_a_model_that_takes_them(ok: Server) -> None:
    body = chat_body("What?", data_uri(png(1)))
    body["messages"][0]["content"] += chat_body("And?", data_uri(png(1)))["messages"][0]["content"]
    assert ok.send(CHAT, body).status == 200  # the same image again
    body["messages"][0]["content"] += chat_body("And?", data_uri(png(2)))["messages"][0]["content"]
    assert "one image" in check_error(ok.send(CHAT, body), 400)["message"]
    for i in range(3, 10):
        body["messages"][0]["content"] += chat_body("And?", data_uri(png(i)))["messages"][0]["content"]
    assert "accepts 8" in check_error(ok.send(CHAT, body), 400)["message"]


def test_text_far_beyond_the_context_is_not_tokenized(saying: Callable[..., Molmo]) -> None:
    with serving(saying("ok", context=256)) as server:
        for path, field in ((CHAT, "messages"), ("/v1/responses", "input")):
            turns = [("user", "What?"), ("assistant", "x" * 256 * 16), ("user", "And?")]
            body = {field: [{"role": role, "content": text} for role, text in turns]}
            error = check_error(server.send(path, body), 400)
            assert "4105 characters of text, at most 4096" in error["message"]
            assert error["param"] == field


def test_the_limit_on_images_counts_different_ones(ok: Server) -> None:
    image = data_uri(png(1))
    body = chat_body("What?", image)
    body["messages"][0]["content"] *= 20
    assert ok.send(CHAT, body).status == 200
    others = [{"type": "image_url", "image_url": {"url": image.replace("image/", f"image/{i}")}} for i in range(63)]
    body["messages"][0]["content"] += others  # other URLs of the same file
    assert ok.send(CHAT, body).status == 200
    body["messages"][0]["content"] += chat_body("And?", data_uri(png(2)))["messages"][0]["content"]
    assert "65 image URLs" in check_error(ok.send(CHAT, body), 400)["message"]


def test_sizes_and_types_have_limits(ok: Server) -> None:
    check_error(ok.send(CHAT, b" " * 100_001), 413)
    check_error(ok.send(CHAT, chat_body("What?", data_uri(png(size=(101, 100))))), 413)
    check_error(ok.send(CHAT, json.dumps(GOOD).encode(), headers={"Content-Type": "text/plain"}), 415)
    assert ok.send(CHAT, GOOD, headers={"Content-Type": "application/json; charset=utf-8"}).status == 200
    with socket.create_connection(("127.0.0.1", ok.port)) as sock:  # without the length in advance
        sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode())
        sock.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(12):
            sock.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
        sock.sendall(b"0\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 413")


def test_a_large_image_within_the_limits_is_answered(saying: Callable[..., Molmo]) -> None:
    """FastAPI has a limit of its own, which must not be lower."""
    noise = np.random.default_rng(0).integers(0, 256, (1800, 2400, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG", compress_level=0)
    with serving(saying("ok")) as server:
        body = chat_body("What?", data_uri(file.getvalue()))
        assert len(json.dumps(body)) > 17_000_000
        assert server.send(CHAT, body).status == 200


def test_a_website_cannot_reach_the_server_through_a_dns_name(ok: Server) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example:8080", ""):
        check_error(ok.send(CHAT, GOOD, headers={"Host": host}), 403)
    for host in ("localhost", f"LOCALHOST:{ok.port}", "127.0.0.1:1", "[::1]:80"):
        assert ok.send("/health", headers={"Host": host}).status == 200
    reply = ok.send(CHAT, b"", method="OPTIONS", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in {name.lower() for name in reply.headers}


def test_origins_and_names_that_the_owner_allows(saying: Callable[..., Molmo]) -> None:
    origin = "https://app.example"
    with serving(saying("ok"), cors_origins=(origin,), server_names=("molmo.example",)) as server:
        assert server.send("/health", headers={"Host": "molmo.example"}).status == 200
        reply = server.send(CHAT, GOOD, headers={"Origin": origin})
        assert reply.headers["access-control-allow-origin"] == origin
        reply = server.send(CHAT, GOOD, headers={"Origin": "https://evil.example"})
        assert reply.headers["access-control-allow-origin"] is None


def test_the_key_is_needed_where_the_model_is(saying: Callable[..., Molmo]) -> None:
    with serving(saying("ok"), api_key="s3cret") as server:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "s3cret"},
            {"Authorization": "Basic x"},
        ):
            reply = server.send(CHAT, GOOD, headers=headers)
            check_error(reply, 401)
            assert reply.headers["WWW-Authenticate"] == "Bearer"
        for path in ("/metrics", "/v1/models"):
            check_error(server.send(path), 401)
            assert server.send(path, headers={"Authorization": "bearer s3cret"}).status == 200
        assert server.send(CHAT, GOOD, headers={"X-Moondream-Auth": "s3cret"}).status == 200
        assert server.send("/health").status == 200
        with pytest.raises(openai.AuthenticationError, match="key is wrong"):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="x").models.list()


@pytest.mark.parametrize(
    "given",
    [
        {"max_queue": 0},
        {"timeout": 0.0},
        {"timeout": float("inf")},
        {"port": 70_000},
        {"api_key": "a b"},
        {"drain": -1.0},
    ],
)
def test_settings_are_checked(given: dict[str, Any]) -> None:
    with pytest.raises(ServerError):
        Settings(**given)


class Paused:
    """Lets a fake model run one step at a time."""

    def __init__(self, molmo: Molmo) -> None:
        self.runtime = molmo.fake  # type: ignore[attr-defined]
        self.steps = threading.Semaphore(0)
        self.began = 0
        forward = self.runtime.forward

        def paused(*arguments: Any) -> Any:
            self.began += 1
            assert self.steps.acquire(timeout=60)
            return forward(*arguments)

        self.runtime.forward = paused


def test_a_client_that_disconnects_frees_its_place_within_one_token(saying: Callable[..., Molmo]) -> None:
    molmo = saying("a long answer with many words that nobody waits for any more")
    paused = Paused(molmo)
    with serving(molmo) as server:
        for stream in (True, False):
            before = paused.began
            body = json.dumps(chat_body("What?", data_uri(png(int(stream))), stream=stream)).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            sock = socket.create_connection(("127.0.0.1", server.port))
            sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            paused.steps.release(4)
            wait_until(lambda before=before: paused.began == before + 5)  # the fifth step is running
            sock.close()
            wait_until(lambda: server.service.places.taken == 0)
            paused.steps.release(1)  # the step that was running
            wait_until(lambda: server.service.queue.running == 0)
            assert paused.began == before + 5
        paused.steps.release(10_000)
        assert server.send(CHAT, GOOD).status == 200


def test_a_full_queue_answers_429_and_waiting_clients_may_leave(saying: Callable[..., Molmo]) -> None:
    molmo = saying("ok")
    paused = Paused(molmo)
    with serving(molmo, max_queue=3) as server, ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(server.send, CHAT, GOOD) for _ in range(3)]
        wait_until(lambda: server.service.queue.waiting == 2)
        reply = server.send(CHAT, GOOD)
        assert check_error(reply, 429)["code"] == "server_overloaded"
        assert 1 <= int(reply.headers["Retry-After"]) <= 60
        assert server.send("/health").json["waiting"] == 2
        paused.steps.release(10_000)
        assert [one.result().status for one in waiting] == [200] * 3
        assert server.send(CHAT, GOOD).status == 200


def test_answers_that_take_too_long_end(saying: Callable[..., Molmo]) -> None:
    molmo = saying("one two three four")
    paused = Paused(molmo)
    with serving(molmo, timeout=0.5, upload_timeout=0.3) as server:
        assert check_error(server.send(CHAT, GOOD), 504)["code"] == "timeout"
        paused.steps.release(1)
        wait_until(lambda: server.service.queue.running == 0)
        paused.steps.release(4)
        reply = server.send(CHAT, {**GOOD, "stream": True})  # begins, and then stops
        assert reply.status == 200
        assert b"took longer" in reply.body
        assert b"[DONE]" not in reply.body
        paused.steps.release(10_000)
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode())
            sock.sendall(b"Content-Length: 100\r\n\r\n{")
            assert sock.recv(100).startswith(b"HTTP/1.1 408")
        assert server.send(CHAT, GOOD).status == 200


def test_a_model_that_fails_gives_no_details(saying: Callable[..., Molmo]) -> None:
    molmo = saying("ok")
    forward = molmo.fake.forward  # type: ignore[attr-defined]

    def fail(*_: Any) -> Any:
        raise RuntimeError("secret /home/user/model")

    with serving(molmo) as server:
        molmo.fake.forward = fail  # type: ignore[attr-defined]
        error = check_error(server.send(CHAT, chat_body("What?")), 500)
        assert "secret" not in error["message"]
        assert error["type"] == "server_error"
        reply = server.send(CHAT, chat_body("What?", stream=True))
        assert reply.status == 500
        molmo.fake.forward = forward  # type: ignore[attr-defined]
        assert server.send(CHAT, chat_body("What?")).status == 200


def test_stopping_ends_waiting_answers_and_refuses_new_ones(saying: Callable[..., Molmo]) -> None:
    molmo = saying("ok")
    paused = Paused(molmo)
    with serving(molmo) as server, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(server.send, CHAT, GOOD) for _ in range(2)]
        wait_until(lambda: server.service.queue.waiting == 1)
        server.service.close()
        assert [check_error(one.result(), 503)["code"] for one in waiting] == ["stopping"] * 2
        check_error(server.send(CHAT, GOOD), 503)
        assert server.send("/health").status == 503
        paused.steps.release(10)


def test_200_requests_at_once_of_which_a_fifth_is_malformed(saying: Callable[..., Molmo]) -> None:
    bad: list[Any] = [body for body, *_ in MESSAGES] + [b"{", b"[]", b"\xff", b""]
    molmo = saying('<point x="1.0" y="2.0" alt="cup">cup</point>')
    random.seed(0)
    requests: list[tuple[bool, Any]] = [
        (True, chat_body(f"Where is cup {i}?", data_uri(png(i % 7)))) for i in range(160)
    ]
    requests += [(False, bad[i % len(bad)]) for i in range(40)]
    random.shuffle(requests)
    with serving(molmo, max_queue=256, max_pixels=10_000) as server, ThreadPoolExecutor(200) as pool:
        replies = list(pool.map(lambda request: server.send(CHAT, request[1]), requests))
        wait_until(lambda: server.service.places.taken == 0)
    for (good, _), reply in zip(requests, replies, strict=True):
        if good:
            assert reply.status == 200, reply.body
            assert reply.json["choices"][0]["message"]["points"][0]["pixel"] == [0.3, 0.5]
        else:
            assert 400 <= reply.status < 500, reply.body
    assert molmo.fake.images == 7  # type: ignore[attr-defined]


def mutated(random: random.Random) -> bytes:
    """A body that was damaged in one of several ways."""
    body: Any = json.loads(json.dumps(GOOD))
    kind = random.randrange(5)
    if kind == 0:  # bytes
        data = bytearray(json.dumps(body).encode())
        for _ in range(random.randrange(1, 20)):
            data[random.randrange(len(data))] = random.randrange(256)
        return bytes(data)
    if kind == 1:  # cut off
        data = bytearray(json.dumps(body).encode())
        return bytes(data[: random.randrange(len(data))])
    if kind == 2:  # noise
        return random.randbytes(random.randrange(200))
    values = [None, True, -1, 0, 1e308, "", "\x00", "\ud800", [], {}, [[[]]], {"url": None}, "a" * 5000, 10**400]
    if kind == 3:  # an image that was damaged
        data = bytearray(png())
        for _ in range(random.randrange(1, 9)):
            data[random.randrange(len(data))] = random.randrange(256)
        body["messages"][0]["content"][1]["image_url"]["url"] = data_uri(bytes(data))
    place: Any = body
    for _ in range(random.randrange(6)):
        keys = list(place) if isinstance(place, dict) else list(range(len(place))) if isinstance(place, list) else []
        if not keys or not isinstance(place[key := random.choice(keys)], (dict, list)):
            break
        place = place[key]
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    if keys:
        place[random.choice(keys)] = random.choice(values)
    if isinstance(place, dict):
        place[random.choice(["stop", "n", "temperature", "stream", "seed", "role", "detail"])] = random.choice(values)
    return json.dumps(body).encode()


def fuzz(server: Server, number: int, seed: int) -> None:
    """Send damaged bodies: none may be answered with 5xx or a traceback, or hang."""
    source = random.Random(seed)
    paths = [CHAT, "/v1/responses", "/v1/point", "/v1/count", "/v1/caption", "/v1/query"]
    bodies = [(source.choice(paths), mutated(source)) for _ in range(number)]
    with ThreadPoolExecutor(8) as pool:
        for (_, body), reply in zip(bodies, pool.map(lambda one: server.send(*one), bodies), strict=True):
            assert reply.status < 500, (body, reply.body)
            assert b"Traceback" not in reply.body


def test_damaged_bodies_are_answered(ok: Server) -> None:
    fuzz(ok, 150, seed=1)
    assert ok.send(CHAT, GOOD).status == 200


@pytest.mark.slow
def test_2000_damaged_bodies_are_answered(ok: Server) -> None:
    fuzz(ok, 2000, seed=2)
    assert ok.send(CHAT, GOOD).status == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"POST /v1/point HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/point HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        b"POST /v1/point HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n",
    ],
)
def test_what_is_not_http(ok: Server, raw: bytes) -> None:
    with socket.create_connection(("127.0.0.1", ok.port), timeout=10) as sock:
        sock.sendall(raw)
        sock.shutdown(socket.SHUT_WR)
        reply = b""
        while part := sock.recv(65536):
            reply += part
    assert b" 200 " not in reply.partition(b"\r\n")[0]
    assert b" 5" not in reply[:13].removeprefix(b"HTTP/1.1")
    assert ok.send("/health").status == 200
