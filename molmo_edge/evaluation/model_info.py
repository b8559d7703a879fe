"""What a report says of a model: what it is, how it is rounded, how large it is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo_edge.checkpoints.bundle import is_bundle, open_bundle
from molmo_edge.checkpoints.manifest import GRAPHS, MANIFEST

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "model.pt")


@dataclass(frozen=True)
class ModelInfo:
    name: str
    precision: str  # of each component, or of a checkpoint's weights
    bytes: int  # of all its files of weights

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "precision": self.precision, "bytes": self.bytes}


def model_info(directory: Path, precision: str = "auto") -> ModelInfo:
    """`precision`: what a checkpoint is run in. Raises BundleError for a damaged bundle."""
    if not is_bundle(directory):
        files = [path for pattern in _WEIGHTS for path in directory.glob(pattern)]
        return ModelInfo(directory.resolve().name, precision, sum(path.stat().st_size for path in files))
    bundle = open_bundle(directory)
    words = [f"{name} {bundle.components[name].precision}" for name in GRAPHS]
    same = {bundle.components[name].precision for name in GRAPHS}
    return ModelInfo(
        directory.resolve().name,
        same.pop() or "" if len(same) == 1 else ", ".join(words),
        sum(part.bytes for name, part in bundle.components.items() if name not in ("tokenizer", "mmproj")),
    )


def model_fingerprint(directory: Path) -> str:
    """The same for the same weights: a bundle's manifest knows their hashes, a checkpoint's files sizes and times."""
    if is_bundle(directory):
        text = (directory / MANIFEST).read_text(encoding="utf-8")
    else:
        files = sorted(path for pattern in (*_WEIGHTS, "config.*") for path in directory.glob(pattern))
        text = "\n".join(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
