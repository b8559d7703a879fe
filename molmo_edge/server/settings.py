"""What a server accepts and how much of it."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from molmo_edge.errors import MolmoEdgeError


class ServerError(MolmoEdgeError):
    """Invalid settings of a server, or an address that it cannot listen on."""


@dataclass(frozen=True)
class Settings:
    """Settings of a server. Raises ServerError for a value out of range."""

    host: str = "127.0.0.1"
    port: int = 8080  # 0: any free port
    api_key: str | None = None  # None: no key is needed
    image_hosts: tuple[str, ...] = ()  # "example.org" or "example.org:8443": where remote images may come from
    server_names: tuple[str, ...] = ()  # further names in the header Host of a server that listens on loopback
    cors_origins: tuple[str, ...] = ()  # "https://app.example.org": pages that may call the server from a browser
    max_queue: int = 64  # requests at a time, the running one included; more are answered with 429
    max_body: int = 20_000_000  # bytes of a request, and of a remote image
    max_pixels: int = 50_000_000  # of one image
    max_images: int = 8  # of one request
    timeout: float = 300.0  # seconds from a complete request to the end of its answer
    upload_timeout: float = 30.0  # seconds for a request to arrive, and for a remote image
    scene_bytes: int = 1_000_000_000  # memory of scenes and conversations that later questions go on from
    drain: float = 30.0  # seconds that answers have to finish when the server stops
    access_log: bool = False  # log method, path, status and time of each request at level INFO

    def __post_init__(self) -> None:
        for name in ("max_queue", "max_body", "max_pixels", "max_images"):
            if getattr(self, name) < 1:
                raise ServerError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("timeout", "upload_timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ServerError(f"{name} must be a positive number of seconds, not {getattr(self, name)}")
        if not 0 <= self.port <= 65535:
            raise ServerError(f"port must be from 0 to 65535, not {self.port}")
        if self.scene_bytes < 0 or not 0 <= self.drain < float("inf"):
            raise ServerError("scene_bytes and drain must be 0 or more")
        if self.api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", self.api_key):
            raise ServerError("the API key must consist of visible ASCII characters, without spaces")

    @property
    def on_loopback(self) -> bool:
        """Whether only programs on this machine can connect."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
