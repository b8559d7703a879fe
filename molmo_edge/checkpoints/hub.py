"""Download models by hub id, with a check of the disk space, resumable large files and an offline fallback.

huggingface_hub transfers the files into its own cache: HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE work as usual.
Its newer versions discard an unfinished file, which for 28.9 GB can cost days on a slow connection. Therefore this
module downloads large files itself, keeps and resumes partial ones, and verifies the hub's SHA-256. Python code in a
repository is never downloaded.
"""

from __future__ import annotations

import glob
import importlib.util
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from molmo_edge.checkpoints.hub_config import CONFIG
from molmo_edge.checkpoints.hub_links import LARGE, HubFile, has_symlinks, is_inside, reuse, snapshot_path
from molmo_edge.checkpoints.manifest import MANIFEST, TOKENIZER, read_manifest
from molmo_edge.errors import MolmoEdgeError, first_line
from molmo_edge.system.extras import pip_command
from molmo_edge.system.files import sha256_of
from molmo_edge.system.log import logger

_CHECKPOINT = (
    *(CONFIG, "preprocessor_config.json", "video_preprocessor_config.json", TOKENIZER, "LICENSE*"),
    # For other programs that read a converted checkpoint.
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
)
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
_PICKLE = "pytorch_model.bin"
_NOT_OF_A_BUNDLE = ("*.py", ".git*", "*.md")
_SPARE = 500_000_000  # bytes that stay free on the disk


class HubError(MolmoEdgeError):
    """A model could not be downloaded from the hub."""


@dataclass(frozen=True)
class Download:
    """A download that is about to start."""

    hub_id: str
    bytes: int  # still to be written; less than the model's size if some of it is in the cache
    total: int  # bytes of the model's files
    free: int  # bytes on the disk of the cache
    cache: Path  # the cache, or the parent in which it will be made

    def __str__(self) -> str:
        rest = "" if self.bytes == self.total else f" of {_size(self.total)}"
        return f"{self.hub_id}: {_size(self.bytes)}{rest} to download to {self.cache}, {_size(self.free)} free there"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def fetch_model(
    hub_id: str,
    revision: str | None = None,
    *,
    to_run: bool = True,
    announce: Callable[[Download], None] | None = None,
) -> Path:
    """Return the directory of the bundle or checkpoint `owner/name`; download it if it is not in the cache.

    `revision`: a branch, a tag or a commit; None for the main branch. `to_run`: the model will be run; a checkpoint
    then needs PyTorch, which is checked before the download. `announce` is called before the first byte is downloaded,
    and may raise to prevent it; None: the size is logged. Raises HubError.
    """
    from huggingface_hub import constants

    name = _named(hub_id, revision)
    if constants.HF_HUB_OFFLINE:
        return _cached(hub_id, revision, f"{name} is not in the cache, and HF_HUB_OFFLINE is set")
    try:
        files = _list(hub_id, revision)
    except _Unreachable as error:
        return _cached(hub_id, revision, _unreachable(name, error))
    wanted = _wanted(name, list(files), to_run)
    missing = [files[file] for file in wanted if not _is_cached(hub_id, files[file])]
    links = not missing or has_symlinks(_folder(hub_id))
    if not links:
        missing = [file for file in missing if not reuse(_folder(hub_id), file)]
    download = _measure(hub_id, [files[file] for file in wanted], missing, links)
    if download.bytes:
        _check_disk(download)
        (announce or logger.info)(download)
    return _download(hub_id, revision, wanted, missing, links)


def cached_model(hub_id: str, revision: str | None = None) -> Path | None:
    """The directory of an earlier download, found without the network; None if it is not whole or not valid."""
    from molmo_edge.checkpoints.safetensors_files import INDEX, shards_of

    try:
        directory = _cached(hub_id, revision, "")
        if (directory / INDEX).is_file():
            shards_of(directory / INDEX)
        if (directory / MANIFEST).is_file():
            files = [component.file for component in read_manifest(directory).components.values()]
            return directory if all((directory / file).is_file() for file in files) else None
    except MolmoEdgeError:
        return None
    return directory


