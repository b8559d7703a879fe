"""Read and write safetensors files tensor by tensor.

The format is a JSON header and raw bytes, which needs neither torch nor the safetensors package. That package's writer
needs all tensors of a file in memory, which a model of 29 GB does not allow.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from molmo_edge.checkpoints.tensor_sources import DTYPES, CheckpointError, Entry

SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format itself


def read_header(path: Path, *, floats_only: bool = False) -> dict[str, Entry]:
    """Read where the tensors of a file are stored, and check them against its size. Raises CheckpointError.

    A Molmo has only float tensors. `floats_only`: skip others, as in CLIP's files, instead of raising an error.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{path} is not a safetensors file, or it is truncated: download it again")
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError):
            raise CheckpointError(f"{path} has a damaged header: download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged header: download it again")
    header.pop("__metadata__", None)
    if floats_only:
        header = {n: info for n, info in header.items() if not isinstance(info, dict) or info.get("dtype") in DTYPES}
    return {name: _entry(path, name, info, 8 + length, size) for name, info in header.items()}


def _entry(path: Path, name: str, info: Any, data: int, size: int) -> Entry:
    """Check one entry of the header. `data`: offset of the first tensor, `size`: size of the file, in bytes."""
    try:
        dtype, shape = info["dtype"], tuple(int(n) for n in info["shape"])
        begin, end = (int(n) for n in info["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f'{path} has a damaged header at "{name}": download it again') from None
    if dtype not in DTYPES:
        raise CheckpointError(f'{path}: "{name}" has the unsupported dtype {dtype} (supported: {", ".join(DTYPES)})')
    if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointError(f'{path}: the size of "{name}" contradicts its shape {list(shape)}: download it again')
    if data + end > size:
        raise CheckpointError(
            f'{path} is truncated: "{name}" ends {data + end - size} bytes after the end of the file. Download it again'
        )
    return Entry(path, dtype, shape, data + begin)


def shards_of(path: Path) -> dict[str, str]:
    """The files of an index by tensor name. Raises CheckpointError if one of them does not exist."""
    try:
        files: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(files.values()))
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f'{path} is damaged: it must map tensors to files in "weight_map"') from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or shard == "..":
            raise CheckpointError(f"{path} refers to a file outside of its directory: {shard!r}")
        if not (path.parent / shard).is_file():
            raise CheckpointError(f"{path.parent / shard} is missing, though {path.name} lists it: download it")
    return files


def read_index(path: Path) -> dict[str, Entry]:
    """Read where the tensors of all shards of an index are stored. Raises CheckpointError."""
    files = shards_of(path)
    headers = {shard: read_header(path.parent / shard) for shard in sorted(set(files.values()))}
    missing = [name for name, shard in files.items() if name not in headers[shard]]
    if missing:
        raise CheckpointError(
            f'{path.parent / files[missing[0]]} has no tensor "{missing[0]}", though {path.name} lists it'
        )
    return {name: headers[shard][name] for name, shard in files.items()}


class ShardWriter:
    """Writes tensors in the order of `shapes` to shards, with at most two tensors in memory.

    Writes one file `model.safetensors` if everything fits into `shard_bytes`, else
    `model-00001-of-0000n.safetensors`, ... and an index. `dtype`: one of DTYPES for all tensors, or one for each; wider
    dtypes must come first, so that all values are aligned. A background thread writes while the caller reads the next
    tensor. Use it as a context manager; after an error the caller removes the directory.
    """

    def __init__(
        self, directory: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str | Mapping[str, str], shard_bytes: int
    ) -> None:
        self._directory, self._shapes = directory, dict(shapes)
        self._dtypes = dict.fromkeys(shapes, dtype) if isinstance(dtype, str) else {n: dtype[n] for n in shapes}
        widths = [DTYPES[one].itemsize for one in self._dtypes.values()]
        if widths != sorted(widths, reverse=True):
            raise ValueError("tensors of wider dtypes must come first")
        self._bytes = {n: math.prod(shape) * DTYPES[self._dtypes[n]].itemsize for n, shape in self._shapes.items()}
        shards = _cut(self._bytes, shard_bytes)
        n = len(shards)
        files = [f"model-{k:05}-of-{n:05}.safetensors" for k in range(1, n + 1)] if n > 1 else [SAFETENSORS]
        self._shards = dict(zip(files, shards, strict=True))  # file -> names of its tensors
        self._order = iter([(name, file) for file, inside in self._shards.items() for name in inside])
        self._file: IO[bytes] | None = None
        self._shard = ""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="molmo-edge-write")
        self._pending: Future[None] | None = None

    def write(self, name: str, values: np.ndarray) -> None:
        """Write the next tensor, in its declared dtype (bfloat16 as uint16)."""
        expected, shard = next(self._order)
        if name != expected or values.shape != self._shapes[name] or values.dtype != DTYPES[self._dtypes[name]]:
            raise ValueError(f"expected {expected}, got {name} {values.dtype} {list(values.shape)}")
        self._wait()
        self._pending = self._pool.submit(self._append, shard, np.ascontiguousarray(values))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._wait()
                if (missing := next(self._order, None)) is not None:
                    raise ValueError(f"{missing[0]} was never written")
                if len(self._shards) > 1:
                    self._write_index()
        finally:
            self._pool.shutdown()
            if self._file is not None:
                self._file.close()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _append(self, shard: str, values: np.ndarray) -> None:
        if self._file is None or shard != self._shard:
            if self._file is not None:
                self._file.close()
            with contextlib.ExitStack() as stack:  # closes the file only if its header cannot be written
                file = stack.enter_context((self._directory / shard).open("xb"))
                file.write(self._header(self._shards[shard]))
                self._file, self._shard = file, shard
                stack.pop_all()
        self._file.write(values.reshape(-1).view(np.uint8).data)

    def _header(self, names: list[str]) -> bytes:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # other loaders require it
        offset = 0
        for name in names:
            end = offset + self._bytes[name]
            header[name] = {
                "dtype": self._dtypes[name],
                "shape": list(self._shapes[name]),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # align the data to eight bytes
        return struct.pack("<Q", len(text)) + text

    def _write_index(self) -> None:
        where = {name: shard for shard, names in self._shards.items() for name in names}
        index = {"metadata": {"total_size": sum(self._bytes.values())}, "weight_map": dict(sorted(where.items()))}
        (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _cut(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Distribute tensors of `sizes` bytes to shards. Returns the names in each shard."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
