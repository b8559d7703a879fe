"""Rows are equal from every kind of copy; pictures are downloaded politely, checked and kept."""

from __future__ import annotations

import builtins
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from molmo_edge.data import fetching
from molmo_edge.data.rows import FetchError, Row, RowsError, fetch_image, load_rows
from molmo_edge.frontend.crops import load_image

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module", autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        datasets.disable_progress_bars()
        yield


def table(*texts: str) -> Any:
    features = datasets.Features(
        {"text": datasets.Value("string"), "image": datasets.Image(), "n": [[datasets.Value("bool")]]}
    )
    listed = [
        {"text": t, "image": Image.new("RGB", (10 + i, 5)), "n": [[True, False], []]} for i, t in enumerate(texts)
    ]
    return datasets.Dataset.from_list(listed, features=features)


def parquet(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table(*texts).to_parquet(str(path))


def seen(row: Row) -> tuple[str, tuple[int, ...], Any]:
    return row["text"], load_image(row.image("image")).shape, row["n"]


def write_parquet(folder: Path) -> None:
    parquet(folder / "data" / "test-00000-of-00002.parquet", "one", "two")
    parquet(folder / "data" / "test-00001-of-00002.parquet", "three")
    parquet(folder / "data" / "testdev-00000-of-00001.parquet", "another split")


def write_saved(folder: Path) -> None:
    table("one", "two", "three").save_to_disk(str(folder))


def write_saved_splits(folder: Path) -> None:
    parts = {"train": table("another split"), "test": table("one", "two", "three")}
    datasets.DatasetDict(parts).save_to_disk(str(folder))


def write_lines(folder: Path) -> None:
    folder.mkdir()
    listed = [{"text": t, "image": f"{i}.png", "n": [[True, False], []]} for i, t in enumerate(("one", "two", "three"))]
    for i in range(3):
        Image.new("RGB", (10 + i, 5)).save(folder / f"{i}.png")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, listed)))


@pytest.mark.parametrize("write", [write_parquet, write_saved, write_saved_splits, write_lines])
def test_every_kind_of_copy_gives_the_same_rows(write: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    write(folder)
    rows = load_rows("owner/name", (), "test", folder)
    widths = {"one": 10, "two": 11, "three": 10 if write is write_parquet else 12}
    assert [seen(row) for row in rows] == [(t, (5, w, 3), [[True, False], []]) for t, w in widths.items()]
    assert (len(rows), set(rows.columns)) == (3, {"text", "image", "n"})
    assert rows[1]["text"] == "two"
    assert "nothing" not in rows[1]
    assert rows[1].get("nothing") is None
    with pytest.raises(RowsError, match=r'has no column "nothing" \(columns: '):
        rows[0]["nothing"]
    with pytest.raises(IndexError):
        rows[3]


def test_configs_come_one_after_the_other(tmp_path: Path) -> None:
    for config in ("Zoo", "Art"):
        parquet(tmp_path / "clone" / config / "test-00000-of-00001.parquet", config)
        table(config).save_to_disk(str(tmp_path / "saved" / config))
    for copy in ("clone", "saved"):
        rows = load_rows("owner/name", ("Zoo", "Art"), "test", tmp_path / copy)
        assert [row["text"] for row in rows] == ["Zoo", "Art"]


def test_pictures_are_not_decoded_before_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path)
    opened: list[Any] = []
    monkeypatch.setattr(Image, "open", lambda *arguments, **_more: opened.append(arguments))
    rows = load_rows("owner/name", (), "test", tmp_path)
    assert [row["text"] for row in rows] == ["one", "two", "three"]
    assert isinstance(rows[0].image("image"), bytes)
    assert not opened


def test_what_is_wrong_with_a_copy_is_said(tmp_path: Path) -> None:
    def load(split: str, folder: Path) -> None:
        load_rows("owner/name", (), split, folder)

    with pytest.raises(RowsError, match=r"there is no folder .*nowhere"):
        load("test", tmp_path / "nowhere")
    with pytest.raises(RowsError, match="it has no parquet files"):
        load("test", tmp_path)
    write_parquet(tmp_path / "clone")
    with pytest.raises(RowsError, match='no files of the split "val" of owner/name; it has test, testdev'):
        load("val", tmp_path / "clone")
    (tmp_path / "clone" / "data" / "test-00001-of-00002.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(RowsError, match=r"data cannot be read: .*[Pp]arquet"):
        load("test", tmp_path / "clone")
    write_saved_splits(tmp_path / "saved")
    with pytest.raises(RowsError, match=r'has no split "val" \(splits: train, test\)'):
        load("val", tmp_path / "saved")
    for text, wrong in (('{"a": 1}\n\n{"a"', "line 3 of .* is not JSON"), ("[1]", "line 1 of .* is not a JSON object")):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(RowsError, match=wrong):
            load("test", tmp_path)


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "clone")
    write_lines(tmp_path / "lines")
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    for local in (tmp_path / "clone", None):
        with pytest.raises(RowsError, match=r'pip install "molmo-edge\[eval\]"'):
            load_rows("owner/name", (), "test", local)
    assert len(load_rows("owner/name", (), "test", tmp_path / "lines")) == 3  # JSON does not need it


