"""Files that are written whole or not at all, and write errors that name the file that the user knows."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: Path, *instead_of: Path) -> Iterator[None]:
    """Give an OSError of the system that names no file, or one of `instead_of`, the name `path`.

    Python's errors of write, flush and close name none, those of open and rename name a temporary file.
    """
    try:
        yield
    except OSError as error:
        hidden = error.filename is None or str(error.filename) in map(str, instead_of)
        if error.errno is None or not hidden:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a new name beside `path`, where the block writes the file; it becomes `path` at the end of the block.

    After an error nothing is left of it. An OSError names `path`.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")  # a rename stays on one disk
    try:
        with naming(path, part):
            yield part
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
