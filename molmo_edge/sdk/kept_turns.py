"""Keys and values of the turns of a conversation, which its next turn goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from molmo_edge.runtimes.protocol import check_copy

if TYPE_CHECKING:
    from molmo_edge.runtimes.protocol import Cache, Runtime, StoredCache, StoringRuntime


@dataclass(eq=False)
class HostCache:
    """Keys and values in main memory, outside the engine. A Cache that is full and does not run: copy it to go on."""

    runtime: StoringRuntime
    arrays: dict[str, np.ndarray]
    length: int

    @property
    def capacity(self) -> int:
        """The number of filled positions."""
        return self.length

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def copy(self, capacity: int | None = None) -> Cache:
        """A cache of the engine with the same contents. `capacity`: see `molmo_edge.runtimes.Cache`."""
        return self.runtime.load_cache(self.arrays, self.length, check_copy(self, capacity))


@dataclass(frozen=True, eq=False)
class Turns:
    """The ids of turns about a scene, and a cache that holds both."""

    ids: np.ndarray  # int32 [n], after the scene
    cache: Cache  # filled with the scene and `ids`

    def common(self, ids: np.ndarray) -> int:
        """How many of the first ids are equal."""
        shorter = min(len(self.ids), len(ids))
        differ = np.flatnonzero(self.ids[:shorter] != ids[:shorter])
        return int(differ[0]) if len(differ) else shorter

    def with_room(self, capacity: int) -> Turns:
        """These turns, in a cache of at least `capacity` positions: their own, if it is large enough."""
        return self if self.cache.capacity >= capacity else Turns(self.ids, self.cache.copy(capacity))

    def first(self, n: int, capacity: int) -> Turns:
        """A copy with the first `n` ids, in a cache of at least `capacity` positions."""
        cache = self.cache.copy(max(capacity, self.cache.length))
        cache.length -= len(self.ids) - n
        return Turns(self.ids[:n], cache)

    def apart(self, runtime: Runtime) -> Turns:
        """These turns in a cache that occupies no memory of another one. `runtime`: of their cache."""
        if not getattr(runtime, "caches_share_memory", False):
            return self
        arrays = cast("StoredCache", self.cache).arrays()
        return Turns(self.ids, HostCache(cast("StoringRuntime", runtime), arrays, self.cache.length))


class TurnStore(Protocol):
    """Keeps the turns of conversations about one scene."""

    def take(self, ids: np.ndarray, capacity: int) -> Turns | None:
        """Turns that `ids` begin with, at least one id and not all, for the caller alone; None if there are none.

        Their cache has at least `capacity` positions.
        """
        ...

    def put(self, turns: Turns) -> None:
        """Keep `turns`, whose cache the caller does not use any more."""
        ...
