"""Download the pictures of a data set by URL: in parallel, with few requests per host, and each only once.

A download of a million pictures takes days and will be interrupted. The outcome of each URL is therefore appended to
the folder's manifest immediately, as a line of JSON. The next run continues from it, and data sets read which pictures
they have. Reference: olmo/data/download_urls.py::download_pixmo_urls, which writes the reason of a failure to a file in
the picture's place.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
import urllib.parse
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

from molmo_edge.data.fetching import BusyError, FetchError, NoAnswerError, OtherFileError, ascii_url, fetch_image
from molmo_edge.errors import MolmoEdgeError, first_line
from molmo_edge.frontend.image_files import MAX_PIXELS, quiet_pillow

MANIFEST = "manifest.jsonl"
OK, FAILED, OTHER_FILE = "ok", "failed", "other_file"
_BUSY = "busy"  # the host asks to retry later: not recorded, so that the next run retries

WINDOW = 10_000  # URLs read ahead, so that other hosts are available when one has many in a row
# After this many URLs of this many hosts in a row without an answer, this machine is assumed to be offline.
SILENT, SILENT_HOSTS = 100, 10


class DownloadError(MolmoEdgeError):
    """A download cannot continue."""


class Entry(NamedTuple):
    """The outcome of one URL."""

    outcome: str  # OK, FAILED (permanently) or OTHER_FILE (not the hash in the data set)
    file: str | None = None  # name in the folder
    sha256: str | None = None  # of the file, expected or not
    reason: str | None = None  # for messages


@dataclass(frozen=True)
class Counts:
    """Numbers of URLs in one run."""

    fetched: int = 0
    failed: int = 0
    other_file: int = 0
    known: int = 0  # done by an earlier run
    busy: int = 0  # left to the next run

    @property
    def done(self) -> int:
        """Number of URLs that this run is finished with."""
        return self.fetched + self.failed + self.other_file + self.known + self.busy


@dataclass
class Manifest:
    """The pictures in `folder`, by URL."""

    folder: Path
    entries: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read a folder's manifest; empty if there is none. Incomplete lines of an interrupted run are skipped."""
        manifest = cls(folder)
        if not (folder / MANIFEST).is_file():
            return manifest
        with (folder / MANIFEST).open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                    url = row.pop("url")
                    manifest.entries[url] = Entry(**row)
                except (ValueError, TypeError, KeyError, AttributeError):
                    continue
        return manifest

    def path(self, url: str, sha256: str | None = None) -> Path | None:
        """The file of a picture; None if it is missing or its hash is not `sha256`."""
        entry = self.entries.get(url)
        if entry is None or entry.outcome != OK or sha256 not in (None, entry.sha256):
            return None
        return self.folder / str(entry.file)

    def counts(self) -> dict[str, int]:
        """Numbers of URLs that are OK, FAILED and OTHER_FILE, over all runs."""
        counted = Counter(entry.outcome for entry in self.entries.values())
        return {outcome: counted[outcome] for outcome in (OK, FAILED, OTHER_FILE)}

    def settles(self, url: str, sha256: str | None, *, retry_failed: bool) -> bool:
        """Whether the URL need not be requested."""
        entry = self.entries.get(url)
        if entry is None:
            return False
        if entry.outcome == OK:
            return (self.folder / str(entry.file)).exists()
        if entry.outcome == OTHER_FILE and sha256 is None:  # now any file is accepted
            return False
        return not retry_failed


class _Job(NamedTuple):
    url: str
    sha256: str | None
    host: str


