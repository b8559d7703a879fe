"""A folder of scenes on disk, keyed by what they show, with a limit on its size. Several processes may share it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.sdk.inputs import Inputs
from molmo_edge.sdk.scene_file import FORMAT_VERSION, SceneFileError
from molmo_edge.system.boards import parse_bytes
from molmo_edge.system.log import logger

_T = TypeVar("_T")

_SUFFIX = ".scene"
_ABANDONED = 3600  # seconds after which an unfinished file is removed: its process was killed


class SceneCacheError(MolmoEdgeError):
    """A scene cache that cannot be used: its folder, or its size."""


class SceneStore:
    """The scenes that were used last. A file that cannot be read or written costs time, but no answer."""

    def __init__(self, directory: str | os.PathLike[str], max_bytes: int) -> None:
        """`max_bytes`: of all files together. Raises SceneCacheError if the folder cannot be made."""
        if max_bytes < 1:
            raise SceneCacheError(f"the size of the scene cache must be at least 1 byte, not {max_bytes}")
        self.directory, self.max_bytes = Path(directory), max_bytes
        self._make()

    def get(self, key: str, load: Callable[[Path], _T]) -> _T | None:
        """What `load` makes of the file of `key`; None if there is no usable one.

        The file stays: the fault can be a passing one, and the next `put` replaces it.
        """
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            found = load(path)
        except SceneFileError as error:
            logger.warning("%s; the scene cache will replace it", error)
            return None
        with contextlib.suppress(OSError):  # a cache that may only be read
            os.utime(path)
        return found

    def put(self, key: str, save: Callable[[Path], None]) -> None:
        """Let `save` write the file of `key`, and remove those that were not used for longest."""
        try:
            self._make()
            save(self._path(key))
        except (OSError, SceneCacheError) as error:
            logger.warning("the scene cache in %s cannot be written: %s", self.directory, error)
            return
        self._prune()

    def _make(self) -> None:
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise SceneCacheError(
                f"the scene cache {self.directory} cannot be used as a folder: {error.strerror or error}"
            ) from None

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}{_SUFFIX}"

    def _prune(self) -> None:
        from filelock import FileLock, Timeout

        with contextlib.suppress(OSError, Timeout), FileLock(self.directory / ".lock", timeout=0):
            left = self.max_bytes
            for _, size, path in sorted(self._files(), reverse=True):
                if size <= left:
                    left -= size
                else:
                    with contextlib.suppress(OSError):
                        os.unlink(path)

    def _files(self) -> list[tuple[int, int, str]]:
        """(time of the last use, bytes, path) of each scene. Removes what killed processes left."""
        found = []
        for entry in os.scandir(self.directory):
            with contextlib.suppress(OSError):  # another process may have removed it
                stat = entry.stat()
                if entry.name.endswith(_SUFFIX):
                    found.append((stat.st_mtime_ns, stat.st_size, entry.path))
                elif entry.name.endswith(".part") and time.time() - stat.st_mtime > _ABANDONED:
                    os.unlink(entry.path)
        return found


def scene_key(inputs: Inputs, *facts: object) -> str:
    """A SHA-256 of the decoded pixels of images or frames, and of `facts`, as 64 hexadecimal digits.

    Decodes the frames of a video.
    """
    digest = hashlib.sha256(repr((FORMAT_VERSION, facts)).encode())
    frames = inputs.frames
    digest.update(repr(None if frames is None else frames.times).encode())
    for image in inputs.images if frames is None else frames.read():
        digest.update(repr(image.shape).encode())
        digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def cache_size(size: int | str) -> int:
    """The bytes of a size such as 500000000 or "500MB". Raises SceneCacheError for anything else."""
    try:
        return size if isinstance(size, int) else parse_bytes(size)
    except (TypeError, ValueError):
        raise SceneCacheError(
            f"the size of the scene cache must be bytes or as in 2GB or 500MB, not {size!r}"
        ) from None
