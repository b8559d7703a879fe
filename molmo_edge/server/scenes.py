"""Encoded images, kept for the next question about the same picture."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Hashable

import numpy as np

from molmo_edge.sdk.engine import Scene


class SceneCache:
    """The scenes that were used last, within a limit on their memory. A scene above the limit is not kept."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, tuple[Scene, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Scene | None:
        """The scene that was put under `key`, if it is still here."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Hashable, scene: Scene) -> None:
        """Keep a scene, and forget those that were not used for longest."""
        size = scene_bytes(scene)
        if size > self._max_bytes:
            return
        with self._lock:
            if key in self._entries:
                self.bytes -= self._entries.pop(key)[1]
            self._entries[key] = scene, size
            self.bytes += size
            while self.bytes > self._max_bytes:
                _, (_, freed) = self._entries.popitem(last=False)
                self.bytes -= freed


def scene_bytes(scene: Scene) -> int:
    """Memory of a scene in bytes: its arrays, and keys and values in float32."""
    decoder = scene.engine.config.decoder
    kept = scene.cache.capacity if scene.cache is not None else 0
    size = 8 * decoder.n_layers * decoder.kv_dim * kept + _arrays(scene)
    return size + (_arrays(scene.grounding) if scene.grounding is not None else 0)


def _arrays(holder: object) -> int:
    """Bytes of the numpy arrays in the fields of a dataclass, and in those that it contains."""
    total = 0
    for field in dataclasses.fields(holder):  # type: ignore[arg-type]
        value = getattr(holder, field.name)
        if isinstance(value, np.ndarray):
            total += value.nbytes
        elif field.name == "shown":
            total += sum(image.nbytes for image in value.images)
    return total