def fetch_images(
    wanted: Iterable[tuple[str, str | None]],
    folder: Path,
    *,
    jobs: int = 16,
    per_host: int = 2,
    retry_failed: bool = False,
    progress: Callable[[Counts], None] | None = None,
) -> Manifest:
    """Download every (URL, sha256 or None) of `wanted` into `folder`. Returns the manifest of the files.

    Can be interrupted at any time (KeyboardInterrupt included) and called again to continue.

    Args:
        wanted: may be a generator of millions. Each URL is requested once, even if it occurs several times.
        jobs: simultaneous requests. per_host: at most this many to the same host.
        retry_failed: also request URLs that failed permanently: missing, a web page or placeholder instead of the
            picture, or no answer to four tries. URLs of busy hosts are retried by every run.
        progress: called after each requested URL.

    Raises DownloadError if this machine is offline or the folder cannot be written.
    """
    manifest = Manifest.load(folder)
    run = _Run(manifest, retry_failed)
    waiting, running = _Waiting(per_host), 0
    jobs_left = run.jobs(wanted)
    with _open_log(folder) as log, _Crew(jobs, folder) as crew:
        while True:
            while len(waiting) < WINDOW and (job := next(jobs_left, None)):
                waiting.add(job)
            while running < jobs and (job := waiting.take()):
                crew.tasks.put(job)
                running += 1
            if not running:
                break
            job, entry, silent = crew.result()
            running -= 1
            waiting.finished(job)
            run.settle(job, entry, silent, log)
            if progress is not None:
                progress(run.counts)
        run.write_silent(log)
    return manifest


# --- one run ----------------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """The state of one call of `fetch_images`."""

    manifest: Manifest
    retry_failed: bool
    counts: Counts = Counts()
    silent: list[tuple[_Job, Entry]] = field(default_factory=list)  # without an answer, since the last answer

    def jobs(self, wanted: Iterable[tuple[str, str | None]]) -> Iterator[_Job]:
        seen: set[str] = set()
        for url, sha256 in wanted:
            if url in seen:
                continue
            seen.add(url)
            if self.manifest.settles(url, sha256, retry_failed=self.retry_failed):
                self.counts = replace(self.counts, known=self.counts.known + 1)
            else:
                yield _Job(url, sha256, _host(url))

    def settle(self, job: _Job, entry: Entry, silent: bool, log: IO[str]) -> None:
        name = {OK: "fetched", FAILED: "failed", OTHER_FILE: "other_file", _BUSY: "busy"}[entry.outcome]
        self.counts = replace(self.counts, **{name: getattr(self.counts, name) + 1})
        if silent:
            self.silent.append((job, entry))
            if len(self.silent) >= SILENT:
                self._check_online(entry)
                self.write_silent(log)
        else:
            self.write_silent(log)  # this machine is online, so these hosts did not answer
            if entry.outcome != _BUSY:
                self._write(job, entry, log)

    def _check_online(self, entry: Entry) -> None:
        hosts = len({job.host for job, _ in self.silent})
        if hosts >= SILENT_HOSTS:
            raise DownloadError(
                f"{len(self.silent)} URLs of {hosts} hosts in a row gave no answer, the last one: {entry.reason}. Is "
                "this machine offline? The next run continues with these URLs"
            )

    def write_silent(self, log: IO[str]) -> None:
        for job, entry in self.silent:
            self._write(job, entry, log)
        self.silent.clear()

    def _write(self, job: _Job, entry: Entry, log: IO[str]) -> None:
        self.manifest.entries[job.url] = entry
        known = {name: value for name, value in entry._asdict().items() if value is not None}
        log.write(json.dumps({"url": job.url, **known}) + "\n")
        log.flush()


def _open_log(folder: Path) -> IO[str]:
    path = folder / MANIFEST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # complete a cut line, or the next one is lost too
                    file.write(b"\n")
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise DownloadError(f"{path} cannot be written: {first_line(error)}") from error


# --- waiting URLs -----------------------------------------------------------------------------------------------------


