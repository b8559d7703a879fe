"""A runtime that several threads share."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from molmo_edge.runtimes import forks

if TYPE_CHECKING:
    from molmo_edge.config import MolmoConfig
    from molmo_edge.frontend.crops import Overview
    from molmo_edge.runtimes.protocol import BatchRuntime, Cache, Runtime


class SerialRuntime:
    """A runtime that runs one call at a time: engines share threads and scratch memory, and some are not re-entrant.

    The lock covers a call, not an answer: two streams advance side by side.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._inner = runtime
        self._lock = threading.Lock()
        forks.on_fork(self)

    def forked(self) -> None:
        self._lock = threading.Lock()  # a thread that does not exist in the child may have held the old one

    @property
    def config(self) -> MolmoConfig:
        return self._inner.config

    @property
    def engine(self) -> str:
        return self._inner.engine

    def encode_image(
        self,
        crops: np.ndarray,
        masks: np.ndarray,
        overview: Overview | None = None,
        pooling: np.ndarray | None = None,
    ) -> np.ndarray:
        with self._lock:
            return self._inner.encode_image(crops, masks, overview, pooling)

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        with self._lock:
            return self._inner.embed(token_ids)

    def new_cache(self, capacity: int) -> Cache:
        with self._lock:
            return self._inner.new_cache(capacity)

    def forward(self, embeddings: np.ndarray, cache: Cache) -> np.ndarray:
        with self._lock:
            return self._inner.forward(embeddings, cache)

    @property
    def batches(self) -> bool:
        """Whether the runtime is a BatchRuntime."""
        return hasattr(self._inner, "prefill_batch")

    def prefill_batch(self, prompts: Sequence[np.ndarray], room: int) -> tuple[np.ndarray, Any]:
        with self._lock:
            return cast("BatchRuntime", self._inner).prefill_batch(prompts, room)

    def forward_batch(self, embeddings: np.ndarray, batch: Any) -> np.ndarray:
        with self._lock:
            return cast("BatchRuntime", self._inner).forward_batch(embeddings, batch)

    def close(self) -> None:
        with self._lock:
            self._inner.close()
