"""The models on this machine: the embedded one, those in the hub's cache, and bundles and checkpoints in a folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from molmo_edge.checkpoints.bundle import default_bundle, is_bundle
from molmo_edge.checkpoints.hub_config import CONFIG, MODEL_TYPES
from molmo_edge.checkpoints.manifest import MANIFEST, BundleError, read_manifest


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine."""

    name: str  # "nano", a hub id, or the path of a directory
    kind: str  # "bundle", "checkpoint", or "incomplete download"
    bytes: int  # on the disk
    directory: Path  # that of the hub's cache holds every revision
    precision: str | None = None  # of a bundle's decoder


def embedded_model() -> LocalModel:
    """Nano. Raises BundleError if this installation lacks it."""
    directory = default_bundle()
    return LocalModel("nano", "bundle", _size(directory), directory, _precision(directory))


def cached_models(cache: Path | None = None) -> list[LocalModel]:
    """The Molmos in the cache of huggingface_hub, by hub id, including unfinished downloads.

    `cache`: its folder; None: the one that huggingface_hub uses. Models of other kinds are left out.
    """
    if cache is None:
        from huggingface_hub import constants

        cache = Path(constants.HF_HUB_CACHE)
    found = []
    for folder in sorted(cache.glob("models--*--*")):
        hub_id = folder.name.removeprefix("models--").replace("--", "/", 1)
        kinds = [kind for kind in map(_kind, (folder / "snapshots").glob("*/")) if kind is not None]
        unfinished = any((folder / "blobs").glob("*.part"))  # the name that molmo_edge.checkpoints.hub gives
        if kinds or unfinished:
            kind = "incomplete download" if unfinished else kinds[0]
            found.append(LocalModel(hub_id, kind, _size(folder), folder))
    return found


def models_in(folder: Path) -> list[LocalModel]:
    """The bundles and checkpoints that are `folder` or directly in it. Raises OSError if it cannot be read."""
    found = []
    for directory in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        if (kind := _kind(directory)) is not None:
            precision = _precision(directory) if kind == "bundle" else None
            found.append(LocalModel(str(directory), kind, _size(directory), directory, precision))
    return found


def remove_cached(model: LocalModel) -> None:
    """Delete a model of `cached_models` with all its revisions. Raises OSError."""
    shutil.rmtree(model.directory)
    shutil.rmtree(model.directory.parent / ".locks" / model.directory.name, ignore_errors=True)


def remove_bundle(directory: Path) -> None:
    """Delete the files that a bundle's manifest lists, and the directory if nothing else is in it.

    Raises BundleError for a directory that holds no bundle, and OSError.
    """
    manifest = read_manifest(directory)
    files = [component.file for component in manifest.components.values()]
    files += [manifest.check.image.file] if manifest.check is not None else []
    for file in files:
        (directory / file).unlink(missing_ok=True)
    (directory / MANIFEST).unlink()  # last: until then a second attempt can finish
    folders = {(directory / file).parent for file in files} | {directory}
    for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):  # the innermost first
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _kind(directory: Path) -> str | None:
    if is_bundle(directory):
        return "bundle"
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return "checkpoint" if isinstance(config, dict) and config.get("model_type") in MODEL_TYPES else None


def _precision(directory: Path) -> str | None:
    try:
        return read_manifest(directory).components["decoder"].precision
    except (BundleError, KeyError):
        return None  # of a newer version, or damaged: `verify` says more


def _size(directory: Path) -> int:
    """Bytes of the files below `directory`; symbolic links, and files with several names, count once."""
    return sum({stat.st_ino: stat.st_size for stat in _stats(directory)}.values())


def _stats(directory: Path) -> Iterator[os.stat_result]:
    for folder, _, files in os.walk(directory):
        for file in files:
            path = Path(folder, file)
            if not path.is_symlink():
                yield path.stat()