@dataclass
class _Waiting:
    """URLs by host. Hosts take turns, each with at most `per_host` simultaneous requests."""

    per_host: int
    by_host: dict[str, deque[_Job]] = field(default_factory=dict)
    busy: Counter[str] = field(default_factory=Counter)
    ready: dict[str, None] = field(default_factory=dict)  # hosts that may be contacted, in turn
    length: int = 0

    def __len__(self) -> int:
        return self.length

    def add(self, job: _Job) -> None:
        self.by_host.setdefault(job.host, deque()).append(job)
        self.length += 1
        self._get_ready(job.host)

    def take(self) -> _Job | None:
        """The next one; None if all hosts are in use."""
        host = next(iter(self.ready), None)
        if host is None:
            return None
        del self.ready[host]
        job = self.by_host[host].popleft()
        self.length -= 1
        self.busy[host] += 1
        if not self.by_host[host]:
            del self.by_host[host]
        self._get_ready(host)
        return job

    def finished(self, job: _Job) -> None:
        self.busy[job.host] -= 1
        if not self.busy[job.host]:
            del self.busy[job.host]
        self._get_ready(job.host)

    def _get_ready(self, host: str) -> None:
        if host in self.by_host and self.busy[host] < self.per_host:
            self.ready.setdefault(host)


def _host(url: str) -> str:
    try:
        return urllib.parse.urlsplit(ascii_url(url)).netloc.rpartition("@")[2].lower()
    except FetchError:  # fetch_image reports the error
        return ""


# --- threads ----------------------------------------------------------------------------------------------------------


class _Crew:
    """Download threads. They are daemons, so that Ctrl-C does not wait for timeouts: files are written atomically."""

    def __init__(self, jobs: int, folder: Path) -> None:
        self.jobs, self.folder = jobs, folder
        self.tasks: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.results: queue.SimpleQueue[tuple[_Job, Entry, bool] | Exception] = queue.SimpleQueue()

    def __enter__(self) -> _Crew:
        for _ in range(self.jobs):
            threading.Thread(target=self._work, daemon=True).start()
        return self

    def __exit__(self, *raised: Any) -> None:
        for _ in range(self.jobs):
            self.tasks.put(None)

    def result(self) -> tuple[_Job, Entry, bool]:
        """(job, outcome, whether its host gave no answer). Raises DownloadError if the folder cannot be written."""
        result = self.results.get()
        if isinstance(result, OSError):
            raise DownloadError(f"{self.folder} cannot be written: {first_line(result)}") from result
        if isinstance(result, Exception):
            raise result
        return result

    def _work(self) -> None:
        while (job := self.tasks.get()) is not None:
            try:
                self.results.put((job, *_fetch(job, self.folder)))
            except Exception as error:  # raised by `result` in the caller's thread
                self.results.put(error)


def _fetch(job: _Job, folder: Path) -> tuple[Entry, bool]:
    try:
        path = fetch_image(job.url, job.sha256, folder)
        _check_picture(job.url, path)
    except BusyError as error:
        return Entry(_BUSY, reason=str(error)), False
    except FetchError as error:
        outcome = OTHER_FILE if isinstance(error, OtherFileError) else FAILED
        return Entry(outcome, reason=str(error)), isinstance(error, NoAnswerError)
    return Entry(OK, path.name, job.sha256 or hashlib.sha256(path.read_bytes()).hexdigest()), False


def _check_picture(url: str, path: Path) -> None:
    """Delete the file and raise FetchError, unless it is a picture: hosts send other files with status 200."""
    from PIL import Image

    try:
        with quiet_pillow(), Image.open(path) as image:
            pixels = image.width * image.height
    except Exception as error:  # Pillow's parsers raise many types on hostile headers
        fault = f"a file that Pillow cannot read: {type(error).__name__}"
    else:
        if 1 < pixels <= MAX_PIXELS:
            return
        # One pixel: as for page counters and deleted pictures.
        fault = "a placeholder of one pixel" if pixels == 1 else f"a picture of {pixels} pixels (limit: {MAX_PIXELS})"
    path.unlink(missing_ok=True)
    raise FetchError(f"{url} gives {fault}")
