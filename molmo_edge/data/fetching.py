"""Download a picture by URL: respecting Retry-After, and only if the response is a picture.

urllib instead of a library, because the rules for retries, waiting and unusual addresses are most of the work.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import http.client
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from datetime import datetime, timezone
from email.message import Message
from pathlib import Path
from typing import IO, Any

from molmo_edge.errors import MolmoEdgeError, first_line
from molmo_edge.frontend.unsupported_inputs import HEAD, kind_of_contents
from molmo_edge.system.files import atomic_write

_MOST_BYTES = 100_000_000  # per picture
_NOT_YET = 202  # accepted: the host is still preparing the picture
_SLOW_DOWN = 429
_TRANSIENT = (408, 425, _SLOW_DOWN, 500, 502, 503, 504)  # HTTP statuses that may be temporary
_PATIENCE = 60.0  # seconds; no retry if the host asks for a longer wait
_DAY = 86_400.0
_AGENT = "Mozilla/5.0 (compatible; molmo-edge)"  # many hosts refuse Python's default

# Placeholders for deleted pictures, sent with status 200: by redirection target and by contents.
_PLACEHOLDER_URLS = re.compile(r"//i\.imgur\.com/removed\.png|/photo_unavailable(_\w+)?\.(png|gif|jpg)")
PLACEHOLDERS = {
    "d835884373f4d6c8f24742ceabe74946": "Imgur's",  # MD5, from its ETag
    "35a0932c61e09a8c1cad9eec75b67a03602056463ed210310d2a09cf0b002ed5": "Reddit's",  # SHA-256
}


class FetchError(MolmoEdgeError):
    """The URL does not give the picture (any more). Leave the row out, and count it."""


class NoAnswerError(FetchError):
    """The host did not answer or was overloaded: it may be gone, or this machine may be offline."""


class BusyError(NoAnswerError):
    """The host asks to retry later: the picture may exist."""


class OtherFileError(FetchError):
    """The URL gives a file with another hash than the expected one."""


def fetch_image(url: str, sha256: str | None, folder: Path, *, pause: float = 1.0, timeout: float = 20.0) -> Path:
    """Download `url` into `folder`, unless the file is already there. Returns its path.

    Args:
        sha256: lower-case hash of the file. None: accept any file, except web pages and known placeholders for deleted
            pictures.
        pause: seconds before the first of three retries; doubles with each, and is at least the host's Retry-After. If
            the host asks for more than a minute, or the failure is permanent (404, another hash), there is no retry.

    Raises FetchError: OtherFileError for another hash, NoAnswerError for an unreachable host, BusyError for a host that
    asks to wait.
    """
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):  # used as a file name
        raise FetchError(f"{url}: {sha256!r} is not a lower-case SHA-256 hash")
    path = folder / (sha256 or hashlib.sha256(url.encode()).hexdigest())
    if path.exists():
        return path
    data, came_from = _get(url, pause, timeout)
    _check_contents(url, data, came_from, sha256)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        part.write_bytes(data)
    return path


def _check_contents(url: str, data: bytes, came_from: str, sha256: str | None) -> None:
    found = hashlib.sha256(data).hexdigest()
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    whose = PLACEHOLDERS.get(found) or PLACEHOLDERS.get(md5)
    if whose is None and came_from != url and _PLACEHOLDER_URLS.search(came_from):
        whose = "its host's"
    if whose is not None:
        raise FetchError(f"{url} returns {whose} placeholder for a deleted picture")
    if found == sha256:
        return
    if kind := kind_of_contents(data[:HEAD]):
        raise FetchError(f"{url} returns {kind} instead of a picture")
    if sha256 is not None:
        raise OtherFileError(f"{url} returns a different file than expected: its SHA-256 is not {sha256}")


# --- addresses --------------------------------------------------------------------------------------------------------


def ascii_url(url: str) -> str:
    """`url` in ASCII: international host names in Punycode (IDNA), other characters and spaces percent-encoded.

    Existing escapes are kept. Raises FetchError if `url` is not an http or https address.
    """
    try:
        parts = urllib.parse.urlsplit(url.strip())
        host, port = parts.hostname or "", parts.port
    except ValueError as error:  # an unclosed bracket, or an invalid port
        raise FetchError(f"{url} is not an http address: {first_line(error)}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise FetchError(f"{url} is not an http address")
    try:
        host = _ascii_host(urllib.parse.unquote(host))
    except ValueError as error:
        raise FetchError(f"{url} has an invalid host name: {first_line(error)}") from None
    host = f"[{host}]" if ":" in host else host
    user = parts.netloc.rpartition("@")[0]
    place = (_escaped(user, "%:") + "@" if user else "") + host + ("" if port is None else f":{port}")
    path = _escaped(parts.path, "%/:@!$&'()*+,;=~[]") or "/"
    return urllib.parse.urlunsplit((parts.scheme, place, path, _escaped(parts.query, "%/:?@!$&'()*+,;=~[]"), ""))


def _ascii_host(host: str) -> str:
    if host.isascii():  # unchanged: names with underscores exist, but IDNA rejects them
        if re.search(r"[\s/?#@\\%]", host):
            raise ValueError(f"{host!r} has invalid characters")
        return host
    import idna

    return idna.encode(host, uts46=True).decode("ascii")  # like browsers; Python's codec implements IDNA 2003


def _escaped(text: str, safe: str) -> str:
    return re.sub("%(?![0-9A-Fa-f]{2})", "%25", urllib.parse.quote(text, safe=safe))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects to http and https addresses only, including international host names."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        return super().redirect_request(req, fp, code, msg, headers, ascii_url(newurl))


# --- politeness -------------------------------------------------------------------------------------------------------


class _Again(Exception):  # noqa: N818 (control flow, not an error)
    def __init__(self, error: NoAnswerError, after: float = 0.0) -> None:
        self.error, self.after = (
            error,
            after,
        )  # the error to raise after the last try; seconds that the host asks to wait


class Hosts:
    """Until when (in `time.monotonic`) hosts have asked to wait. Shared by all threads."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._lock = threading.Lock()

    def leave(self, host: str, seconds: float) -> None:
        """Do not contact `host` for `seconds`."""
        with self._lock:
            now = time.monotonic()
            self._until = {h: until for h, until in self._until.items() if until > now}
            if seconds:
                self._until[host] = max(now + seconds, self._until.get(host, now))

    def wait(self, host: str, seconds: float, url: str) -> None:
        """Sleep for as long as the host asks, at least `seconds`. Raises BusyError if that is too long."""
        with self._lock:
            left = self._until.get(host, 0.0) - time.monotonic()
        if left > _PATIENCE:
            raise BusyError(f"{url} was not requested: its host asks to wait {left:.0f} s more. Try again later")
        if (longest := max(seconds, left)) > 0:
            time.sleep(longest)


