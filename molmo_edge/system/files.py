"""Hash, write and find files, with errors that name the file that the user knows."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePath

from molmo_edge.errors import MolmoEdgeError


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def name_os_errors(path: Path, *instead_of: Path) -> Iterator[None]:
    """Give an OSError that names no file, or one of `instead_of`, the file name `path`.

    Python's errors of write, flush and close name no file; those of open and rename name the temporary file.
    """
    try:
        yield
    except OSError as error:
        hidden = error.filename is None or str(error.filename) in map(str, instead_of)
        if error.errno is None or not hidden:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same directory; the block writes it, and then it replaces `path`.

    After an error the temporary file is removed and `path` is unchanged. An OSError names `path`.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")  # same disk: rename is atomic
    try:
        with name_os_errors(path, part):
            yield part
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside `path`; the block fills it, and then it replaces `path` and all files in it.

    So a directory of this name is complete, even if the process is killed. After an error `path` is unchanged.
    """
    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a killed process
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


class FileNameError(MolmoEdgeError):
    """A name that several files share once Unicode normalisation is ignored."""


def find_file(folder: Path, name: str) -> Path | None:
    """Find the file `name`, a path relative to `folder` or absolute; None if it does not exist.

    A file with exactly this name is preferred over one whose name differs only in Unicode normalisation: macOS and
    some archives write "é" as "e" and an accent (NFD), most other programs as one character (NFC).
    Raises FileNameError if several files differ only in that.
    """
    path = folder / name
    if os.path.isfile(path):  # unlike Path.is_file, False for a name that is too long or has a NUL in it
        return path
    if name.isascii():
        return None
    found = folder
    for part in PurePath(name).parts:
        step = found / part
        if not os.path.exists(step):
            alike = _names(found).get(unicodedata.normalize("NFC", part), ())
            if len(alike) > 1:
                raise FileNameError(
                    f'{found} has {len(alike)} entries named "{part}" that differ only in how Unicode encodes their '
                    "accents: rename all but one"
                )
            if not alike:
                return None
            step = found / alike[0]
        found = step
    return found if os.path.isfile(found) else None


def printable(name: object) -> str:
    """A name for use in a line of text: shortened, and escaped if it contains line breaks or lone surrogates."""
    text = str(name)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 300 else f"{text[:297]}..."


def _names(folder: Path) -> dict[str, tuple[str, ...]]:
    try:
        return _names_at(os.fspath(folder), os.stat(folder).st_mtime_ns)
    except (OSError, ValueError):
        return {}


@lru_cache(maxsize=64)
def _names_at(folder: str, _changed: int) -> dict[str, tuple[str, ...]]:
    """The names in `folder` by normalised name. `_changed`: its modification time, which invalidates the cache."""
    found: dict[str, tuple[str, ...]] = {}
    for name in sorted(os.listdir(folder)):
        key = unicodedata.normalize("NFC", name)
        found[key] = (*found.get(key, ()), name)
    return found
