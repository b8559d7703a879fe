"""A fake of the hub's HTTP API with the requests of huggingface_hub for downloading a model."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_WEIGHTS = (".bin", ".safetensors")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Serves the files of a directory as the model `name`, and records the requests."""

    name: str
    directory: Path
    url: str = ""
    token: str | None = None  # the token that clients must send; None: public
    gated: bool = False
    sizes: dict[str, int] = field(default_factory=dict)  # wrong sizes to report, by file
    hashes: dict[str, str] = field(default_factory=dict)  # wrong hashes to report
    cut_after: int | None = None  # bytes of a weights file after which the connection is closed
    revisions: tuple[str, ...] = ("main",)
    downloads: list[tuple[str, str | None]] = field(default_factory=list)  # file, and the Range header

    @property
    def files(self) -> dict[str, bytes]:
        return {str(p.relative_to(self.directory)): p.read_bytes() for p in self.directory.rglob("*") if p.is_file()}


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _answer(self, *, head: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        hub = self.hub
        if (
            hub.token is not None
            and not path.startswith("/cdn/")
            and self.headers.get("Authorization") != f"Bearer {hub.token}"
        ):
            return self._error(401, "RepoNotFound", "Invalid username or password.")
        if hub.gated:
            return self._error(403, "GatedRepo", "Access to this model is restricted.")
        if path in (f"/api/models/{hub.name}", f"/api/models/{hub.name}/"):
            return self._json(self.info(), head=head)
        if match := re.fullmatch(rf"/api/models/{re.escape(hub.name)}/(revision|tree)/([^/]+)", path):
            if match[2] not in (*hub.revisions, COMMIT):
                return self._error(404, "RevisionNotFound", "Invalid rev id")
            return self._json(self.info() if match[1] == "revision" else self._tree(), head=head)
        if match := re.fullmatch(rf"/{re.escape(hub.name)}/resolve/([^/]+)/(.+)", path):
            if match[2].endswith(_WEIGHTS) and match[2] in hub.files:
                return self._redirect(match[2])
            return self._file(match[2], head=head)
        if path.startswith("/cdn/"):
            if "Authorization" in self.headers:
                return self._error(400, "", "A token of the hub went to another host.")
            return self._file(path.removeprefix("/cdn/"), head=head)
        return self._error(404, "RepoNotFound", "Repository not found")

    def _size(self, name: str, data: bytes) -> int:
        return self.hub.sizes.get(name, len(data))

    def _lfs(self, name: str, data: bytes) -> dict[str, object]:
        if not name.endswith(_WEIGHTS):
            return {}
        sha256 = self.hub.hashes.get(name) or hashlib.sha256(data).hexdigest()
        return {"lfs": {"sha256": sha256, "oid": sha256, "size": self._size(name, data), "pointerSize": 100}}

    def info(self) -> dict[str, object]:
        siblings = [
            {"rfilename": name, "size": self._size(name, data), "blobId": hashlib.sha1(data).hexdigest()}
            | self._lfs(name, data)
            for name, data in self.hub.files.items()
        ]
        return {"_id": "1", "id": self.hub.name, "modelId": self.hub.name, "sha": COMMIT, "siblings": siblings,
                "private": False, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip

    def _tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": name, "size": self._size(name, data), "oid": hashlib.sha1(data).hexdigest()}
            | self._lfs(name, data)
            for name, data in self.hub.files.items()
        ]

    def _redirect(self, name: str) -> None:
        """Weights are on another host and have a sha256."""
        data = self.hub.files[name]
        self.send_response(302)
        self.send_header("Location", self.hub.url.replace("127.0.0.1", "localhost") + f"/cdn/{name}")  # another host
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Size", str(self._size(name, data)))
        self.send_header("X-Linked-ETag", f'"{self.hub.hashes.get(name) or hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, name: str, *, head: bool) -> None:
        files = self.hub.files
        if name not in files:
            return self._error(404, "EntryNotFound", "Entry not found")
        data, wanted = files[name], self.headers.get("Range")
        if not head:
            self.hub.downloads.append((name, wanted))
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if head:
            return None
        cut = self.hub.cut_after
        if cut is not None and name.endswith(_WEIGHTS):
            self.wfile.write(data[start : max(start, cut)])
            self.close_connection = True
        else:
            self.wfile.write(data[start:])
        return None

    def _json(self, value: object, *, head: bool) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def _error(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
