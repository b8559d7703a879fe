"""Downloads from a local server: unusual URLs, politeness, and responses that are not pictures."""

from __future__ import annotations

import email.utils
import hashlib
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from molmo_edge.data import fetching
from molmo_edge.data.downloads import FAILED, MANIFEST, OK, OTHER_FILE, Counts, Manifest, fetch_images
from molmo_edge.data.fetching import BusyError, FetchError, OtherFileError, ascii_url, fetch_image
from molmo_edge.data.rows import NoAnswerError


def picture(colour: int, side: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


PICTURE = picture(7)
SHA = hashlib.sha256(PICTURE).hexdigest()
HTML = b"<!DOCTYPE html>\n<html><body>This picture is no longer available"


@dataclass
class Answer:
    status: int = 200
    body: bytes = PICTURE
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Site:
    port: int = 0
    answers: dict[str, list[Answer]] = field(default_factory=dict)  # in order; the last one repeats
    asked: list[tuple[str, str]] = field(default_factory=list)  # Host, path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record waiting times instead of sleeping, and advance a clock by them."""
    slept: list[float] = []
    monkeypatch.setattr(fetching, "HOSTS", fetching.Hosts())

    class Clock:
        sleep = staticmethod(slept.append)

        @staticmethod
        def monotonic() -> float:
            return 1000.0 + sum(slept)

    monkeypatch.setattr(fetching, "time", Clock)
    return slept


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Site]:
    """A server that answers for 127.0.0.1 and for every host whose name ends in .example. Nothing sleeps."""
    request.getfixturevalue("waits")
    monkeypatch.setenv("no_proxy", "*")
    here = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            here.asked.append((str(self.headers["Host"]).partition(":")[0], self.path))
            left = here.answers.get(self.path, [Answer(404, b"")])
            answer = left.pop(0) if len(left) > 1 else left[0]
            self.send_response_only(answer.status)
            for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    resolve = socket.getaddrinfo

    def local(host: Any, *arguments: Any, **more: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else str(host)
        return resolve("127.0.0.1" if name.isascii() and name.endswith(".example") else host, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", local)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield here
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("http://bücher.example/a", "http://xn--bcher-kva.example/a"),
        ("https://例え.テスト:8080/画像.jpg", "https://xn--r8jz45g.xn--zckzah:8080/%E7%94%BB%E5%83%8F.jpg"),
        ("http://b%C3%BCcher.example/", "http://xn--bcher-kva.example/"),
        ("HTTP://Straße.example", "http://xn--strae-oqa.example/"),
        ("http://xn--bcher-kva.example/ä b.png?q=ü&x=1 2#part", "http://xn--bcher-kva.example/%C3%A4%20b.png?q=%C3%BC&x=1%202"),
        ("http://a.example/100%.png?b=50%&c=%41", "http://a.example/100%25.png?b=50%25&c=%41"),
        (" http://my_host.example/a(1),b;c=d/é.jpg\n", "http://my_host.example/a(1),b;c=d/%C3%A9.jpg"),
        ("http://me:pä@a.example/[x]|y", "http://me:p%C3%A4@a.example/[x]%7Cy"),
        ("http://[::1]:80/a", "http://[::1]:80/a"),
    ],
)  # fmt: skip
def test_addresses_are_sent_in_ascii(url: str, sent: str) -> None:
    assert ascii_url(url) == sent
    assert ascii_url(sent) == sent


@pytest.mark.parametrize(
    "url", ["", "ftp://a.example/x", "http:///x", "http://a.example:port/", "http://[not a host/", "http://ü..example/",
            "http://" + "ü" * 70 + ".example/", "http://a b.example/", "file:///etc/hosts", "data:image/png;base64,AA"]
)  # fmt: skip
def test_what_is_no_address_is_asked_of_nobody(url: str, tmp_path: Path, waits: list[float]) -> None:
    with pytest.raises(FetchError) as caught:
        fetch_image(url, None, tmp_path)
    assert type(caught.value) is FetchError
    assert waits == []
    assert "\n" not in str(caught.value).strip()


