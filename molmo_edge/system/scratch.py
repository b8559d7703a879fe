"""Temporary folders for work in progress, which are removed even if their process is killed.

A folder `.NAME.molmo-edge-partial` is next to the target that it becomes, so that the last step is a rename on the same
file system. The lock `.NAME.molmo-edge-lock` is taken before the folder is created and held while it is in use; the
system releases it when a process is killed. If a process can take the lock of a folder, no other process uses it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.system.cache import cache_directory
from molmo_edge.system.files import name_os_errors

_PARTIAL, _LOCK = ".molmo-edge-partial", ".molmo-edge-lock"
_log = logging.getLogger("molmo_edge")


class BusyError(MolmoEdgeError):
    """Another process is writing to the same place."""


@dataclass(frozen=True)
class Stale:
    """A folder of a killed process that was removed."""

    folder: Path
    bytes: int


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """Create an empty folder next to `target`; it is removed after the block with everything left in it.

    Folders of killed processes in the same directory, or recorded by this user anywhere on the machine, are removed
    first. Raises BusyError if another process or thread has a work folder for the same target.
    """
    parent = target.resolve().parent
    name = target.name[:200]  # a file name may have at most 255 bytes
    folder, lock = parent / f".{name}{_PARTIAL}", parent / f".{name}{_LOCK}"
    with name_os_errors(target, lock):
        handle = _take(lock)
    if handle is None:
        raise BusyError(
            f"another process{_owner(lock)} is writing {target}: wait until it ends, or choose another directory"
        )
    note = _note_of(folder)
    try:
        if folder.exists():  # of a killed process: the lock was free
            _remove(folder)
        with contextlib.suppress(OSError):  # without a cache, only the next export to this directory finds it
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(str(folder), encoding="utf-8")
        remove_stale([parent])
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            note.unlink()
        _release(handle, lock)


@contextmanager
def temporary_folder(kind: str) -> Iterator[Path]:
    """Like `work_folder`, with a unique name in the system's directory for temporary files."""
    with work_folder(Path(tempfile.gettempdir()) / f"molmo-edge-{kind}-{secrets.token_hex(4)}") as folder:
        yield folder


def remove_stale(parents: Iterable[Path] = ()) -> list[Stale]:
    """Remove the work folders of killed processes in `parents`, and those that this user's processes recorded."""
    found = {folder for parent in parents for folder in _partials(parent)}
    notes = cache_directory() / "work"
    with contextlib.suppress(OSError):
        for note in notes.iterdir():
            with contextlib.suppress(OSError, UnicodeDecodeError):
                folder = Path(note.read_text(encoding="utf-8"))
                if folder.name.endswith(_PARTIAL):
                    found.add(folder)
    removed = []
    for folder in sorted(found):
        lock = folder.with_name(folder.name.removesuffix(_PARTIAL) + _LOCK)
        try:
            if not lock.exists():  # not created by `work_folder`, or already removed
                if not folder.exists():
                    _note_of(folder).unlink()
                continue
            if (handle := _take(lock)) is None:
                continue
            try:
                if folder.is_dir():
                    removed.append(_remove(folder))
                _note_of(folder).unlink(missing_ok=True)
            finally:
                _release(handle, lock)
        except OSError:  # of another user, or on a disk that was removed
            continue
    return removed


def free_bytes(directory: Path) -> int:
    """Bytes that this user can still write to the disk of `directory`."""
    return shutil.disk_usage(directory).free


def is_full(error: BaseException) -> bool:
    """Whether an error means that the disk or the user's quota is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _partials(parent: Path) -> list[Path]:
    try:
        names = os.listdir(parent)
    except OSError:
        return []
    locks = [name.removesuffix(_LOCK) + _PARTIAL for name in names if name.endswith(_LOCK)]
    return [parent / name for name in locks]  # includes locks whose process died before it created its folder


def _remove(folder: Path) -> Stale:
    size = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    shutil.rmtree(folder)
    _log.info("removed %s (%.1f MB) of a killed process", folder, size / 1e6)
    return Stale(folder, size)


def _note_of(folder: Path) -> Path:
    return cache_directory() / "work" / hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]


def _take(lock: Path) -> int | None:
    """Create and lock the file; None if another process holds the lock. Raises OSError."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            taken = _try_lock(handle)
            # The previous owner removes the file, perhaps between opening and locking it here.
            if taken and os.path.exists(lock) and os.path.samestat(os.fstat(handle), os.stat(lock)):
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()} {socket.gethostname()}".encode())
                return handle
        except FileNotFoundError:
            taken = True  # just removed: try again
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if not taken:
            return None


def _try_lock(handle: int) -> bool:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, 1 << 20, os.SEEK_SET)  # after the text, which remains readable
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        return not _lives(handle)  # a file system without locks: check whether the process lives
    return True


def _lives(handle: int) -> bool:
    """Whether the process that a lock file names may still be running."""
    pid, _, host = os.pread(handle, 200, 0).decode("utf-8", "replace").partition(" ")
    if not pid.isdigit():
        return False
    if host != socket.gethostname():
        return True  # on another machine, which cannot be checked
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _owner(lock: Path) -> str:
    try:
        pid = lock.read_text(encoding="utf-8").partition(" ")[0]
    except (OSError, UnicodeDecodeError):
        return ""
    return f" ({pid})" if pid.isdigit() else ""


def _release(handle: int, lock: Path) -> None:
    if sys.platform == "win32":  # Windows cannot remove an open file
        os.close(handle)
    with contextlib.suppress(OSError):
        lock.unlink()
    if sys.platform != "win32":
        os.close(handle)
