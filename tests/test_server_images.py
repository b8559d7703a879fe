"""Image URLs: a server fetches from hosts on its list only, and never from where only this machine can reach."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from serving import chat_body, data_uri, png, serving

from molmo_edge import Molmo
from molmo_edge.server.errors import ApiError
from molmo_edge.server.pictures import Picture, PictureReader, decode_data_uri
from molmo_edge.server.remote_images import RemoteImages, is_public
from molmo_edge.server.settings import Settings

PUBLIC = "93.184.215.14"
NAMES = {  # what a hostile DNS server says; the first is the allowed host
    "photos.example": [PUBLIC],
    "home.example": ["127.0.0.1"],
    "both.example": [PUBLIC, "10.0.0.1"],
    "six.example": ["::1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "nat.example": ["64:ff9b::7f00:1"],
    "teredo.example": ["2001:0:4136:e378:8000:63bf:80ff:fffe"],
    "sixtofour.example": ["2002:7f00:1::"],
    "old.example": ["::127.0.0.1"],
    "local.example": ["fe80::1"],
    "unique.example": ["fd00::1"],
    "metadata.example": ["169.254.169.254"],
    "shared.example": ["100.64.0.1"],
    "zero.example": ["0.0.0.0"],
    "many.example": ["224.0.0.1"],
    "nothing.example": [],
}


def fake_dns(host: str, _port: int) -> list[Any]:
    try:
        return [ipaddress.ip_address(host.strip("[]"))]
    except ValueError:
        return [ipaddress.ip_address(address) for address in NAMES.get(host, [])]


REFUSED = [
    *(f"http://{name}/cat.png" for name in NAMES if name != "photos.example"),
    "http://127.0.0.1/",
    "http://[::1]/",
    "http://[::ffff:7f00:1]/",
    "http://2130706433/",
    "http://0x7f.1/",
    "http://0177.0.0.1/",
    "http://localhost/",
    "http://localhost./",
    "http://LOCALHOST:22/",
    "http://photos.example:22/",
    "http://photos.example:80:90/",
    "http://photos.example@127.0.0.1/",
    "http://user:password@photos.example/",
    "http://127.0.0.1#@photos.example/",
    "http://127.0.0.1\\@photos.example/",
    "http://photos.example.evil.example/",
    "http://photos.example%00.evil.example/",
    "http://photos.example\r\nHost: 127.0.0.1/",
    "http:///cat.png",
    "http://",
    "http://[::1",
    "//photos.example/cat.png",
    "file:///etc/passwd",
    "file://photos.example/etc/passwd",
    "gopher://photos.example:70/_GET",
    "ftp://photos.example/cat.png",
    "dict://photos.example:11211/stat",
    "ldap://photos.example/",
    "javascript:alert(1)",
    "jar:http://photos.example!/",
    "/etc/passwd",
    "HTTP://home.example/",
    "",
]


@pytest.fixture
def no_connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses that were connected to; every connection fails."""
    tried: list[Any] = []

    def refuse(address: Any, *_: Any, **__: Any) -> Any:
        tried.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refuse)
    return tried


@pytest.mark.parametrize("url", REFUSED, ids=str)
def test_a_url_that_leads_elsewhere_is_refused_before_a_connection(url: str, no_connections: list[Any]) -> None:
    hosts = list(NAMES) if ".example/cat.png" in url else ["photos.example"]
    with pytest.raises(ApiError) as error:
        RemoteImages(hosts, resolve=fake_dns).fetch(url)
    assert 400 <= error.value.status < 500
    assert no_connections == []


def test_the_connection_goes_to_the_address_that_was_checked(no_connections: list[Any]) -> None:
    """A second look-up of the name could give another address."""
    answers = [[PUBLIC], ["127.0.0.1"], ["127.0.0.1"]]

    def rebinding(_host: str, _port: int) -> list[Any]:
        return [ipaddress.ip_address(address) for address in answers.pop(0)]

    with pytest.raises(ApiError):
        RemoteImages(["photos.example"], resolve=rebinding).fetch("https://photos.example/cat.png")
    assert no_connections == [(PUBLIC, 443)]
    assert len(answers) == 2


