"""Name, precision and size of a model, for reports, and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from molmo_edge.checkpoints.bundle import is_bundle, open_bundle
from molmo_edge.checkpoints.manifest import GRAPHS, MANIFEST

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "model.pt")


@dataclass(frozen=True)
class ModelInfo:
    """A model's name, precision and size."""

    name: str
    precision: str  # of the weights, by component where they differ
    bytes: int  # of all files with weights


def model_info(directory: Path, precision: str = "auto") -> ModelInfo:
    """`precision` is that of a checkpoint. Raises BundleError for a damaged bundle."""
    if not is_bundle(directory):
        files = [path for pattern in _WEIGHTS for path in directory.glob(pattern)]
        return ModelInfo(directory.resolve().name, precision, sum(path.stat().st_size for path in files))
    bundle = open_bundle(directory)
    precisions = {name: bundle.components[name].precision for name in GRAPHS}
    same = len(set(precisions.values())) == 1
    return ModelInfo(
        directory.resolve().name,
        precisions["decoder"] or "" if same else ", ".join(f"{name} {word}" for name, word in precisions.items()),
        sum(part.bytes for name, part in bundle.components.items() if name not in ("tokenizer", "mmproj")),
    )


def model_fingerprint(directory: Path) -> str:
    """A hash that changes with the weights: of the manifest, or of a checkpoint's file names, sizes and times."""
    if is_bundle(directory):
        text = (directory / MANIFEST).read_text(encoding="utf-8")
    else:
        files = sorted(path for pattern in (*_WEIGHTS, "config.*") for path in directory.glob(pattern))
        text = "\n".join(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