def test_international_hosts_and_paths_are_fetched(site: Site, tmp_path: Path) -> None:
    site.answers["/%C3%A4%20b.png?q=%C3%BC"] = [Answer()]
    path = fetch_image(f"http://bücher.example:{site.port}/ä b.png?q=ü", SHA, tmp_path)
    assert path.read_bytes() == PICTURE
    assert site.asked == [("xn--bcher-kva.example", "/%C3%A4%20b.png?q=%C3%BC")]


def test_redirects_to_international_hosts_are_followed(site: Site, tmp_path: Path) -> None:
    target = f"http://bücher.example:{site.port}/ü b.png".encode().decode("latin-1")
    site.answers |= {
        "/moved": [Answer(302, b"", {"Location": target})],
        "/%C3%BC%20b.png": [Answer()],
        "/out": [Answer(302, b"", {"Location": "ftp://a.example/x"})],
        "/loop": [Answer(302, b"", {"Location": "/loop"})],
    }
    assert fetch_image(f"{site.url}/moved", SHA, tmp_path).read_bytes() == PICTURE
    assert site.asked[-1] == ("xn--bcher-kva.example", "/%C3%BC%20b.png")
    for name in ("out", "loop"):
        with pytest.raises(FetchError) as caught:
            fetch_image(f"{site.url}/{name}", None, tmp_path)
        assert type(caught.value) is FetchError


@pytest.mark.parametrize("status", [202, 429])
def test_a_host_that_is_not_ready_is_asked_again(site: Site, tmp_path: Path, waits: list[float], status: int) -> None:
    soon = email.utils.formatdate(1_800_000_025, usegmt=True)
    now = email.utils.formatdate(1_800_000_000, usegmt=True)
    site.answers["/1"] = [
        Answer(status, HTML, {"Retry-After": "20"}),
        Answer(status, b"", {"Retry-After": soon, "Date": now}),
        Answer(status, b"", {"Retry-After": "soon"}),
        Answer(),
    ]
    assert fetch_image(f"{site.url}/1", SHA, tmp_path).read_bytes() == PICTURE
    assert waits == [20.0, 25.0, 4.0]
    site.answers["/2"] = [Answer(status, b"")]
    with pytest.raises(BusyError, match=f"/2 cannot be fetched: HTTP status {status}"):
        fetch_image(f"{site.url}/2", None, tmp_path)
    assert waits[3:] == [1.0, 2.0, 4.0]
    assert [path for _, path in site.asked].count("/2") == 4


@pytest.mark.parametrize(
    ("says", "seconds"),
    [
        ("0", 0),
        ("17", 17),
        (" 3 ", 3),
        ("-5", 0),
        ("", 0),
        ("tomorrow", 0),
        ("9" * 500, 86400),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 99 Oct 2015 07:28:00 GMT", 0),
    ],
)
def testretry_after(says: str, seconds: float) -> None:
    from email.message import Message

    headers = Message()
    headers["Retry-After"] = says
    assert fetching.retry_after(headers) == seconds
    later = Message()
    later["Retry-After"] = email.utils.formatdate(time.time() + 40, usegmt=True)
    assert 30 < fetching.retry_after(later) <= 41


def test_a_host_that_asks_for_an_hour_is_left_alone(site: Site, tmp_path: Path, waits: list[float]) -> None:
    site.answers["/1"] = [Answer(429, b"", {"Retry-After": "3600"})]
    site.answers["/2"] = [Answer()]
    with pytest.raises(BusyError, match=r"asks to wait 3600 s\. Try again later"):
        fetch_image(f"{site.url}/1", None, tmp_path)
    with pytest.raises(BusyError, match="its host asks to wait 3600 s more"):
        fetch_image(f"{site.url}/2", None, tmp_path)
    assert site.asked == [("127.0.0.1", "/1")]
    assert waits == []
    other = fetch_image(f"http://other.example:{site.port}/2", None, tmp_path)
    assert other.read_bytes() == PICTURE


def test_all_urls_of_a_host_wait_for_what_one_was_told(site: Site, tmp_path: Path, waits: list[float]) -> None:
    fetching.HOSTS.leave(f"127.0.0.1:{site.port}", 50.0)
    site.answers["/2"] = [Answer()]
    fetch_image(f"{site.url}/2", None, tmp_path)
    assert waits == [50.0]


