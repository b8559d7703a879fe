"""Where weights come from: one protocol over safetensors shards, MolmoE's pickle and the reference's own folders.

Tensors are named as on the hub, read one at a time, and never all held: a 29 GB checkpoint passes through the
memory of its largest tensor. Only the pickles need torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from molmo_edge.errors import MolmoEdgeError

if TYPE_CHECKING:
    from molmo_edge.config import MolmoConfig

# Of float tensors, by the names that safetensors gives them. numpy has no bfloat16: its bits travel as uint16.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


class CheckpointError(MolmoEdgeError):
    """A checkpoint that is missing, cut short, or not what its name says."""


class TensorSource(Protocol):
    """Where an exporter or a loader takes weights from, by their hub names ("model.transformer...")."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str, /) -> str:
        """The type that the tensor is stored in, one of DTYPES."""
        ...

    def file(self, name: str) -> Path:
        """The file that holds the tensor, to be named in an error."""
        ...

    def raw(self, name: str) -> np.ndarray:
        """The tensor as stored, bfloat16 as uint16, in memory of its own. It may be read-only."""
        ...

    def get(self, name: str) -> np.ndarray:
        """The tensor as float32."""
        ...


@dataclass(frozen=True)
class Changed:
    """A TensorSource over another of the same names and shapes, whose tensors `change` gives, float32 by their name."""

    tensors: TensorSource
    change: Callable[[str], np.ndarray]

    def names(self) -> list[str]:
        return self.tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.shape(name)

    def dtype(self, _name: str, /) -> str:
        return "F32"

    def file(self, name: str) -> Path:
        return self.tensors.file(name)

    def raw(self, name: str) -> np.ndarray:
        return self.get(name)

    def get(self, name: str) -> np.ndarray:
        return np.asarray(self.change(name), np.float32)


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    strides: tuple[int, ...] | None = None  # values from one index to the next; None: row by row


class FileSource:
    """A TensorSource over entries of files, each read when it is asked for."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self._entries = entries

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        return self._entry(name).dtype

    def file(self, name: str) -> Path:
        return self._entry(name).path

    def raw(self, name: str) -> np.ndarray:
        # Read, not mapped: pages of a mapped file stay with the process and count as its memory, and Linux refuses
        # to map a file writably, as torch.load would, that is larger than the machine's memory.
        e = self._entry(name)
        strides = e.strides or _row_by_row(e.shape)
        span = 0 if 0 in e.shape else 1 + sum((n - 1) * step for n, step in zip(e.shape, strides, strict=True))
        flat: np.ndarray = np.fromfile(e.path, DTYPES[e.dtype], span, offset=e.offset)
        if len(flat) != span:
            raise CheckpointError(f'{e.path} became shorter while "{name}" was read from it')
        if strides == _row_by_row(e.shape):
            return flat.reshape(e.shape)
        size = flat.itemsize
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, e.shape, [size * step for step in strides]))

    def get(self, name: str) -> np.ndarray:
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
    """What `TensorSource.raw` gave, as float32."""
    if dtype == "BF16":  # the upper half of a float32
        wide = raw.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return np.asarray(raw, dtype=np.float32)


def check_tensors(config: MolmoConfig, source: TensorSource, *, where: str | Path) -> dict[str, tuple[int, ...]]:
    """Every tensor that `config` asks for is there and has its shape; returns the shapes by hub name.

    Only headers are read. Raises CheckpointError that names the file and the tensor.
    """
    from molmo_edge.checkpoints.tensor_names import hub_shapes

    known, shapes = set(source.names()), hub_shapes(config)
    for name, shape in shapes.items():
        if name not in known:
            raise CheckpointError(f"{where} has no tensor {name}: the download may be incomplete")
        if source.shape(name) != shape:
            raise CheckpointError(
                f"{source.file(name)}: tensor {name} has shape {list(source.shape(name))}, "
                f"but its configuration asks for {list(shape)}"
            )
    return shapes


def stored_bytes(source: TensorSource, names: Iterable[str]) -> int:
    """What the named tensors take as they are stored."""
    return sum(math.prod(source.shape(name)) * DTYPES[source.dtype(name)].itemsize for name in names)
