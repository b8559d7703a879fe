"""Files of named arrays in the safetensors format, with metadata and a SHA-256 of everything in them.

Reading runs no code from the file, and allocates no more than the file's size.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.system.files import atomic_write

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 10_000_000  # bytes
_HASH = "sha256"  # the metadata's key for the hash of the file
_NO_HASH = "?" * 64  # in its place while it is computed


class TensorFileError(MolmoEdgeError):
    """A file of arrays that is damaged, truncated or of another kind. The message does not name the file."""


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write `arrays` and `metadata` to `path`, which is replaced at once when they are complete. Raises OSError.

    Supports float32, float16, int64, int32, int16, uint8, int8 and bool.
    """
    # Wider dtypes first, so that all values are aligned.
    order = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)
    packed = {name: np.ascontiguousarray(arrays[name]) for name in order}
    header: dict[str, Any] = {}
    offset = 0
    for name, array in packed.items():
        end = offset + array.nbytes
        dtype = _NAMES[array.dtype.newbyteorder("<")]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": {**metadata, _HASH: _NO_HASH}, **header}).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256(text)
    for array in packed.values():
        digest.update(_bytes(array))
    text = text.replace(_NO_HASH.encode(), digest.hexdigest().encode())
    with atomic_write(path) as part, part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in packed.values():
            file.write(_bytes(array))


def read_metadata(path: Path) -> dict[str, str]:
    """Read only the metadata of a file, and do not verify its hash. Raises TensorFileError, and OSError."""
    with path.open("rb") as file:
        return _header(file, path.stat().st_size)[0]


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the arrays and the metadata of a file that `write_arrays` wrote. Raises TensorFileError, and OSError."""
    with path.open("rb") as file:
        metadata, header, text = _header(file, path.stat().st_size)
        expected, arrays = metadata.pop(_HASH, ""), {}
        digest = hashlib.sha256(text.replace(expected.encode(), _NO_HASH.encode()) if len(expected) == 64 else text)
        for name, info in header.items():
            array: np.ndarray = np.empty(info["shape"], _DTYPES[info["dtype"]])
            if file.readinto(_bytes(array)) != array.nbytes:
                raise TensorFileError("it is truncated")
            digest.update(_bytes(array))
            arrays[name] = array
    if digest.hexdigest() != expected:
        raise TensorFileError("it is damaged: its contents do not have the SHA-256 that it states")
    return arrays, metadata


def _header(file: IO[bytes], size: int) -> tuple[dict[str, str], dict[str, Any], bytes]:
    """The metadata, the checked entries of the arrays in the order of their data, and the header's bytes.

    `file` is then at the first array.
    """
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise TensorFileError("it is not in the safetensors format, or it is truncated")
    try:
        text = file.read(length)
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        offset = 0
        for info in header.values():
            shape, (begin, end) = info["shape"], info["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in shape) or begin != offset:
                raise ValueError
            if end - begin != math.prod(shape) * _DTYPES[info["dtype"]].itemsize:
                raise ValueError
            offset = end
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise TensorFileError("its header is damaged") from None
    if 8 + length + offset != size:
        raise TensorFileError(f"it is truncated or damaged: it has {size} bytes instead of {8 + length + offset}")
    return metadata, header, text


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
