"""What is made once in a test run, for all its workers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

FOLDER = "MOLMO_EDGE_TEST_FOLDER"  # the variable with the folder, which conftest.py makes


def once(name: str, write: Callable[[Path], object]) -> Path:
    """The path `name`, which the first worker that asks for it writes; never change what is in it."""
    path = Path(os.environ[FOLDER]) / name
    written = Path(f"{path}.written")
    with FileLock(f"{path}.lock"):
        if not written.exists():
            write(path)
            written.touch()
    return path