def test_one_split_alone_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path)
    asked: list[dict[str, Any]] = []

    def download(hub_id: str, **more: Any) -> str:
        asked.append({"id": hub_id, **more})
        if hub_id == "owner/gone":
            raise OSError("no route\nto host")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert len(load_rows("owner/name", (), "test", None)) == 3
    assert asked[0] == {"id": "owner/name", "repo_type": "dataset", "allow_patterns": ["data/test-*.parquet"]}
    with pytest.raises(
        RowsError, match=r"owner/gone cannot be downloaded from the hub: no route\. .*hf download owner/gone.*--data"
    ):
        load_rows("owner/gone", ("A", "B"), "test", None)
    assert asked[1]["allow_patterns"] == ["A/test-*.parquet", "B/test-*.parquet"]


@dataclass
class Web:
    """A local server: answers by path, in order; the last one repeats."""

    url: str = ""
    answers: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("no_proxy", "*")
    site = Web()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.asked.append(self.path)
            left = site.answers.get(self.path, [(404, b"")])
            status, body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) + (5 if status == 206 else 0)))
            if status == 503:
                self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


DATA = b"bytes of a picture"
SHA = hashlib.sha256(DATA).hexdigest()


def test_a_picture_is_fetched_once_and_kept(web: Web, tmp_path: Path) -> None:
    web.answers["/a%20b%C3%BC.png?x=1"] = [(200, DATA)]
    folder = tmp_path / "images"
    first = fetch_image(f"{web.url}/a bü.png?x=1", SHA, folder)
    assert (first.name, first.read_bytes()) == (SHA, DATA)
    assert fetch_image(f"{web.url}/a bü.png?x=1", SHA, folder) == first
    assert web.asked == ["/a%20b%C3%BC.png?x=1"]
    assert [path.name for path in folder.iterdir()] == [SHA]  # no partial files
    unchecked = fetch_image(f"{web.url}/a bü.png?x=1", None, folder)
    assert unchecked != first
    assert unchecked.read_bytes() == DATA


def test_another_picture_than_once_is_refused(web: Web, tmp_path: Path) -> None:
    web.answers["/1"] = [(200, b"a placeholder")]
    with pytest.raises(FetchError, match=rf"/1 returns a different file than expected: its SHA-256 is not {SHA}"):
        fetch_image(f"{web.url}/1", SHA, tmp_path)
    assert len(web.asked) == 1
    assert not list(tmp_path.iterdir())


def test_what_is_gone_is_asked_for_once(web: Web, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="/gone cannot be fetched: HTTP status 404"):
        fetch_image(f"{web.url}/gone", SHA, tmp_path, pause=60)
    assert web.asked == ["/gone"]
    with pytest.raises(FetchError, match="is not a lower-case SHA-256"):
        fetch_image(f"{web.url}/gone", "../elsewhere", tmp_path)
    for address in ("file:///etc/hosts", "http://[not a host/"):
        with pytest.raises(FetchError):
            fetch_image(address, SHA, tmp_path, pause=60)


def test_a_busy_host_is_asked_again_three_times(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(fetching.time, "sleep", waits.append)
    web.answers["/1"] = [(503, b""), (429, b""), (206, DATA[:4]), (200, DATA)]  # the third one is truncated
    assert fetch_image(f"{web.url}/1", SHA, tmp_path).read_bytes() == DATA
    assert waits == [1.0, 2.0, 4.0]
    web.answers["/2"] = [(503, b"")]
    with pytest.raises(FetchError, match="/2 cannot be fetched: HTTP status 503"):
        fetch_image(f"{web.url}/2", None, tmp_path)
    assert web.asked.count("/2") == 4


@pytest.mark.usefixtures("web")
def test_a_host_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(fetching.time, "sleep", waits.append)
    with pytest.raises(FetchError, match=r"127\.0\.0\.1:1/x cannot be fetched"):
        fetch_image("http://127.0.0.1:1/x", None, tmp_path)
    assert len(waits) == 3
