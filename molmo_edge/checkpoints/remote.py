"""A model on the hub from its headers alone: a few kilobytes, before gigabytes are downloaded."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

from molmo_edge.checkpoints.bundle import Bundle
from molmo_edge.checkpoints.hub import HubError, files_of
from molmo_edge.checkpoints.hub_config import CONFIG, PREPROCESSOR, read_config
from molmo_edge.checkpoints.manifest import MANIFEST, read_manifest
from molmo_edge.checkpoints.tensor_names import hub_shapes
from molmo_edge.checkpoints.tensor_sources import CheckpointError
from molmo_edge.config import MolmoConfig
from molmo_edge.errors import first_line


@dataclass(frozen=True)
class RemoteModel:
    """What the headers of a model on the hub say."""

    hub_id: str
    config: MolmoConfig
    bundle: Bundle | None  # None: a checkpoint
    weights: int  # bytes of the files of weights
    dtypes: dict[str, int]  # number of values by dtype; empty if the headers are not readable from afar (a pickle)


def read_remote(hub_id: str, revision: str | None = None) -> RemoteModel:
    """Read the manifest, or the config.json and the headers of the safetensors files, of a model on the hub.

    Reads the headers in ranges, and leaves nothing in the cache. Raises HubError, ConfigError, BundleError, and
    CheckpointError if the tensors are not those of the configuration.
    """
    files = files_of(hub_id, revision)
    names = [MANIFEST] if MANIFEST in files else [name for name in (CONFIG, PREPROCESSOR) if name in files]
    if not names:
        raise HubError(f"{hub_id} on the hub contains neither a bundle ({MANIFEST}) nor a checkpoint ({CONFIG})")
    with tempfile.TemporaryDirectory(prefix="molmo-edge-") as folder:
        directory = Path(folder)
        for name in names:
            _fetch(hub_id, name, files[name].commit, directory)
        if MANIFEST in files:
            bundle = Bundle(Path(hub_id), read_manifest(directory))
            total = sum(component.bytes for component in bundle.components.values())
            return RemoteModel(hub_id, bundle.config, bundle, total, {})
        config = read_config(directory)
    shards = [name for name in files if name.endswith(".safetensors")]
    weights = sum(file.size for name, file in files.items() if name in shards or (not shards and name.endswith(".bin")))
    return RemoteModel(hub_id, config, None, weights, _dtypes(hub_id, files[CONFIG].commit, shards, config))


def _fetch(hub_id: str, name: str, commit: str, directory: Path) -> None:
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(hub_id, name, revision=commit, local_dir=directory)
    except Exception as error:  # errors of the client, of httpx or requests, and OSError
        raise HubError(f"{name} of {hub_id} cannot be downloaded: {first_line(error)}") from error


def _dtypes(hub_id: str, commit: str, shards: list[str], config: MolmoConfig) -> dict[str, int]:
    """The number of values by dtype. Compares names and shapes with the configuration."""
    from huggingface_hub import HfApi

    if not shards:
        return {}
    try:
        headers = [HfApi().parse_safetensors_file_metadata(hub_id, name, revision=commit) for name in shards]
    except Exception as error:
        raise HubError(f"the headers of {hub_id} cannot be read: {first_line(error)}") from error
    tensors = {name: info for header in headers for name, info in header.tensors.items()}
    counts: dict[str, int] = {}
    for name, shape in hub_shapes(config).items():
        if name not in tensors:
            raise CheckpointError(f"{hub_id} has no tensor {name}: does its config.json belong to these weights?")
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"{hub_id}: {name} has shape {list(tensors[name].shape)}, not {list(shape)}")
        counts[tensors[name].dtype] = counts.get(tensors[name].dtype, 0) + math.prod(shape)
    return counts
