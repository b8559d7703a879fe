"""Save disk space in the hub's cache without symlinks: Windows without developer mode, exFAT, network shares.

huggingface_hub stores each file once, as a blob named by its hash, and links to it from the folder of each revision.
Without symlinks that folder must contain the file itself. The client moves files there that it downloads, but copies
existing blobs: large files, which molmo_edge.checkpoints.hub downloads itself, would be on the disk twice. It also does
not reuse the same file of another revision, and would download it again.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from molmo_edge.system.files import sha256_of

LARGE = 50_000_000  # bytes; only files of at least this size are resumed and reused


@dataclass(frozen=True)
class HubFile:
    """A file of a model repository, as the hub's API lists it."""

    name: str
    size: int  # bytes
    commit: str
    sha256: str | None  # of large files: the name of the blob


def has_symlinks(folder: Path) -> bool:
    """Whether the cache supports symlinks in `folder`, the folder of a model."""
    from huggingface_hub.file_download import are_symlinks_supported

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning about disk space, which this module saves
        try:
            return are_symlinks_supported(folder)
        except OSError:  # not writable: the download reports it
            return True


def is_inside(name: str) -> bool:
    """Whether a file name of the hub stays inside the folder that contains it, on any system."""
    return not any(part in ("", ".", "..") for part in name.split("/")) and not set(name) & set("\\:\0")


def snapshot_path(folder: Path, file: HubFile) -> Path:
    """Where the cache expects `file`. `folder`: the folder of the model."""
    return folder / "snapshots" / file.commit / file.name


def reuse(folder: Path, file: HubFile) -> bool:
    """Provide a large file in the folder of its revision from files that are already on the disk.

    Takes no space: a blob is moved, the file of another revision is hard-linked. For a cache without symlinks. Returns
    whether it succeeded.
    """
    target = snapshot_path(folder, file)
    if file.size < LARGE or file.sha256 is None:
        return False
    blob = folder / "blobs" / file.sha256
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if blob.is_file():
            if _is_linked(folder, blob):  # symlinks were supported earlier
                return False
            blob.replace(target)
            return True
        twin = _twin(folder, file)
        if twin is None:
            return False
        os.link(twin, target)
    except OSError:  # no hard links either: download it again
        return False
    return True


def _is_linked(folder: Path, blob: Path) -> bool:
    return any(p.is_symlink() and p.resolve() == blob.resolve() for p in (folder / "snapshots").rglob("*"))


def _twin(folder: Path, file: HubFile) -> Path | None:
    """The same file in the folder of another revision, if there is one."""
    for path in sorted((folder / "snapshots").glob("*/")):
        twin = path / file.name
        if twin.is_file() and twin.stat().st_size == file.size and sha256_of(twin) == file.sha256:
            return twin
    return None