HOSTS = Hosts()


def _get(url: str, pause: float, timeout: float) -> tuple[bytes, str]:
    """(the file's contents, the final URL)."""
    address, wait = ascii_url(url), 0.0
    host = urllib.parse.urlsplit(address).netloc.rpartition("@")[2]
    for following in (pause, 2 * pause, 4 * pause, None):
        HOSTS.wait(host, wait, url)
        try:
            return _ask(url, address, timeout)
        except _Again as again:
            HOSTS.leave(host, again.after)
            if following is None or again.after > _PATIENCE:
                raise again.error from again.__cause__
            wait = max(following, again.after)
    raise AssertionError("unreachable: the last try raises or returns")


def _ask(url: str, address: str, timeout: float) -> tuple[bytes, str]:
    request = urllib.request.Request(address, headers={"User-Agent": _AGENT})
    try:
        with urllib.request.build_opener(_Redirects).open(request, timeout=timeout) as response:
            if response.status == _NOT_YET:
                raise _Again(*_busy(url, _NOT_YET, response.headers))
            data: bytes = response.read(_MOST_BYTES + 1)
            if response.length and len(data) <= _MOST_BYTES:  # read(limit) does not detect a truncated body
                raise http.client.IncompleteRead(data, response.length)
            came_from: str = response.geturl()
    except urllib.error.HTTPError as error:
        with error:
            if error.code in _TRANSIENT:
                raise _Again(*_busy(url, error.code, error.headers)) from error
            raise FetchError(f"{url} cannot be fetched: HTTP status {error.code}") from error
    except ValueError as error:  # an invalid address
        raise FetchError(f"{url} cannot be fetched: {first_line(error)}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Again(NoAnswerError(f"{url} cannot be fetched: {first_line(error)}")) from error
    if len(data) > _MOST_BYTES:
        raise FetchError(f"{url} gives more than {_MOST_BYTES} bytes: too large for a picture")
    return data, came_from


def _busy(url: str, status: int, headers: Message) -> tuple[NoAnswerError, float]:
    after = retry_after(headers)
    says = f"{url} cannot be fetched: HTTP status {status}"
    if after > _PATIENCE:
        return BusyError(f"{says}, and its host asks to wait {after:.0f} s. Try again later"), after
    return (BusyError if status in (_NOT_YET, _SLOW_DOWN) else NoAnswerError)(says), after


def retry_after(headers: Message) -> float:
    """The header Retry-After (RFC 9110, 10.2.3) in seconds: a number or a date; 0 if it is missing or invalid."""
    text = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
        return min(float(text), _DAY)
    until, now = _date(text), _date(headers.get("Date") or "") or datetime.now(timezone.utc)  # by the host's clock
    return min(max(0.0, (until - now).total_seconds()), _DAY) if until else 0.0


def _date(text: str) -> datetime | None:
    with contextlib.suppress(ValueError, TypeError, IndexError, OverflowError):  # depending on Python's version
        date = email.utils.parsedate_to_datetime(text)
        return date if date.tzinfo else date.replace(tzinfo=timezone.utc)
    return None
