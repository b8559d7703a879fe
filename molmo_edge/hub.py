"""Models by hub id: what is fetched, whether it fits on the disk, and what to do where the hub cannot be reached.

huggingface_hub does the transfer, into its own cache: HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE mean what
they always mean. Newer versions of it throw an unfinished file away, which for one of 28.9 GB is days on a slow line:
large files are therefore kept as far as they came, resumed, and compared with the hub's sha256. Python code beside a
checkpoint is never fetched.
"""

from __future__ import annotations

import glob
import importlib.util
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from molmo_edge.bundle import MANIFEST, sha256_of
from molmo_edge.errors import MolmoEdgeError, first_line
from molmo_edge.hub_config import CONFIG

_CHECKPOINT = (CONFIG, "preprocessor_config.json", "generation_config.json", "tokenizer.json", "LICENSE*")
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
_PICKLE = "pytorch_model.bin"
_NOT_OF_A_BUNDLE = ("*.py", ".git*", "*.md")
_LARGE = 50_000_000  # bytes from which on a file is worth resuming
_SPARE = 500_000_000  # bytes that stay free on the disk


class HubError(MolmoEdgeError):
    """A model that could not be had from the hub."""


def fetch_model(hub_id: str, revision: str | None = None, *, to_run: bool = True) -> Path:
    """The directory of a bundle or checkpoint `owner/name`, downloaded where the cache has it not.

    `revision`: a branch, a tag or a commit; None for the main branch. `to_run`: a checkpoint will be run, which needs
    PyTorch; that is found out before 29 GB are fetched. Raises HubError.
    """
    from huggingface_hub import constants

    name = hub_id if revision is None else f"{hub_id} at {revision}"
    if constants.HF_HUB_OFFLINE:
        return _cached(hub_id, revision, f"{name} is not in the cache, and HF_HUB_OFFLINE is set")
    try:
        files = _list(hub_id, revision)
    except _Unreachable as error:
        return _cached(
            hub_id, revision, f"the hub ({constants.ENDPOINT}) cannot be reached for {name}: {first_line(error)}"
        )
    wanted = {file: files[file] for file in _wanted(name, list(files), to_run)}
    _check_disk(hub_id, wanted)
    return _download(hub_id, revision, wanted)


class _Unreachable(Exception):  # noqa: N818 (a state, not a mistake)
    pass


def _list(hub_id: str, revision: str | None) -> dict[str, tuple[int, str]]:
    """File -> size in bytes and the commit it is of."""
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
        raise HubError(f"{hub_id} is no directory here, and no hub id: {first_line(error)}") from None
    except GatedRepoError:
        raise HubError(f"{hub_id} is gated: accept its conditions on its page, then set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise HubError(
            f"{hub_id} is no directory here, and the hub has no such model, or does not show it to you: check the "
            "name, or set HF_TOKEN for a private one"
        ) from None
    except RevisionNotFoundError:
        raise HubError(f'{hub_id} has no revision "{revision}": name a branch, a tag or a commit of it') from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status == 401 or status == 403:
            raise HubError(f"the hub does not let you read {hub_id} ({status}): check HF_TOKEN") from None
        raise _Unreachable(error) from error
    except Exception as error:  # connections fail with httpx's errors or with requests', by the client's version
        raise _Unreachable(error) from error
    return {s.rfilename: (int(s.size or 0), str(info.sha)) for s in info.siblings or ()}


def _wanted(name: str, files: list[str], to_run: bool) -> list[str]:
    if MANIFEST in files:
        return [file for file in files if not _matches(file, _NOT_OF_A_BUNDLE)]
    if CONFIG not in files:
        raise HubError(f"{name} on the hub holds neither a bundle ({MANIFEST}) nor a checkpoint ({CONFIG})")
    weights = [file for file in files if _matches(file, _SAFETENSORS)] or [file for file in files if file == _PICKLE]
    if not weights:
        raise HubError(f"{name} on the hub has no weights: expected {', '.join(_SAFETENSORS[:2])} or {_PICKLE}")
    if (to_run or weights == [_PICKLE]) and importlib.util.find_spec("torch") is None:
        why = "which runs on PyTorch" if to_run else "whose weights are a pickle, which only PyTorch reads"
        raise HubError(f"{name} is a checkpoint, {why}: pip install 'molmo-edge[torch]', or name a bundle")
    return weights + [file for file in files if _matches(file, _CHECKPOINT)]


