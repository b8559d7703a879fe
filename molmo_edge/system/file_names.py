"""Files by the names that annotations give them, whatever Unicode normalisation either of the two is in.

macOS and some archives write "é" as "e" and an accent (NFD), most other programs as one character (NFC). To a Linux
file system these are two names, although nobody can tell them apart.
"""

from __future__ import annotations

import os
import unicodedata
from functools import lru_cache
from pathlib import Path, PurePath

from molmo_edge.errors import MolmoEdgeError


class FileNameError(MolmoEdgeError):
    """A name that several files have, if Unicode normalisation is left out of account."""


def find_file(folder: Path, name: str) -> Path | None:
    """The file `name` (a path relative to `folder`, or absolute), None if there is none.

    A file with exactly this name is preferred; otherwise the one whose name differs in Unicode normalisation alone.
    Raises FileNameError if several files differ in nothing else.
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
                    f'{found} has {len(alike)} entries called "{part}", which differ only in how Unicode writes their '
                    "accents: rename all but one"
                )
            if not alike:
                return None
            step = found / alike[0]
        found = step
    return found if os.path.isfile(found) else None


def printable(name: object) -> str:
    """A name as it can stand in a line of text: escaped where it has line breaks, halves of characters or the like."""
    text = str(name)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 300 else f"{text[:297]}..."


def _names(folder: Path) -> dict[str, tuple[str, ...]]:
    try:
        return _names_at(os.fspath(folder), os.stat(folder).st_mtime_ns)
    except (OSError, ValueError):
        return {}


@lru_cache(maxsize=64)
def _names_at(folder: str, changed: int) -> dict[str, tuple[str, ...]]:
    """Normalised name -> the names in `folder`. `changed`: its time of change, so that new files are seen."""
    found: dict[str, tuple[str, ...]] = {}
    for name in sorted(os.listdir(folder)):
        key = unicodedata.normalize("NFC", name)
        found[key] = (*found.get(key, ()), name)
    return found
