"""Keys and values of the turns of a conversation, which its next turn goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from molmo_edge.runtimes.protocol import Cache


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
