"""The name of a model in answers."""

from __future__ import annotations

import json
from pathlib import Path

from molmo_edge.checkpoints.manifest import MANIFEST


def model_name(directory: Path) -> str:
    """Return a bundle's name, owner/name for a checkpoint in the hub's cache, else the name of the directory."""
    try:
        name = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["name"]
        if isinstance(name, str) and name:
            return name
    except (OSError, ValueError, KeyError, TypeError):  # a checkpoint; damaged manifests are refused elsewhere
        pass
    path = directory.resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return path.name
