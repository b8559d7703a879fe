"""A hash that tells models apart, for files that belong to one of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from molmo_edge.checkpoints.bundle import is_bundle
from molmo_edge.checkpoints.manifest import MANIFEST, content_sha256

_TEXTS = (".json", ".yaml")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_BLOCKS, _BLOCK = 64, 4096  # read from each file of weights; and the bytes of each block


def model_identity(directory: Path) -> str:
    """A SHA-256 of the model in `directory`, 64 hexadecimal digits.

    Of a bundle: of its manifest, which has the hashes of all files. Of a checkpoint: of its configuration and
    tokenizer, and of the names, sizes and samples of its weights, because hashing 29 GB takes minutes. Raises OSError.
    """
    if is_bundle(directory):
        return content_sha256(json.loads((directory / MANIFEST).read_text(encoding="utf-8")))
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        size = path.stat().st_size
        if path.suffix not in (*_TEXTS, *_WEIGHTS):
            continue
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if path.suffix in _TEXTS:
                digest.update(file.read())
                continue
            for block in range(_BLOCKS):
                file.seek(block * max(0, size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()
