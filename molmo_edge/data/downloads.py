"""Pictures of a data set by URL: fetched politely, many at a time, and never asked for twice.

A download of a million pictures takes days and is killed on the way. So what became of each URL is written down at
once, one line of JSON each, in the folder's manifest: the next run goes on from there, and a data set reads from it
which of its pictures there are. Reference: olmo/data/download_urls.py::download_pixmo_urls, which writes the reason of
a failure into a file in the picture's place.
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
_BUSY = "busy"  # its host asks to be asked later: not written down, so that the next run does

_WINDOW = 10_000  # URLs read ahead, so that there are other hosts to ask where one has many in a row
# So many URLs of so many hosts without any answer in between: this machine is offline, the links are not dead.
_SILENT, _SILENT_HOSTS = 100, 10


class DownloadError(MolmoEdgeError):
    """A download that cannot go on, or a folder without one."""


class Entry(NamedTuple):
    """What became of one URL."""

    outcome: str  # OK, FAILED for good, or OTHER_FILE: another hash than the data set has
    file: str | None = None  # its name in the folder
    sha256: str | None = None  # of the file's bytes, whether or not one was wanted
    reason: str | None = None  # for people


@dataclass(frozen=True)
class Counts:
    """Of one run, in URLs."""

    fetched: int = 0
    failed: int = 0
    other_file: int = 0
    known: int = 0  # settled by an earlier run
    busy: int = 0  # to be asked for by the next one

    @property
    def done(self) -> int:
        return self.fetched + self.failed + self.other_file + self.known + self.busy


@dataclass
class Manifest:
    """The pictures in `folder`, by URL."""

    folder: Path
    entries: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """As far as it was written; empty where there is none.

        A line that a killed run has cut short is passed over: its URL counts as not asked for.
        """
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
        """The picture's file; None where it is not there, or has another hash than the one wanted."""
        entry = self.entries.get(url)
        if entry is None or entry.outcome != OK or sha256 not in (None, entry.sha256):
            return None
        return self.folder / str(entry.file)

    def counts(self) -> dict[str, int]:
        """Of all runs: how many URLs are OK, FAILED, OTHER_FILE."""
        counted = Counter(entry.outcome for entry in self.entries.values())
        return {outcome: counted[outcome] for outcome in (OK, FAILED, OTHER_FILE)}

    def settles(self, url: str, sha256: str | None, *, retry_failed: bool) -> bool:
        """Whether there is nothing to ask for."""
        entry = self.entries.get(url)
        if entry is None:
            return False
        if entry.outcome == OK:
            return (self.folder / str(entry.file)).exists()
        if entry.outcome == OTHER_FILE and sha256 is None:  # any file would do now
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
    """Fetch every (URL, sha256 of its bytes or None) into `folder`; the manifest says where each one is.

    `jobs` are asked for at once, of one host at most `per_host`. A URL is asked for once, however often it is wanted;
    one that failed for good (gone, a web page or a placeholder in its place, no answer to four tries) only with
    `retry_failed`; one whose host was busy to the end by the next run. `wanted` may be
    a generator of millions. `progress` hears after every URL that was asked for. May be stopped at any time, with
    KeyboardInterrupt too, and started again. Raises DownloadError where nothing can be fetched or written any more.
    """
    manifest = Manifest.load(folder)
    run = _Run(manifest, retry_failed)
    waiting, running = _Waiting(per_host), 0
    jobs_left = run.jobs(wanted)
    with _open_log(folder) as log, _Crew(jobs, folder) as crew:
        while True:
            while len(waiting) < _WINDOW and (job := next(jobs_left, None)):
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
    """What is asked for, and what has come of it."""

    manifest: Manifest
    retry_failed: bool
    counts: Counts = Counts()
    silent: list[tuple[_Job, Entry]] = field(default_factory=list)  # without an answer, since there last was one

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
            if len(self.silent) >= _SILENT:
                self._ask_whether_offline(entry)
                self.write_silent(log)
        else:
            self.write_silent(log)  # someone answers, so these did not
            if entry.outcome != _BUSY:
                self._write(job, entry, log)

    def _ask_whether_offline(self, entry: Entry) -> None:
        hosts = len({job.host for job, _ in self.silent})
        if hosts >= _SILENT_HOSTS:
            raise DownloadError(
                f"{len(self.silent)} addresses of {hosts} hosts in a row gave no answer, the last one so: "
                f"{entry.reason}. Is this machine offline? They are asked again by the next run, which goes on from "
                "here"
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
                if file.read(1) != b"\n":  # or the next line would be lost with the one that was cut short
                    file.write(b"\n")
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise DownloadError(f"{path} cannot be written: {first_line(error)}") from error


# --- who may be asked now -------------------------------------------------------------------------------------------


@dataclass
class _Waiting:
    """URLs by host, so that no host is asked for more than `per_host` at once, and all have their turn."""

    per_host: int
    by_host: dict[str, deque[_Job]] = field(default_factory=dict)
    busy: Counter[str] = field(default_factory=Counter)
    ready: dict[str, None] = field(default_factory=dict)  # hosts that may be asked, in turn
    length: int = 0

    def __len__(self) -> int:
        return self.length

    def add(self, job: _Job) -> None:
        self.by_host.setdefault(job.host, deque()).append(job)
        self.length += 1
        self._get_ready(job.host)

    def take(self) -> _Job | None:
        """The next one, None where all hosts are busy."""
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
    except FetchError:  # fetch_image says what is wrong with it
        return ""


# --- who asks ---------------------------------------------------------------------------------------------------------


class _Crew:
    """Threads that fetch. Daemons, so that Ctrl-C ends the program and does not wait for a host's timeout: a picture
    gets its name only when it is whole."""

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
        """(job, what became of it, whether its host gave no answer). Raises DownloadError for a full disk."""
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
            except Exception as error:  # the caller's to raise: in a thread, nobody would hear
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
    """A host that has lost a picture may send a page that says so, as if all were well."""
    from PIL import Image

    try:
        with quiet_pillow(), Image.open(path) as image:
            pixels = image.width * image.height
    except Exception as error:  # hostile headers make Pillow's parsers raise nearly anything
        path.unlink(missing_ok=True)
        raise FetchError(f"{url} gives no picture that Pillow can read: {type(error).__name__}") from error
    if pixels == 1:  # what counters and removed pictures leave
        path.unlink(missing_ok=True)
        raise FetchError(f"{url} gives a placeholder of one pixel")
    if not 0 < pixels <= MAX_PIXELS:
        path.unlink(missing_ok=True)
        raise FetchError(f"{url} gives a picture of {pixels} pixels, the most are {MAX_PIXELS}")
