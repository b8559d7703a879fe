"""What the server measures, in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, CPU time and open files of the process
        self._requests = Counter(
            "molmo_edge_requests", "Requests that were answered.", ["endpoint", "status"], registry=registry
        )
        self._seconds = Histogram(
            "molmo_edge_request_seconds",
            "Time from the first byte of a request to the last of its answer.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._first = Histogram(
            "molmo_edge_first_token_seconds",
            "Time from the start of the work on a question to its first token, without the queue.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._tokens = Counter(
            "molmo_edge_tokens",
            'Tokens: "prompt" (images included), "cached" (those of the prompt that did not run again), "generated".',
            ["kind"],
            registry=registry,
        )
        self._scenes = Counter(
            "molmo_edge_scenes",
            'Questions about pictures, by whether their scene was kept: "yes" in memory, "disk", or "no".',
            ["cached"],
            registry=registry,
        )

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge that calls `value`."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Record the time to the first token."""
        self._first.observe(seconds)

    def answered(self, prompt: int, cached: int, generated: int) -> None:
        """Count the tokens of an answer."""
        for kind, number in (("prompt", prompt), ("cached", cached), ("generated", generated)):
            self._tokens.labels(kind).inc(number)

    def scene(self, found: Literal["yes", "disk", "no"]) -> None:
        """Count a question about a picture, by where its scene was found."""
        self._scenes.labels(found).inc()

    def text(self) -> bytes:
        """All metrics, as a scraper of Prometheus reads them."""
        text: bytes = generate_latest(self.registry)
        return text
