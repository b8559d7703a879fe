"""The hub's cache where no symlinks can be made: Windows without developer mode, exFAT, network shares.

huggingface_hub keeps each file once, under its hash, and links to it from the folder of each revision. Without
symlinks the file itself has to lie in that folder. The client moves there what it has downloaded, but copies what it
finds under a hash: large files, which we download ourselves, would lie on the disk twice. And it knows nothing of the
same file in the folder of another revision, and would fetch it again.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from molmo_edge.system.files import sha256_of

LARGE = 50_000_000  # bytes from which on a file is worth resuming, and looking for


@dataclass(frozen=True)
class HubFile:
    name: str
    size: int  # bytes
    commit: str
    sha256: str | None  # of large files; the cache names their blobs by it


def has_symlinks(folder: Path) -> bool:
    """Whether the cache can make symlinks in `folder`, a model's: as huggingface_hub finds out."""
    from huggingface_hub.file_download import are_symlinks_supported

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that more space is needed, which is mended here; it asks only once
        try:
            return are_symlinks_supported(folder)
        except OSError:  # not to be written to: the download says so
            return True


def is_inside(name: str) -> bool:
    """Whether a file name of the hub stays inside the folder that it is put into, on any system."""
    return not any(part in ("", ".", "..") for part in name.split("/")) and not set(name) & set("\\:\0")


def snapshot_path(folder: Path, file: HubFile) -> Path:
    """Where the cache looks for `file` of a model whose `folder` it is."""
    return folder / "snapshots" / file.commit / file.name


def reuse(folder: Path, file: HubFile) -> bool:
    """Put a large file into the folder of its revision from what is on the disk already; whether that was possible.

    It takes no room: a blob is moved, the file of another revision gets a second name. For a cache without symlinks.
    """
    target = snapshot_path(folder, file)
    if file.size < LARGE or file.sha256 is None:
        return False
    blob = folder / "blobs" / file.sha256
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if blob.is_file():
            if _is_linked(folder, blob):  # from the time when there were symlinks
                return False
            blob.replace(target)
            return True
        twin = _twin(folder, file)
        if twin is None:
            return False
        os.link(twin, target)
    except OSError:  # no hard links either: it is fetched again
        return False
    return True


def _is_linked(folder: Path, blob: Path) -> bool:
    return any(p.is_symlink() and p.resolve() == blob.resolve() for p in (folder / "snapshots").rglob("*"))


def _twin(folder: Path, file: HubFile) -> Path | None:
    """The same file in the folder of another revision, where a commit has changed others."""
    for path in sorted((folder / "snapshots").glob("*/")):
        twin = path / file.name
        if twin.is_file() and twin.stat().st_size == file.size and sha256_of(twin) == file.sha256:
            return twin
    return None
