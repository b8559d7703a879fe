"""Tensors of a checkpoint directory in hub layout, one at a time, as float32 numpy arrays.

Safetensors files are read without torch and without the safetensors package: the header is JSON, the rest is
mapped memory, and bfloat16 (which numpy lacks) is widened by hand. Only the pickle of MolmoE needs torch.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from molmo_edge.errors import MolmoEdgeError, first_line

SAFETENSORS, INDEX, PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # numpy has none: see get
}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format itself


class CheckpointError(MolmoEdgeError):
    """A checkpoint that is missing, cut short, or not what its name says."""


class TensorSource(Protocol):
    """Where an exporter or a loader takes weights from, by their hub names ("model.transformer...")."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def get(self, name: str) -> np.ndarray:
        """The tensor as float32; it may be a read-only view of the file."""
        ...


def open_tensors(directory: str | Path) -> TensorSource:
    """Open the weights of a checkpoint directory; nothing but headers is read until `get`.

    Takes `model.safetensors`, else `model.safetensors.index.json` and its shards, else `pytorch_model.bin`
    (mapped, `weights_only=True`: code in the pickle is never run). Raises CheckpointError.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; a checkpoint is a directory in hub layout")
    if (directory / SAFETENSORS).exists():
        return SafetensorsSource(_read_header(directory / SAFETENSORS))
    if (directory / INDEX).exists():
        return SafetensorsSource(_read_index(directory / INDEX))
    if (directory / PICKLE).exists():
        return _open_pickle(directory / PICKLE)
    raise CheckpointError(f"{directory} holds no weights: expected {SAFETENSORS}, {INDEX} or {PICKLE}")


def _unknown(name: str) -> CheckpointError:
    return CheckpointError(f'the checkpoint has no tensor "{name}": does its config.json belong to these weights?')


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


class SafetensorsSource:
    """A TensorSource over one safetensors file or over the shards of an index."""

    def __init__(self, entries: dict[str, _Entry]) -> None:
        self._entries = entries

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def get(self, name: str) -> np.ndarray:
        e = self._entry(name)
        if 0 in e.shape:  # an empty file range cannot be mapped
            return np.zeros(e.shape, np.float32)
        raw: np.ndarray = np.memmap(e.path, dtype=_DTYPES[e.dtype], mode="r", offset=e.offset, shape=e.shape)
        if e.dtype == "BF16":  # the upper half of a float32
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return np.asarray(raw, dtype=np.float32)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise _unknown(name)
        return self._entries[name]


def _read_header(path: Path) -> dict[str, _Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{path} is not a safetensors file, or was cut short: download it again")
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError):
            raise CheckpointError(f"{path} has a damaged header: download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged header: download it again")
    header.pop("__metadata__", None)
    return {name: _entry(path, name, info, 8 + length, size) for name, info in header.items()}


def _entry(path: Path, name: str, info: Any, data: int, size: int) -> _Entry:
    """Check one header record against the file; `data` is where the tensors start, `size` the file's, in bytes."""
    try:
        dtype, shape = info["dtype"], tuple(int(n) for n in info["shape"])
        begin, end = (int(n) for n in info["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f'{path} has a damaged header at "{name}": download it again') from None
    if dtype not in _DTYPES:
        raise CheckpointError(f'{path}: "{name}" is stored as {dtype}; known are {", ".join(_DTYPES)}')
    if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise CheckpointError(f'{path}: the size of "{name}" contradicts its shape {list(shape)}: download it again')
    if data + end > size:
        raise CheckpointError(
            f'{path} was cut short: "{name}" ends {data + end - size} bytes past it; download it again'
        )
    return _Entry(path, dtype, shape, data + begin)


def _read_index(path: Path) -> dict[str, _Entry]:
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(files.values()))
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f'{path} is damaged: it should map tensors to files under "weight_map"') from None
    headers = {}
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{path} points outside of its directory: {shard!r}")
        if not (path.parent / shard).exists():
            raise CheckpointError(f"{path.parent / shard} is missing, though {path.name} lists it: download it")
        headers[shard] = _read_header(path.parent / shard)
    missing = [name for name, shard in files.items() if name not in headers[shard]]
    if missing:
        raise CheckpointError(
            f'{path.parent / files[missing[0]]} has no tensor "{missing[0]}", though {path.name} says so'
        )
    return {name: headers[shard][name] for name, shard in files.items()}


class PickleSource:
    """A TensorSource over the mapped state dict of `pytorch_model.bin`."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensor(name).shape)

    def get(self, name: str) -> np.ndarray:
        return self._tensor(name).float().numpy()

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise _unknown(name)
        return self._tensors[name]


def _open_pickle(path: Path) -> PickleSource:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path} is a pickle, which only PyTorch reads: pip install 'molmo-edge[torch]'"
        ) from None
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for a bad file
        raise CheckpointError(
            f"{path} is not a plain, whole PyTorch checkpoint ({first_line(error)}): download it again"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path} holds something else than named tensors")
    return PickleSource(tensors)