def test_busy_hosts_are_asked_by_the_next_run(site: Site, tmp_path: Path) -> None:
    site.answers |= {"/1": [Answer(429, b"")], "/2": [Answer()], "/3": [Answer(202, HTML)]}
    wanted = [(f"{site.url}/{i}", None) for i in (1, 2, 3)]
    heard: list[Counts] = []
    manifest = fetch_images(wanted, tmp_path, jobs=1, progress=heard.append)
    assert manifest.counts() == {OK: 1, FAILED: 0, OTHER_FILE: 0}
    assert heard[-1] == Counts(fetched=1, busy=2)
    assert heard[-1].done == 3
    assert len((tmp_path / MANIFEST).read_text().splitlines()) == 1
    site.answers |= {"/1": [Answer()], "/3": [Answer()]}
    assert fetch_images(wanted, tmp_path, jobs=1).counts()[OK] == 3


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (HTML, r"a web page \(HTML\)"),
        (b"\n  <html lang=en>gone", r"a web page \(HTML\)"),
        (b'{"error": "gone"}', "JSON text"),
        (b"%PDF-1.7 ...", "a PDF document"),
    ],
)
@pytest.mark.parametrize("sha256", [None, SHA])
def test_pages_instead_of_pictures_are_missing(
    site: Site, tmp_path: Path, body: bytes, says: str, sha256: str | None
) -> None:
    site.answers["/1"] = [Answer(200, body, {"Content-Type": "image/png"})]
    with pytest.raises(FetchError, match=f"/1 returns {says} instead of a picture"):
        fetch_image(f"{site.url}/1", sha256, tmp_path)
    assert not list(tmp_path.iterdir())
    manifest = fetch_images([(f"{site.url}/1", sha256)], tmp_path)
    entry = Manifest.load(tmp_path).entries[f"{site.url}/1"]
    assert entry.outcome == FAILED
    assert "instead of a picture" in str(entry.reason)
    assert manifest.path(f"{site.url}/1") is None
    assert json.loads((tmp_path / MANIFEST).read_text())["outcome"] == FAILED


def test_known_placeholders_are_missing(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, removed, pixel = picture(1), picture(2), picture(3, side=1)
    known = {hashlib.md5(gone).hexdigest(): "Imgur's", hashlib.sha256(removed).hexdigest(): "Reddit's"}
    monkeypatch.setattr(fetching, "PLACEHOLDERS", known)
    site.answers |= {
        "/gone": [Answer(200, gone)],
        "/removed": [Answer(200, removed)],
        "/pixel": [Answer(200, pixel)],
        "/flickr": [Answer(302, b"", {"Location": f"http://s.example:{site.port}/en-us/photo_unavailable.png"})],
        "/en-us/photo_unavailable.png": [Answer()],
        "/there": [Answer(200, picture(9))],
    }
    names = ("gone", "removed", "pixel", "flickr", "there")
    for wanted in (None, hashlib.sha256(removed).hexdigest()):
        folder = tmp_path / str(wanted)[:4]
        manifest = fetch_images([(f"{site.url}/{name}", wanted) for name in names], folder)
        for name in names[:4] if wanted is None else ("gone", "removed", "flickr"):
            entry = manifest.entries[f"{site.url}/{name}"]
            assert entry.outcome == FAILED, name
            assert "placeholder" in str(entry.reason), name
    there = Manifest.load(tmp_path / "None")
    assert there.path(f"{site.url}/there") is not None
    assert there.counts() == {OK: 1, FAILED: 4, OTHER_FILE: 0}
    assert len(list((tmp_path / "None").iterdir())) == 2, "a placeholder was kept"


def test_another_picture_is_still_another_picture(site: Site, tmp_path: Path) -> None:
    site.answers["/1"] = [Answer(200, picture(9))]
    with pytest.raises(OtherFileError, match="returns a different file than expected"):
        fetch_image(f"{site.url}/1", SHA, tmp_path)
    site.answers["/2"] = [Answer(503, b"")]
    with pytest.raises(NoAnswerError) as caught:
        fetch_image(f"{site.url}/2", SHA, tmp_path)
    assert type(caught.value) is NoAnswerError
