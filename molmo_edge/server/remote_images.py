"""Fetch an image from a host that the server's owner allowed by name.

A request must not reach what only this machine can reach. Therefore a URL is fetched only if its host is on the list,
if all addresses that the name has now are public, and from one of the addresses that were checked: a name that resolves
to another address a moment later changes nothing. Redirects are followed within the list only. Proxies of the
environment are not used.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

import idna

from molmo_edge.server.errors import ApiError, bad_request
from molmo_edge.system.version import __version__

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
MAX_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
_NAT64 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))


def is_public(address: Address) -> bool:
    """Whether `address`, and the IPv4 address that an IPv6 form contains, belongs to the public internet."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is not None:
            return is_public(inner)
        # 64:ff9b::/96 reaches any IPv4 address through a gateway, and ::/96 is how old stacks wrote them.
        if any(address in network for network in _NAT64) or int(address) < 1 << 32 or address.is_site_local:
            return False
    return address.is_global and not (
        address.is_multicast or address.is_reserved or address.is_loopback or address.is_link_local
    )


def resolve(host: str, port: int) -> list[Address]:
    """All addresses of a host. Raises OSError if it has none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # A scope ("fe80::1%eth0") exists on link-local addresses only.
    return [ipaddress.ip_address(str(place[0]).partition("%")[0]) for *_, place in found]


@dataclass(frozen=True)
class RemoteImages:
    """Fetches images over http and https. `hosts`: names, with a port if it is not the scheme's."""

    hosts: Sequence[str] = ()
    max_bytes: int = 20_000_000
    seconds: float = 30.0  # for everything together, redirects included
    resolve: Callable[[str, int], list[Address]] = resolve
    public: Callable[[Address], bool] = is_public

    def fetch(self, url: str) -> bytes:
        """Return the contents of `url`. Blocks; raises ApiError for what is not allowed, missing or too large."""
        deadline = time.monotonic() + self.seconds
        for _ in range(MAX_REDIRECTS + 1):
            parts, host, port = self._allowed(url)
            address = self._checked_address(host, port)
            try:
                moved, data = self._get(parts, host, port, address, deadline)
                if moved is None:
                    return data
                url = urljoin(url, moved)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise bad_request(f"the image at {host} could not be fetched ({type(error).__name__})") from error
        raise bad_request("the image URL redirects too often")

    def _allowed(self, url: str) -> tuple[SplitResult, str, int]:
        """The parts of `url`, its host in ASCII, and its port."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise bad_request("the image URL is invalid") from None
        if parts.scheme not in _PORTS:
            raise bad_request('an image URL must begin with "data:image/", or "https://" for an allowed host')
        if not self.hosts:
            raise bad_request(
                "this server fetches no images from the network: send the image as a data URI "
                "(data:image/jpeg;base64,...), or start the server with --allow-host"
            )
        if parts.username is not None or parts.password is not None or any(ord(c) <= 32 or ord(c) > 126 for c in url):
            raise bad_request("an image URL must not contain a user name, spaces or characters outside of ASCII")
        host = ascii_host(parts.hostname or "")
        port = _PORTS[parts.scheme] if port is None else port
        named = {host, f"{host}:{port}"} if port == _PORTS[parts.scheme] else {f"{host}:{port}"}
        if not host or named.isdisjoint(known.lower() for known in self.hosts):
            raise bad_request("this server fetches no images from that host: its owner can allow it with --allow-host")
        return parts, host, port

    def _checked_address(self, host: str, port: int) -> Address:
        try:
            addresses = self.resolve(host, port)
        except (OSError, UnicodeError, ValueError):
            addresses = []
        if not addresses:
            raise bad_request(f"the host {host} has no address")
        if not all(self.public(address) for address in addresses):
            raise bad_request(f"the host {host} has an address that is not public: images are not fetched from there")
        return addresses[0]

    def _get(
        self, parts: SplitResult, host: str, port: int, address: Address, deadline: float
    ) -> tuple[str | None, bytes]:
        """(where it moved, nothing) or (None, the contents)."""
        sock = socket.create_connection((str(address), port), timeout=_left(deadline))
        # A timeout of the socket starts anew with each byte that arrives. TLS moves the connection to another object.
        watchdog = threading.Timer(_left(deadline), lambda: _hang_up(sock))
        watchdog.daemon = True
        watchdog.start()
        try:
            if parts.scheme == "https":
                context = ssl.create_default_context()
                sock = secure = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
                _left(deadline)  # the watchdog may have rung while neither object had the connection
                secure.do_handshake()
            connection = http.client.HTTPConnection(host, port)
            connection.sock = sock
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            headers = {"Accept": "image/*", "User-Agent": f"molmo-edge/{__version__}", "Connection": "close"}
            connection.request("GET", path, headers={"Host": parts.netloc, **headers})
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308):
                if (moved := response.getheader("Location")) is None:
                    raise bad_request("the image URL redirects to nowhere")
                return moved, b""
            if response.status != 200:
                raise bad_request(f"the image URL answered with status {response.status}")
            data = response.read(self.max_bytes + 1)
            _left(deadline)  # a connection that the watchdog ended looks complete
            if len(data) > self.max_bytes:
                raise ApiError(413, f"the image has more than {self.max_bytes} bytes: scale it down")
            if response.length:
                raise http.client.IncompleteRead(data)
            return None, data
        finally:
            watchdog.cancel()
            sock.close()


def ascii_host(host: str) -> str:
    """A host name in lower case and ASCII, without its final dot; "" if it is not one."""
    try:
        return idna.encode(host, uts46=True).decode().rstrip(".") if not host.isascii() else host.lower().rstrip(".")
    except idna.IDNAError:
        return ""


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # already closed
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # that of SSLSocket would end TLS, and the rest be read without


def _left(deadline: float) -> float:
    """Seconds to the deadline. Raises TimeoutError after it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the image did not arrive in time")
    return left
