"""Encoded images and conversations about them, kept for the next question."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from molmo_edge.config import DecoderConfig
from molmo_edge.sdk.engine import Scene
from molmo_edge.sdk.kept_turns import HostCache, Turns

MAX_CONVERSATIONS = 64


@dataclass(frozen=True, eq=False)
class _Kept:
    """A conversation about the scene of `key`."""

    key: Hashable
    turns: Turns
    bytes: int


class SceneCache:
    """The scenes and conversations that were used last, within one limit on their memory.

    Conversations make room first: their turns can run again without vision. The newest conversation stays while there
    are older scenes than its own, and never without its scene. What alone is above the limit is not kept. Threads may
    share the cache.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._scenes: OrderedDict[Hashable, tuple[Scene, int]] = OrderedDict()
        self._kept: list[_Kept] = []  # the newest last
        self._lock = threading.Lock()
        self.bytes = 0  # of the scenes
        self.turn_bytes = 0  # of the conversations

    def __len__(self) -> int:
        return len(self._scenes)

    @property
    def conversations(self) -> int:
        """The number of kept conversations."""
        return len(self._kept)

    def get(self, key: Hashable) -> Scene | None:
        """The scene that was put under `key`, if it is still here."""
        with self._lock:
            if key not in self._scenes:
                return None
            self._scenes.move_to_end(key)
            return self._scenes[key][0]

    def put(self, key: Hashable, scene: Scene) -> None:
        """Keep a scene, and forget what was not used for longest."""
        size = scene_bytes(scene)
        if size > self._max_bytes:
            return
        with self._lock:
            if key in self._scenes:
                self.bytes -= self._scenes.pop(key)[1]
            self._scenes[key] = scene, size
            self.bytes += size
            self._make_room()

    def take(self, key: Hashable, ids: np.ndarray, capacity: int) -> Turns | None:
        """See TurnStore, for conversations about the scene of `key`."""
        with self._lock:
            found = [(kept.turns.common(ids[:-1]), kept) for kept in self._kept if kept.key == key]
            common, best = max(found, key=lambda pair: pair[0], default=(0, None))
            if best is None or common == 0:
                return None
            self._kept.remove(best)
            if common == len(best.turns.ids):  # the answer goes on from these turns, and comes back with them
                self.turn_bytes -= best.bytes
                return best.turns.with_room(capacity)
            self._kept.append(best)
            return best.turns.first(common, capacity)

    def keep(self, key: Hashable, turns: Turns, scene: Scene) -> None:
        """Keep a conversation about `scene`, which is under `key`, and forget what was not used for longest.

        Without its scene, a conversation about images is not kept: vision would run again.
        """
        if scene.shown.images and key not in self._scenes:
            return
        try:
            turns = turns.apart(scene.engine.runtime)
        except MemoryError:  # the turns run again
            return
        size = _turn_bytes(turns, scene)
        if size > self._max_bytes:
            return
        with self._lock:
            for kept in [kept for kept in self._kept if kept.key == key]:
                common = kept.turns.common(turns.ids)
                if common == len(turns.ids) < len(kept.turns.ids):
                    return  # a longer one begins with these turns
                if common == len(kept.turns.ids):
                    self._forget(kept)
            self._kept.append(_Kept(key, turns, size))
            self.turn_bytes += size
            self._make_room()

    def _make_room(self) -> None:
        while self.bytes + self.turn_bytes > self._max_bytes or len(self._kept) > MAX_CONVERSATIONS:
            if len(self._kept) > 1 or (
                self._kept and (len(self._scenes) < 2 or self._kept[0].key == next(iter(self._scenes)))
            ):
                self._forget(self._kept[0])
            else:
                _, (_, freed) = self._scenes.popitem(last=False)
                self.bytes -= freed

    def _forget(self, kept: _Kept) -> None:
        self._kept.remove(kept)
        self.turn_bytes -= kept.bytes


@dataclass
class SceneTurns:
    """The conversations about one scene, for one question. A TurnStore."""

    cache: SceneCache
    key: Hashable
    scene: Scene
    continued: bool  # whether the question has a history
    found: int = field(default=0, init=False)  # ids of the conversation that do not run again

    def take(self, ids: np.ndarray, capacity: int) -> Turns | None:
        """See TurnStore."""
        turns = self.cache.take(self.key, ids, capacity) if self.continued else None
        self.found = 0 if turns is None else len(turns.ids)
        return turns

    def put(self, turns: Turns) -> None:
        """See TurnStore."""
        self.cache.keep(self.key, turns, self.scene)


def scene_bytes(scene: Scene) -> int:
    """Memory of a scene in bytes: its arrays, and keys and values in float32."""
    kept = scene.cache.capacity if scene.cache is not None else 0
    size = _cache_bytes(kept, scene.engine.config.decoder) + _arrays(scene)
    return size + (_arrays(scene.grounding) if scene.grounding is not None else 0)


def _turn_bytes(turns: Turns, scene: Scene) -> int:
    if isinstance(turns.cache, HostCache):
        return turns.cache.nbytes
    return _cache_bytes(turns.cache.capacity, scene.engine.config.decoder)


def _cache_bytes(positions: int, decoder: DecoderConfig) -> int:
    return 8 * decoder.n_layers * decoder.kv_dim * positions


def _arrays(holder: object) -> int:
    """Bytes of the numpy arrays in the fields of a dataclass, and in those that it contains."""
    total = 0
    for part in dataclasses.fields(holder):  # type: ignore[arg-type]
        value = getattr(holder, part.name)
        if isinstance(value, np.ndarray):
            total += value.nbytes
        elif part.name == "shown":
            total += sum(image.nbytes for image in value.images)
    return total