def download_of(hub_id: str, revision: str | None = None) -> Download | None:
    """What `fetch_model` would download; None if the model is in the cache. Changes nothing. Raises HubError."""
    files = files_of(hub_id, revision)
    wanted = [files[file] for file in _wanted(_named(hub_id, revision), list(files), to_run=False)]
    download = _measure(hub_id, wanted, [file for file in wanted if not _is_cached(hub_id, file)], links=True)
    return download if download.bytes else None


def files_of(hub_id: str, revision: str | None = None) -> dict[str, HubFile]:
    """The files of a model on the hub, by name. Raises HubError."""
    try:
        return _list(hub_id, revision)
    except _Unreachable as error:
        raise HubError(_unreachable(_named(hub_id, revision), error)) from None


def _named(hub_id: str, revision: str | None) -> str:
    return hub_id if revision is None else f"{hub_id} at {revision}"


def _unreachable(name: str, error: Exception) -> str:
    from huggingface_hub import constants

    return f"the hub ({constants.ENDPOINT}) cannot be reached for {name}: {first_line(error)}"


class _Unreachable(Exception):  # noqa: N818 (not raised to users)
    pass


def _list(hub_id: str, revision: str | None) -> dict[str, HubFile]:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().model_info(hub_id, revision=revision, files_metadata=True)
    except HFValidationError as error:
        raise HubError(f"{hub_id} is neither a directory nor a valid hub id: {first_line(error)}") from None
    except GatedRepoError:
        raise HubError(f"{hub_id} is gated: accept the conditions on its page, then set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise HubError(
            f"{hub_id} is not a directory, and the hub has no such public model: check the name, or set HF_TOKEN for a "
            "private model"
        ) from None
    except RevisionNotFoundError:
        raise HubError(f'{hub_id} has no revision "{revision}": pass a branch, a tag or a commit') from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status == 401 or status == 403:
            raise HubError(f"access to {hub_id} was denied ({status}): check HF_TOKEN") from None
        raise _Unreachable(error) from error
    except Exception as error:  # httpx or requests errors, depending on the version of huggingface_hub
        raise _Unreachable(error) from error
    files = {}
    if not re.fullmatch(r"[0-9a-f]{40}", str(info.sha)):  # these strings become paths: accept no other forms
        raise HubError(
            f"the hub reports {info.sha!r} as the commit of {hub_id}, which is not a commit: try again later"
        )
    for sibling in info.siblings or ():
        if not is_inside(sibling.rfilename):
            raise HubError(f"{hub_id} names a file outside of its folder, {sibling.rfilename!r}: do not trust it")
        sha256 = sibling.lfs and str(sibling.lfs.sha256)  # becomes a file name, so it must be a hash
        sha256 = sha256 if sha256 and re.fullmatch(r"[0-9a-f]{64}", sha256) else None
        files[sibling.rfilename] = HubFile(sibling.rfilename, int(sibling.size or 0), str(info.sha), sha256)
    return files


def _wanted(name: str, files: list[str], to_run: bool) -> list[str]:
    if MANIFEST in files:
        return [file for file in files if not _matches(file, _NOT_OF_A_BUNDLE)]
    if CONFIG not in files:
        raise HubError(f"{name} on the hub contains neither a bundle ({MANIFEST}) nor a checkpoint ({CONFIG})")
    weights = [file for file in files if _matches(file, _SAFETENSORS)] or [file for file in files if file == _PICKLE]
    if not weights:
        raise HubError(f"{name} on the hub has no weights: expected {', '.join(_SAFETENSORS[:2])} or {_PICKLE}")
    if TOKENIZER not in files:
        raise HubError(f"{name} on the hub has no {TOKENIZER}, which every model needs")
    if (to_run or weights == [_PICKLE]) and importlib.util.find_spec("torch") is None:
        why = "which runs on PyTorch" if to_run else "whose pickled weights only PyTorch can read"
        raise HubError(f"{name} is a checkpoint, {why}: {pip_command('torch')}, or choose a bundle")
    return weights + [file for file in files if _matches(file, _CHECKPOINT)]


def _matches(file: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(file, pattern) for pattern in patterns)


def _is_cached(hub_id: str, file: HubFile) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(hub_id, file.name, revision=file.commit), str)


def _folder(hub_id: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub_id, repo_type="model")


def _blobs(hub_id: str) -> Path:
    return _folder(hub_id) / "blobs"


