"""The protocol through which weights are read, one tensor at a time by hub name, and its basic implementations.

A 29 GB checkpoint is processed in the memory of its largest tensor. Only pickles need torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from molmo_edge.errors import MolmoEdgeError

if TYPE_CHECKING:
    from molmo_edge.config import MolmoConfig

# Float types by their safetensors names. numpy has no bfloat16: its bits are passed as uint16.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


class CheckpointError(MolmoEdgeError):
    """A checkpoint that is missing, truncated, or of another format or model."""


class TensorSource(Protocol):
    """A source of weights by hub name ("model.transformer...")."""

    def names(self) -> list[str]:
        """The hub names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises CheckpointError for an unknown name."""
        ...

    def dtype(self, name: str, /) -> str:
        """The type that the tensor is stored in, one of DTYPES."""
        ...

    def file(self, name: str) -> Path:
        """The file that contains the tensor, for error messages."""
        ...

    def raw(self, name: str) -> np.ndarray:
        """The tensor as stored, bfloat16 as uint16. Not shared with other calls; may be read-only."""
        ...

    def get(self, name: str) -> np.ndarray:
        """The tensor as float32."""
        ...


@dataclass(frozen=True)
class Changed:
    """A TensorSource with the names and shapes of another one, whose tensors `change(name)` computes as float32.

    `aliases`: further tensors, each with the name of the one whose shape and file it has.
    """

    tensors: TensorSource
    change: Callable[[str], np.ndarray]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Implement `TensorSource.names`."""
        return [*self.tensors.names(), *self.aliases]

    def shape(self, name: str) -> tuple[int, ...]:
        """Implement `TensorSource.shape`."""
        return self.tensors.shape(self.aliases.get(name, name))

    def dtype(self, _name: str, /) -> str:
        """Implement `TensorSource.dtype`: changed tensors are float32."""
        return "F32"

    def file(self, name: str) -> Path:
        """Implement `TensorSource.file`."""
        return self.tensors.file(self.aliases.get(name, name))

    def raw(self, name: str) -> np.ndarray:
        """Implement `TensorSource.raw`: the changed tensor in float32."""
        return self.get(name)

    def get(self, name: str) -> np.ndarray:
        """Implement `TensorSource.get`: the changed tensor."""
        return np.asarray(self.change(name), np.float32)


@dataclass(frozen=True)
class Entry:
    """Where one tensor is stored."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    strides: tuple[int, ...] | None = None  # in values; None: contiguous


class FileSource:
    """A TensorSource that reads tensors from files on demand."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self._entries = entries

    def names(self) -> list[str]:
        """Implement `TensorSource.names`."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Implement `TensorSource.shape`."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """Implement `TensorSource.dtype`."""
        return self._entry(name).dtype

    def file(self, name: str) -> Path:
        """Implement `TensorSource.file`."""
        return self._entry(name).path

    def raw(self, name: str) -> np.ndarray:
        """Implement `TensorSource.raw`."""
        # Read, not mapped: pages of a mapped file count as memory of the process, and Linux refuses to map a file for
        # writing, as torch.load does, that is larger than the machine's memory.
        e = self._entry(name)
        strides = e.strides or _row_by_row(e.shape)
        span = 0 if 0 in e.shape else 1 + sum((n - 1) * step for n, step in zip(e.shape, strides, strict=True))
        flat: np.ndarray = np.fromfile(e.path, DTYPES[e.dtype], span, offset=e.offset)
        if len(flat) != span:
            raise CheckpointError(f'{e.path} was truncated while "{name}" was read')
        if strides == _row_by_row(e.shape):
            return flat.reshape(e.shape)
        size = flat.itemsize
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, e.shape, [size * step for step in strides]))

    def get(self, name: str) -> np.ndarray:
        """Implement `TensorSource.get`."""
        return widen(self.raw(name), self._entry(name).dtype)

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise CheckpointError(
                f'the checkpoint has no tensor "{name}": does its config.json belong to these weights?'
            )
        return self._entries[name]


def _row_by_row(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def widen(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Convert a result of `TensorSource.raw` to float32."""
    if dtype == "BF16":  # the upper half of a float32
        wide = raw.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return np.asarray(raw, dtype=np.float32)


def check_tensors(config: MolmoConfig, source: TensorSource, *, where: str | Path) -> dict[str, tuple[int, ...]]:
    """Check that `source` has every tensor of a model with `config`, in its shape. Returns the shapes by hub name.

    Reads only headers. Raises CheckpointError that names the file and the tensor.
    """
    from molmo_edge.checkpoints.tensor_names import hub_shapes

    known, shapes = set(source.names()), hub_shapes(config)
    for name, shape in shapes.items():
        if name not in known:
            raise CheckpointError(f"{where} has no tensor {name}: the download may be incomplete")
        if source.shape(name) != shape:
            raise CheckpointError(
                f"{source.file(name)}: tensor {name} has shape {list(source.shape(name))}, "
                f"but the configuration requires {list(shape)}"
            )
    return shapes


def stored_bytes(source: TensorSource, names: Iterable[str]) -> int:
    """Total size of the named tensors as stored, in bytes."""
    return sum(math.prod(source.shape(name)) * DTYPES[source.dtype(name)].itemsize for name in names)
