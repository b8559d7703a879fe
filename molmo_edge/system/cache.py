"""The directory in which molmo-edge caches facts about this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """`MOLMO_EDGE_CACHE` if it is set, else `molmo-edge` in the user's cache directory. It may not exist yet.

    ~/.cache (or XDG_CACHE_HOME) on Linux, ~/Library/Caches on macOS, %LOCALAPPDATA% on Windows.
    """
    import platformdirs

    if named := os.environ.get("MOLMO_EDGE_CACHE"):
        return Path(named)
    # Without `opinion=False` Windows would get one more level, "Cache", and caches of earlier versions would be lost.
    return platformdirs.user_cache_path("molmo-edge", appauthor=False, opinion=False)
