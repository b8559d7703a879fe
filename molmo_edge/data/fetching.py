"""A picture by its URL: asked for politely, refused where something else than a picture comes."""

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

_MOST_BYTES = 100_000_000  # of a picture
_NOT_YET = 202  # accepted: the host goes on making the picture
_SLOW_DOWN = 429
_TRANSIENT = (408, 425, _SLOW_DOWN, 500, 502, 503, 504)  # HTTP statuses that may be another one in a moment
_PATIENCE = 60.0  # seconds; a host that asks for more is left alone
_DAY = 86_400.0
_AGENT = "Mozilla/5.0 (compatible; molmo-edge)"  # many hosts refuse Python's own

# Pictures that say that a picture is gone, with status 200: by where a host redirects to, and by their contents.
_PLACEHOLDER_URLS = re.compile(r"//i\.imgur\.com/removed\.png|/photo_unavailable(_\w+)?\.(png|gif|jpg)")
_PLACEHOLDERS = {
    "d835884373f4d6c8f24742ceabe74946": "Imgur's",  # md5: as its ETag says
    "35a0932c61e09a8c1cad9eec75b67a03602056463ed210310d2a09cf0b002ed5": "Reddit's",  # sha256
}


class FetchError(MolmoEdgeError):
    """A picture that its URL no longer gives. Links die: leave the row out, and count it."""


class NoAnswerError(FetchError):
    """The host did not answer, or was too busy: it may be gone, or this machine offline."""


class BusyError(NoAnswerError):
    """The host answers, and asks to be asked later: the picture may well be there."""


class OtherFileError(FetchError):
    """The URL gives a file, but not the one that it gave once."""


def fetch_image(url: str, sha256: str | None, folder: Path, *, pause: float = 1.0, timeout: float = 20.0) -> Path:
    """The file behind `url`, out of `folder` if it is there, else downloaded into it.

    `sha256`: of the file's bytes, lower case; None to take what comes, if it is neither a web page nor a placeholder
    that a host is known to send for what is gone. `pause`: seconds before the first of three retries, twice as many
    before each next, and no fewer than the host asks for in Retry-After; one that asks for more than a minute is not
    asked again. What fails for good (404, another hash) is not retried either, but the next call does.

    Raises FetchError: OtherFileError for another hash, NoAnswerError for a host that cannot be reached, BusyError for
    one that asks to wait.
    """
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):  # it becomes a file's name
        raise FetchError(f"{url} should have the sha256 {sha256!r}, which is none")
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
    whose = _PLACEHOLDERS.get(found) or _PLACEHOLDERS.get(md5)
    if whose is None and came_from != url and _PLACEHOLDER_URLS.search(came_from):
        whose = "its host's"
    if whose is not None:
        raise FetchError(f"{url} gives {whose} placeholder for a picture that is gone")
    if found == sha256:
        return
    if kind := kind_of_contents(data[:HEAD]):
        raise FetchError(f"{url} gives no picture, but {kind}")
    if sha256 is not None:
        raise OtherFileError(f"{url} gives another file than it did: its sha256 is not {sha256}")


# --- addresses --------------------------------------------------------------------------------------------------------