def _matches(file: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(file, pattern) for pattern in patterns)


def _check_disk(hub_id: str, files: dict[str, tuple[int, str]]) -> None:
    from huggingface_hub import constants, try_to_load_from_cache

    missing = sum(
        size
        for file, (size, commit) in files.items()
        if not isinstance(try_to_load_from_cache(hub_id, file, revision=commit), str)
    )
    cache = Path(constants.HF_HUB_CACHE)
    there = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if missing and missing + _SPARE > free:
        raise HubError(
            f"{hub_id} takes {missing / 1e9:.1f} GB, but {there} has only {free / 1e9:.1f} GB free: make room, or let "
            "HF_HOME name a directory on a larger disk"
        )


def _download(hub_id: str, revision: str | None, files: dict[str, tuple[int, str]]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        for file, (size, commit) in files.items():
            if size >= _LARGE:
                _download_large(hub_id, file, size, commit)
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=[glob.escape(f) for f in files]))
    except HubError:
        raise
    except Exception as error:  # the client's own errors, httpx's or requests', and OSError from the disk
        raise HubError(
            f"the download of {hub_id} broke off: {first_line(error)}. Ask again: it goes on where it stopped"
        ) from error


def _download_large(hub_id: str, file: str, size: int, commit: str) -> None:
    """Put `file` where the cache looks for it by its hash, going on from what an earlier attempt has left."""
    from filelock import FileLock
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(hub_id, file, revision=commit)
    etag = get_hf_file_metadata(url).etag
    cache, repo = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=hub_id, repo_type="model")
    blobs, locks = cache / repo / "blobs", cache / ".locks" / repo
    if etag is None or (blobs / etag).exists():
        return
    for directory in (blobs, locks):
        directory.mkdir(parents=True, exist_ok=True)
    part = blobs / f"{etag}.part"
    with FileLock(locks / f"{part.name}.lock"):  # two at once would write into each other
        if (blobs / etag).exists():
            return
        with part.open("ab") as out:
            http_get(
                url,
                out,
                resume_size=out.tell(),
                headers=build_hf_headers(),
                expected_size=size,
                displayed_filename=file,
            )
        if len(etag) == 64 and sha256_of(part) != etag:  # of large files the hub's etag is the sha256
            part.unlink()
            raise HubError(f"{file} of {hub_id} arrived damaged and was thrown away: ask again to fetch it anew")
        part.replace(blobs / etag)


def _cached(hub_id: str, revision: str | None, why: str) -> Path:
    """The copy that an earlier download left, whole; what is wrong with its weights is found when they are opened."""
    from huggingface_hub import constants, snapshot_download

    advice = (
        f"connect once, or fetch it elsewhere (hf download {hub_id} --local-dir DIR), copy that directory here and "
        "name it instead of the id"
    )
    known: dict[str, Any] = {"revision": revision, "local_files_only": True}
    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=[MANIFEST, CONFIG], **known))
    except Exception:  # LocalEntryNotFoundError, or by version another one
        raise HubError(f"{why}; {constants.HF_HUB_CACHE} has no copy of it: {advice}") from None
    missing = None
    if not (directory / MANIFEST).is_file():
        weights = any(any(directory.glob(pattern)) for pattern in (*_SAFETENSORS, _PICKLE))
        there = {CONFIG: (directory / CONFIG).is_file(), "tokenizer.json": (directory / "tokenizer.json").is_file()}
        missing = next((file for file, found in (there | {"its weights": weights}).items() if not found), None)
    if missing is not None:
        raise HubError(f"{why}; the copy in {directory} lacks {missing}: {advice}")
    return directory