def test_what_is_public() -> None:
    for address in ("8.8.8.8", "1.1.1.1", "2606:4700::1111", "2002:808:808::"):
        assert is_public(ipaddress.ip_address(address)), address
    for address in ("172.16.0.1", "192.168.1.1", "192.0.2.1", "198.18.0.1", "240.0.0.1", "255.255.255.255", "ff02::1"):
        assert not is_public(ipaddress.ip_address(address)), address


class Origin(BaseHTTPRequestHandler):
    """A web server with an image, redirects, and ways to keep a client busy."""

    def do_GET(self) -> None:
        self.server.hosts.append(self.headers["Host"])  # type: ignore[attr-defined]
        if self.path == "/cat.png?size=1":
            self.reply(200, png())
        elif self.path == "/moved":
            self.reply(302, b"", Location="/cat.png?size=1")
        elif self.path == "/loop":
            self.reply(302, b"", Location="/loop")
        elif self.path == "/away":
            self.reply(307, b"", Location="http://home.example/cat.png")
        elif self.path == "/nowhere":
            self.reply(302, b"", Location="http://[x")
        elif self.path == "/file":
            self.reply(301, b"", Location="file:///etc/passwd")
        elif self.path == "/large":
            self.reply(200, b"x" * 60_000)
        elif self.path == "/short":
            self.reply(200, b"x", length=100)
        elif self.path == "/slow":
            with contextlib.suppress(OSError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                while True:
                    self.wfile.write(b"X-More: 1\r\n")
                    self.wfile.flush()
                    time.sleep(0.05)
        else:
            self.reply(404, b"no")

    def reply(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def origin() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Origin)
    server.daemon_threads = True
    server.hosts = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def allowing(origin: ThreadingHTTPServer, **more: Any) -> tuple[RemoteImages, str]:
    """Images of `origin` under a name whose address counts as public, and the beginning of their URLs."""
    host = f"photos.example:{origin.server_address[1]}"

    def dns(name: str, port: int) -> list[Any]:
        return [ipaddress.ip_address("127.0.0.1")] if name == "photos.example" else fake_dns(name, port)

    return RemoteImages([host, "home.example"], resolve=dns, public=lambda _: True, **more), f"http://{host}"


def test_an_allowed_image_is_fetched_and_its_redirects_checked(origin: ThreadingHTTPServer) -> None:
    remote, url = allowing(origin)
    assert remote.fetch(f"{url}/cat.png?size=1#part") == png()
    assert remote.fetch(f"{url}/moved") == png()
    assert set(origin.hosts) == {url.removeprefix("http://")}  # type: ignore[attr-defined]
    for path, message in (
        ("/loop", "too often"),
        ("/file", "data:image"),
        ("/nothing", "status 404"),
        ("/short", "fetched"),
        ("/nowhere", "fetched"),
    ):
        with pytest.raises(ApiError, match=message):
            remote.fetch(url + path)


def test_a_redirect_to_a_private_address_is_refused(origin: ThreadingHTTPServer) -> None:
    remote, url = allowing(origin)
    asked: list[str] = []

    def public(address: Any) -> bool:
        asked.append(str(address))
        return len(asked) == 1  # the origin of this test is on loopback, too

    with pytest.raises(ApiError, match="not public"):
        RemoteImages(remote.hosts, resolve=remote.resolve, public=public).fetch(f"{url}/away")
    assert len(asked) == 2


def test_size_and_time_of_a_remote_image_are_limited(origin: ThreadingHTTPServer) -> None:
    remote, url = allowing(origin, max_bytes=50_000, seconds=0.5)
    with pytest.raises(ApiError) as error:
        remote.fetch(f"{url}/large")
    assert error.value.status == 413
    began = time.monotonic()
    with pytest.raises(ApiError, match="could not be fetched"):
        remote.fetch(f"{url}/slow")
    assert time.monotonic() - began < 30


@pytest.fixture
def secure_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """`origin` over TLS, with a certificate for photos.example that clients of this process trust."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("needs the command openssl")
    request = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=photos.example"
    names = ("-addext", "subjectAltName=DNS:photos.example", "-keyout", "key.pem", "-out", "certificate.pem")
    subprocess.run([openssl, *request.split(), *names], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Origin)
    server.daemon_threads = True
    server.hosts = []  # type: ignore[attr-defined]
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_time_of_an_image_over_https_is_limited(secure_origin: ThreadingHTTPServer) -> None:
    remote, url = allowing(secure_origin)
    url = url.replace("http:", "https:")
    assert remote.fetch(f"{url}/cat.png?size=1") == png()
    with pytest.raises(ApiError, match="could not be fetched") as error:
        replace(remote, seconds=0.5).fetch(f"{url}/slow")
    assert "HTTPException" not in error.value.message  # http.client gives up after 100 headers


def test_a_server_does_not_wait_for_pictures_without_end(saying: Callable[..., Molmo]) -> None:
    class Silent(PictureReader):
        async def read(self, *_: Any, **__: Any) -> tuple[Picture, ...]:
            await asyncio.sleep(5)
            return ()

    with serving(saying("ok"), Silent(Settings()), timeout=0.2) as server:
        reply = server.send("/v1/chat/completions", chat_body("What?", data_uri(png())))
        assert (reply.status, reply.json["error"]["code"]) == (504, "timeout")


def test_a_server_asks_about_a_remote_image(origin: ThreadingHTTPServer, saying: Callable[..., Molmo]) -> None:
    remote, url = allowing(origin)
    with serving(saying("ok"), PictureReader(Settings(), remote)) as server:
        assert server.send("/v1/chat/completions", chat_body("What?", f"{url}/cat.png?size=1")).status == 200
        assert server.send("/v1/point", {"image_url": f"{url}/moved", "object": "cup"}).status == 200
        reply = server.send("/v1/point", {"image_url": "http://127.0.0.1:22/", "object": "cup"})
        assert (reply.status, reply.json["error"]["param"]) == (400, "image_url")
        assert len(server.service.scenes) == 1
        before = len(origin.hosts)  # type: ignore[attr-defined]
        body = chat_body("What?", f"{url}/cat.png?size=1")
        body["messages"] = [*body["messages"], {"role": "assistant", "content": "ok"}] * 12 + body["messages"]
        assert server.send("/v1/chat/completions", body).status == 200
        assert len(origin.hosts) == before + 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("url", ["http://localhost:{port}/health", "http://127.0.0.1:{port}/metrics"])
def test_a_server_does_not_ask_itself(url: str, saying: Callable[..., Molmo]) -> None:
    with serving(saying("ok"), image_hosts=("localhost", "127.0.0.1")) as server:
        reply = server.send("/v1/point", {"image_url": url.format(port=server.port), "object": "cup"})
        assert reply.status == 400
    with serving(saying("ok"), image_hosts=(f"localhost:{server.port}", f"127.0.0.1:{server.port}")) as server:
        reply = server.send("/v1/point", {"image_url": url.format(port=server.port), "object": "cup"})
        assert reply.status == 400


def test_forms_of_data_uris() -> None:
    data = png()
    uri = data_uri(data)
    assert decode_data_uri(uri) == data
    assert decode_data_uri(uri.replace("data:image/png", "DATA:Image/PNG;charset=x")) == data
    middle = len(uri) // 2
    assert decode_data_uri(f"{uri[:middle]}\r\n {uri[middle:]}") == data
    assert decode_data_uri("data:image/svg+xml,%3Csvg%3E") == b"<svg>"
    for wrong in ("data:,x", "data:image/png;base64,a", "data:image/png;base64,ä", "data:image/png", "data:"):
        with pytest.raises(ApiError):
            decode_data_uri(wrong)
