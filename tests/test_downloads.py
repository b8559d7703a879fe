"""Pictures are downloaded politely and once, and an interrupted run can be continued."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from molmo_edge.data import downloads, fetching
from molmo_edge.data.downloads import (
    FAILED,
    MANIFEST,
    OK,
    OTHER_FILE,
    Counts,
    DownloadError,
    Manifest,
    fetch_images,
)
from molmo_edge.data.rows import FetchError, NoAnswerError, OtherFileError, fetch_image


def picture(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


@dataclass
class Host:
    """A local server that counts simultaneous requests."""

    url: str = ""
    pages: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    slow: float = 0.0  # seconds per answer
    now: int = 0
    most: int = 0
    most_together: int = 0  # of all hosts

    def fill(self, number: int) -> list[tuple[str, str | None]]:
        self.pages |= {f"/{i}": (200, picture(i)) for i in range(number)}
        return [(f"{self.url}/{i}", None) for i in range(number)]


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Host]]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetching.time, "sleep", lambda _seconds: None)
    wait = threading.Event().wait  # time.sleep is one function for all modules
    sites = [Host(), Host()]
    lock = threading.Lock()

    def start(site: Host) -> ThreadingHTTPServer:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with lock:
                    site.asked.append(self.path)
                    site.now += 1
                    site.most = max(site.most, site.now)
                    site.most_together = max(site.most_together, sum(each.now for each in sites))
                wait(site.slow)
                status, body = site.pages.get(self.path, (404, b""))
                with lock:
                    site.now -= 1
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        site.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    servers = [start(site) for site in sites]
    yield sites
    for server in servers:
        server.shutdown()
        server.server_close()


def test_every_host_is_asked_by_few_at_once(hosts: list[Host], tmp_path: Path) -> None:
    first, second = hosts
    first.slow = second.slow = 0.03
    wanted = first.fill(10) + second.fill(10)  # grouped by host, as in data sets
    manifest = fetch_images(wanted, tmp_path, jobs=8, per_host=3)
    assert (first.most, second.most) == (3, 3)
    assert second.most_together > 3, "one host was asked after the other"
    body_by_url = {site.url + name: body for site in hosts for name, (_, body) in site.pages.items()}
    for url, _ in wanted:
        path = manifest.path(url)
        assert path is not None
        assert path.read_bytes() == body_by_url[url]


def test_jobs_are_the_most_at_once(hosts: list[Host], tmp_path: Path) -> None:
    hosts[0].slow = 0.02
    fetch_images(hosts[0].fill(6), tmp_path, jobs=2, per_host=5)
    assert hosts[0].most == 2


def test_a_picture_is_fetched_once_and_said_to_be_there(hosts: list[Host], tmp_path: Path) -> None:
    site = hosts[0]
    wanted = site.fill(3)
    sha = hashlib.sha256(picture(0)).hexdigest()
    heard: list[Counts] = []
    manifest = fetch_images([(wanted[0][0], sha), *wanted, *wanted], tmp_path, progress=heard.append)
    assert sorted(site.asked) == ["/0", "/1", "/2"]
    assert [counts.done for counts in heard] == [1, 2, 3]
    assert heard[-1] == Counts(fetched=3)
    assert manifest.counts() == {OK: 3, FAILED: 0, OTHER_FILE: 0}
    assert manifest.path(wanted[0][0], sha) == tmp_path / sha
    unchecked = wanted[1][0]  # its hash is recorded although none was expected
    assert manifest.path(unchecked, hashlib.sha256(picture(1)).hexdigest()) == manifest.path(unchecked) is not None
    assert manifest.path(unchecked, "0" * 64) is None
    assert manifest.path(site.url + "/else") is None
    assert Manifest.load(tmp_path) == manifest


def test_a_run_that_was_stopped_goes_on(hosts: list[Host], tmp_path: Path) -> None:
    site = hosts[0]
    wanted = site.fill(8)

    def stop(counts: Counts) -> None:
        if counts.done == 3:
            raise KeyboardInterrupt

    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        fetch_images(wanted, tmp_path, jobs=1, progress=stop)
    assert Manifest.load(tmp_path).counts()[OK] == 3
    for _ in range(100):  # the request in progress finishes
        if threading.active_count() <= threads:
            break
        threading.Event().wait(0.02)
    before = len(site.asked)
    assert 3 <= before <= 4
    heard: list[Counts] = []
    manifest = fetch_images(wanted, tmp_path, jobs=1, progress=heard.append)
    assert sorted(site.asked) == [f"/{i}" for i in range(8)], "something was fetched twice, or never"
    assert heard[-1] == Counts(fetched=5, known=3)
    assert manifest.counts()[OK] == 8


def test_a_line_that_was_cut_short_is_passed_over(hosts: list[Host], tmp_path: Path) -> None:
    wanted = hosts[0].fill(4)
    fetch_images(wanted, tmp_path, jobs=1)
    log = tmp_path / MANIFEST
    log.write_bytes(log.read_bytes()[:-20])
    assert Manifest.load(tmp_path).counts()[OK] == 3
    more = wanted + hosts[1].fill(1)
    assert fetch_images(more, tmp_path, jobs=1).counts()[OK] == 5
    assert Manifest.load(tmp_path).counts()[OK] == 5, "the line after the cut one was lost with it"
    assert len(hosts[0].asked) == 4  # its file existed


def test_what_has_failed_is_not_asked_for_again(hosts: list[Host], tmp_path: Path) -> None:
    site = hosts[0]
    wanted = [*site.fill(1), (site.url + "/gone", None), (site.url + "/page", None), ("ftp://x/y", None)]
    site.pages["/page"] = (200, b"<html>This picture is no longer available")
    manifest = fetch_images(wanted, tmp_path)
    assert manifest.counts() == {OK: 1, FAILED: 3, OTHER_FILE: 0}
    assert "HTTP status 404" in str(manifest.entries[site.url + "/gone"].reason)
    assert "instead of a picture" in str(manifest.entries[site.url + "/page"].reason)
    assert len(list(tmp_path.iterdir())) == 2, "the page was kept"
    heard: list[Counts] = []
    fetch_images(wanted, tmp_path, progress=heard.append)
    assert sorted(site.asked) == ["/0", "/gone", "/page"]
    assert not heard
    site.pages["/gone"] = (200, picture(7))
    manifest = fetch_images([*wanted, *wanted], tmp_path, retry_failed=True, progress=heard.append)
    assert sorted(site.asked) == ["/0", "/gone", "/gone", "/page", "/page"]
    assert heard[-1] == Counts(fetched=1, failed=2, known=1)
    assert Manifest.load(tmp_path).path(site.url + "/gone") == manifest.path(site.url + "/gone") is not None


def test_another_picture_than_once_is_refused(hosts: list[Host], tmp_path: Path) -> None:
    site = hosts[0]
    ((url, _),) = site.fill(1)
    sha = "0" * 64
    heard: list[Counts] = []
    manifest = fetch_images([(url, sha)], tmp_path, progress=heard.append)
    assert heard == [Counts(other_file=1)]
    assert manifest.path(url) is None
    fetch_images([(url, sha)], tmp_path)
    assert len(site.asked) == 1
    manifest = fetch_images([(url, None)], tmp_path)  # another data set accepts any file
    assert len(site.asked) == 2
    assert manifest.path(url) is not None
    assert manifest.path(url, sha) is None


def test_a_file_that_was_deleted_is_fetched_again(hosts: list[Host], tmp_path: Path) -> None:
    ((url, _),) = wanted = hosts[0].fill(1)
    path = fetch_images(wanted, tmp_path).path(url)
    assert path is not None
    path.unlink()
    fetch_images(wanted, tmp_path)
    assert path.is_file()
    assert len(hosts[0].asked) == 2


def test_few_addresses_are_read_ahead(hosts: list[Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "WINDOW", 4)
    read = 0

    def wanted() -> Iterator[tuple[str, str | None]]:
        nonlocal read
        for item in hosts[0].fill(30):
            read += 1
            yield item

    ahead: list[int] = []
    fetch_images(wanted(), tmp_path, jobs=2, progress=lambda counts: ahead.append(read - counts.done))
    assert len(ahead) == 30
    assert max(ahead) <= 4 + 2


@pytest.mark.usefixtures("hosts")
def test_a_machine_that_is_offline_condemns_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "SILENT", 12)
    nowhere = [(f"http://127.0.0.{1 + i % 12}:1/{i}", None) for i in range(40)]
    with pytest.raises(DownloadError, match=r"12 URLs of 1\d hosts in a row gave no answer.* offline"):
        fetch_images(nowhere, tmp_path, jobs=1)
    assert Manifest.load(tmp_path).entries == {}
    # A few failures are dead links, and so are many failures of one host.
    one_host = [(f"http://127.0.0.1:1/{i}", None) for i in range(30)]
    assert fetch_images(nowhere[:5] + one_host, tmp_path).counts()[FAILED] == 34
    assert Manifest.load(tmp_path).counts()[FAILED] == 34


def test_lines_are_written_as_answers_come(hosts: list[Host], tmp_path: Path) -> None:
    lines: list[int] = []
    read = lambda _counts: lines.append(len((tmp_path / MANIFEST).read_text().splitlines()))  # noqa: E731
    fetch_images(hosts[0].fill(3), tmp_path, progress=read)
    assert lines == [1, 2, 3]
    row = json.loads((tmp_path / MANIFEST).read_text().splitlines()[0])
    assert set(row) == {"url", "outcome", "file", "sha256"}
    assert row["outcome"] == OK


def test_a_folder_that_cannot_be_written_is_said(hosts: list[Host], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="cannot be written"):
        fetch_images(hosts[0].fill(1), tmp_path / "file")


def test_a_busy_host_and_another_file_are_told_from_what_is_gone(hosts: list[Host], tmp_path: Path) -> None:
    site = hosts[0]
    site.fill(1)
    site.pages["/busy"] = (503, b"")
    expected = {("/busy", None): NoAnswerError, ("/0", "0" * 64): OtherFileError, ("/gone", None): FetchError}
    for (page, sha256), kind in expected.items():
        with pytest.raises(FetchError) as caught:
            fetch_image(site.url + page, sha256, tmp_path)
        assert type(caught.value) is kind