def _to_write(hub_id: str, file: HubFile, links: bool) -> int:
    """Bytes that the download will add to the disk. `links`: the cache supports symlinks."""
    if file.sha256 is None:
        return file.size
    whole, part = _blobs(hub_id) / file.sha256, _blobs(hub_id) / f"{file.sha256}.part"
    if whole.exists():
        return 0 if links else file.size  # the client copies a blob that `reuse` did not move
    there = part.stat().st_size if part.exists() else 0
    return file.size - (there if there <= file.size else 0)  # a longer one is discarded


def _measure(hub_id: str, wanted: list[HubFile], missing: list[HubFile], links: bool) -> Download:
    cache = _folder(hub_id).parent
    there = next(path for path in (cache, *cache.parents) if path.exists())
    needed = sum(_to_write(hub_id, file, links) for file in missing)
    return Download(hub_id, needed, sum(file.size for file in wanted), shutil.disk_usage(there).free, there)


def _check_disk(download: Download) -> None:
    if download.bytes + _SPARE > download.free:
        raise HubError(
            f"{download.hub_id} needs {download.bytes / 1e9:.1f} GB more, but {download.cache} has only "
            f"{download.free / 1e9:.1f} GB free: free some space, or set HF_HOME to a directory on a larger disk"
        )


def _download(hub_id: str, revision: str | None, wanted: list[str], missing: list[HubFile], links: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        for file in missing:
            if file.size >= LARGE and file.sha256 is not None:
                _download_large(hub_id, file, file.sha256, links)
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=[glob.escape(f) for f in wanted]))
    except HubError:
        raise
    except Exception as error:  # errors of the client, of httpx or requests, and OSError
        raise HubError(
            f"the download of {hub_id} failed: {first_line(error)}. Try again: it resumes where it stopped"
        ) from error


def _download_large(hub_id: str, file: HubFile, sha256: str, links: bool) -> None:
    """Download `file` to where the cache expects it, resuming an earlier attempt.

    With symlinks that is a blob named by its hash; without them the file in its snapshot, because the client would copy
    the blob there and 28.9 GB would be on the disk twice.
    """
    from filelock import FileLock
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    blobs = _blobs(hub_id)
    locks = blobs.parent.parent / ".locks" / blobs.parent.name
    for directory in (blobs, locks):
        directory.mkdir(parents=True, exist_ok=True)
    part = blobs / f"{sha256}.part"
    with FileLock(locks / f"{part.name}.lock"):  # two processes must not write to the same file
        target = blobs / sha256 if links else snapshot_path(_folder(hub_id), file)
        if (blobs / sha256).exists() or target.exists():
            return
        if part.exists() and part.stat().st_size > file.size:
            part.unlink()
        with part.open("ab") as out:
            http_get(
                hf_hub_url(hub_id, file.name, revision=file.commit),
                out,
                resume_size=out.tell(),
                headers=build_hf_headers(),
                expected_size=file.size,
                displayed_filename=file.name,
            )
        if sha256_of(part) != sha256:
            part.unlink()
            raise HubError(f"{file.name} of {hub_id} was damaged during the download and discarded: try again")
        target.parent.mkdir(parents=True, exist_ok=True)
        part.replace(target)


def _cached(hub_id: str, revision: str | None, why: str) -> Path:
    """Return the copy of an earlier download, if it is complete. Its weights are verified when they are opened."""
    from huggingface_hub import constants, snapshot_download

    advice = (
        f"connect once, or download it on another machine (hf download {hub_id} --local-dir DIR), copy that directory "
        "here and pass its path instead of the id"
    )
    known: dict[str, Any] = {"revision": revision, "local_files_only": True}
    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=[MANIFEST, CONFIG], **known))
    except Exception:  # LocalEntryNotFoundError or another one, depending on the version
        raise HubError(f"{why}; {constants.HF_HUB_CACHE} has no copy of it: {advice}") from None
    missing = None
    if not (directory / MANIFEST).is_file():
        weights = any(any(directory.glob(pattern)) for pattern in (*_SAFETENSORS, _PICKLE))
        there = {CONFIG: (directory / CONFIG).is_file(), TOKENIZER: (directory / TOKENIZER).is_file()}
        missing = next((file for file, found in (there | {"its weights": weights}).items() if not found), None)
    if missing is not None:
        raise HubError(f"{why}; the copy in {directory} lacks {missing}: {advice}")
    return directory