def ascii_url(url: str) -> str:
    """`url` as it is sent: an international host in punycode (IDNA), other characters beyond ASCII and spaces escaped.

    What is escaped already stays so. Raises FetchError for what is not an http or https address.
    """
    try:
        parts = urllib.parse.urlsplit(url.strip())
        host, port = parts.hostname or "", parts.port
    except ValueError as error:  # brackets without an end, a port that is no number
        raise FetchError(f"{url} is no http address: {first_line(error)}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise FetchError(f"{url} is no http address")
    try:
        host = _ascii_host(urllib.parse.unquote(host))
    except ValueError as error:
        raise FetchError(f"{url} names a host that cannot exist: {first_line(error)}") from None
    host = f"[{host}]" if ":" in host else host
    user = parts.netloc.rpartition("@")[0]
    place = (_escaped(user, "%:") + "@" if user else "") + host + ("" if port is None else f":{port}")
    path = _escaped(parts.path, "%/:@!$&'()*+,;=~[]") or "/"
    return urllib.parse.urlunsplit((parts.scheme, place, path, _escaped(parts.query, "%/:?@!$&'()*+,;=~[]"), ""))


def _ascii_host(host: str) -> str:
    if host.isascii():  # as it is: names with underscores are no IDNA, and exist
        if re.search(r"[\s/?#@\\%]", host):
            raise ValueError(f"{host!r} has characters that no name has")
        return host
    import idna

    return idna.encode(host, uts46=True).decode("ascii")  # as browsers do; Python's own is that of 2003


def _escaped(text: str, safe: str) -> str:
    return re.sub("%(?![0-9A-Fa-f]{2})", "%25", urllib.parse.quote(text, safe=safe))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """To international hosts, too; and to http and https alone."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        return super().redirect_request(req, fp, code, msg, headers, ascii_url(newurl))


# --- politeness -------------------------------------------------------------------------------------------------------


class _Again(Exception):  # noqa: N818 (a request, not a mistake)
    def __init__(self, error: NoAnswerError, after: float = 0.0) -> None:
        self.error, self.after = error, after  # what to raise where it was the last try; seconds that the host asks for


class _Hosts:
    """Hosts that have asked to be left alone, for all threads: until when, in `time.monotonic`."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._lock = threading.Lock()

    def leave(self, host: str, seconds: float) -> None:
        with self._lock:
            now = time.monotonic()
            self._until = {h: until for h, until in self._until.items() if until > now}
            if seconds:
                self._until[host] = max(now + seconds, self._until.get(host, now))

    def wait(self, host: str, seconds: float, url: str) -> None:
        """For as long as the host asks, and `seconds` at least. Raises BusyError where that is too long."""
        with self._lock:
            left = self._until.get(host, 0.0) - time.monotonic()
        if left > _PATIENCE:
            raise BusyError(f"{url} was not asked for: its host asks to wait {left:.0f} s more. Ask again later")
        if (longest := max(seconds, left)) > 0:
            time.sleep(longest)


_HOSTS = _Hosts()


def _get(url: str, pause: float, timeout: float) -> tuple[bytes, str]:
    """(the file, the URL that it came from in the end)."""
    address, wait = ascii_url(url), 0.0
    host = urllib.parse.urlsplit(address).netloc.rpartition("@")[2]
    for following in (pause, 2 * pause, 4 * pause, None):
        _HOSTS.wait(host, wait, url)
        try:
            return _ask(url, address, timeout)
        except _Again as again:
            _HOSTS.leave(host, again.after)
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
            if response.length and len(data) <= _MOST_BYTES:  # read() with a limit does not mind a cut
                raise http.client.IncompleteRead(data, response.length)
            came_from: str = response.geturl()
    except urllib.error.HTTPError as error:
        with error:
            if error.code in _TRANSIENT:
                raise _Again(*_busy(url, error.code, error.headers)) from error
            raise FetchError(f"{url} cannot be fetched: HTTP status {error.code}") from error
    except ValueError as error:  # an address that cannot be one
        raise FetchError(f"{url} cannot be fetched: {first_line(error)}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Again(NoAnswerError(f"{url} cannot be fetched: {first_line(error)}")) from error
    if len(data) > _MOST_BYTES:
        raise FetchError(f"{url} gives more than {_MOST_BYTES} bytes, too many for a picture")
    return data, came_from


def _busy(url: str, status: int, headers: Message) -> tuple[NoAnswerError, float]:
    after = _retry_after(headers)
    says = f"{url} cannot be fetched: HTTP status {status}"
    if after > _PATIENCE:
        return BusyError(f"{says}, and its host asks to wait {after:.0f} s. Ask again later"), after
    return (BusyError if status in (_NOT_YET, _SLOW_DOWN) else NoAnswerError)(says), after


def _retry_after(headers: Message) -> float:
    """Seconds, of a number of them or a date (RFC 9110, 10.2.3); 0 where nothing is said."""
    text = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
        return min(float(text), _DAY)
    until, now = _date(text), _date(headers.get("Date") or "") or datetime.now(timezone.utc)  # by the host's own clock
    return min(max(0.0, (until - now).total_seconds()), _DAY) if until else 0.0


def _date(text: str) -> datetime | None:
    with contextlib.suppress(ValueError, TypeError, IndexError, OverflowError):  # by Python's version
        date = email.utils.parsedate_to_datetime(text)
        return date if date.tzinfo else date.replace(tzinfo=timezone.utc)
    return None
