"""Read the header of a GGUF and refuse a damaged file, or one of another model, before llama.cpp loads it.

llama.cpp aborts the process for some invalid files and accepts others: a file for another tokenizer gives wrong
answers. This reader is also robust against hostile input. Format: ggml/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo_edge.checkpoints.gguf_layout import architecture, decoder_tensors, shape_metadata, token_names
from molmo_edge.checkpoints.manifest import BundleError
from molmo_edge.config import DecoderConfig, MolmoConfig
from molmo_edge.frontend.tokenizer import Tokenizer

_MAGIC, _F32 = b"GGUF", 0
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST = {"entries": 100_000, "tensors": 100_000, "dimensions": 4, "string": 1 << 24}

# ggml's types of weights: weights per block, bytes per block. The gguf package has the same table, but is not needed to
# run a bundle.
TYPE_SIZES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF, as its header describes it."""

    shape: tuple[int, ...]  # in numpy's order
    kind: int  # ggml's number for its type
    offset: int  # bytes after the header
    size: int  # bytes


@dataclass(frozen=True)
class GgufHeader:
    """The metadata and the tensors that the header of a GGUF lists."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> GgufHeader:
    """Read the header. Raises BundleError for a file that is not a GGUF, is truncated or is inconsistent."""
    try:
        size = path.stat().st_size
        if size < 24:
            raise _not_gguf(path)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Reader(data, path), size, path)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, struct.error, OverflowError, MemoryError) as error:
        raise _damaged(path, str(error)) from None


def check_decoder(path: Path, config: MolmoConfig, tokenizer: Tokenizer) -> GgufHeader:
    """Read the header of a GGUF of this model's decoder. Raises BundleError that names what does not match."""
    d, header = config.decoder, read_header(path)
    found = header.metadata.get("general.architecture")
    if found != architecture(d):
        raise _foreign(path, f'its architecture is "{found}", this model needs "{architecture(d)}"')
    for key, value in shape_metadata(config).items():
        found = header.metadata.get(key)
        if isinstance(value, str):
            same = found == value
        else:
            same = isinstance(found, (int, float)) and math.isclose(found, value, rel_tol=1e-6)
        if not same:
            raise _foreign(path, f"its {key} is {found}, this model's is {value}")
    # Additional keys of the architecture change the computation, and some abort the process.
    if more := sorted(
        key for key in header.metadata if key.startswith(f"{architecture(d)}.") and key not in shape_metadata(config)
    ):
        raise _foreign(path, f"it has the key {more[0]}, which this model does not have")
    wanted = {tensor.name: tensor for tensor in decoder_tensors(config)}
    for name, tensor in wanted.items():
        found = header.tensors.get(name)
        if found is None:
            raise _foreign(path, f"it has no tensor {name}")
        if found.shape != tensor.shape:
            raise _foreign(path, f"its {name} is {found.shape}, this model's is {tensor.shape}")
        if tensor.exact and found.kind != _F32:
            raise _foreign(path, f"its {name} is not in float32")
    if unknown := sorted(set(header.tensors) - set(wanted)):
        raise _foreign(path, f"it has a tensor {unknown[0]}, which this model does not have")
    _check_tokens(path, header.metadata, d, tokenizer)
    return header


def _check_tokens(path: Path, metadata: dict[str, Any], d: DecoderConfig, tokenizer: Tokenizer) -> None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or not isinstance(tokens, list):
        raise _foreign(path, "its tokenizer is not a byte-level BPE")
    if len(tokens) != d.n_logits:
        raise _foreign(path, f"its tokenizer has {len(tokens)} tokens, this model has {d.n_logits}")
    for i, (found, wanted) in enumerate(zip(tokens, token_names(tokenizer, d), strict=True)):
        if found != wanted:
            raise _foreign(path, f"its tokenizer differs: token {i} is {found!r}, this model's is {wanted!r}")
    for key in ("bos_token_id", "eos_token_id"):
        if (found := metadata.get(f"tokenizer.ggml.{key}")) != tokenizer.special.eos:
            raise _foreign(path, f"its {key} is {found}, this tokenizer's is {tokenizer.special.eos}")


def _not_gguf(path: Path) -> BundleError:
    return BundleError(f"{path} is not a GGUF file: fetch or export the bundle again")


def _damaged(path: Path, why: str) -> BundleError:
    return BundleError(f"{path} is damaged ({why}): fetch or export the bundle again")


def _foreign(path: Path, why: str) -> BundleError:
    return BundleError(f"{path} does not belong to this bundle: {why}. Fetch or export the bundle again")


class _Reader:
    """Reads values from the mapped file. The data of tensors is never read."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path, self.at = data, path, 0

    def raw(self, count: int) -> bytes:
        if count > len(self._data) - self.at:
            raise _damaged(self._path, "it ends in the middle of the header")
        self.at += count
        return self._data[self.at - count : self.at]

    def scalar(self, kind: int) -> Any:
        if kind not in _SCALARS:
            raise _damaged(self._path, f"it has a value of unknown type {kind}")
        form = f"<{_SCALARS[kind]}"
        return struct.unpack(form, self.raw(struct.calcsize(form)))[0]

    def count(self, what: str) -> int:
        """Read a count, which can be larger neither than `_MOST` nor than the file."""
        number: int = self.scalar(4 if what == "dimensions" else 10)
        if number > min(_MOST.get(what, len(self._data)), len(self._data)):
            raise _damaged(self._path, f"it claims to have {number} {what}")
        return number

    def string(self) -> str:
        return self.raw(self.count("string")).decode("utf-8")

    def strings(self, count: int) -> list[str]:
        """Like `string`, optimised for the hundreds of thousands of tokens and merges of a vocabulary."""
        data, at, size, length, found = self._data, self.at, len(self._data), struct.Struct("<Q"), []
        for _ in range(count):
            n = length.unpack_from(data, at)[0] if at + 8 <= size else size
            if at + 8 + n > size:
                raise _damaged(self._path, "it ends in the middle of the header")
            found.append(data[at + 8 : at + 8 + n])
            at += 8 + n
        self.at = at
        return [text.decode("utf-8") for text in found]

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(kind)
        inner, length = self.scalar(4), self.count("array")
        if inner == _STRING:
            return self.strings(length)
        if inner not in _SCALARS:
            raise _damaged(self._path, f"it has an array of unknown type {inner}")
        form = f"<{length}{_SCALARS[inner]}"
        return list(struct.unpack(form, self.raw(struct.calcsize(form))))


def _read(reader: _Reader, size: int, path: Path) -> GgufHeader:
    if reader.raw(4) != _MAGIC:
        raise _not_gguf(path)
    version = reader.scalar(4)
    if version not in (2, 3):
        raise BundleError(f"{path} has GGUF version {version} (supported: 2 and 3, little-endian)")
    n_tensors, n_entries = reader.count("tensors"), reader.count("entries")
    metadata: dict[str, Any] = {}
    for _ in range(n_entries):
        key = reader.string()
        metadata[key] = reader.value(reader.scalar(4))
    tensors: dict[str, TensorInfo] = {}
    for _ in range(n_tensors):
        name = reader.string()
        dimensions = [reader.scalar(10) for _ in range(reader.count("dimensions"))]
        kind, offset = reader.scalar(4), reader.scalar(10)
        if name in tensors or not dimensions or min(dimensions) < 1:
            raise _damaged(path, f"its tensor {name} has the shape {dimensions}, or occurs twice")
        if kind not in TYPE_SIZES:
            raise BundleError(
                f"{path}: {name} has the ggml type {kind}, which is not supported: pip install --upgrade molmo-edge"
            )
        block, bytes_ = TYPE_SIZES[kind]
        if dimensions[0] % block:
            raise _damaged(path, f"the row length of its tensor {name} is not a multiple of its block size {block}")
        tensors[name] = TensorInfo(tuple(reversed(dimensions)), kind, offset, math.prod(dimensions) // block * bytes_)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment % 8:
        raise _damaged(path, f"its alignment is {alignment}")
    start = -(-reader.at // alignment) * alignment
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset % alignment or start + tensor.offset < end:
            raise _damaged(path, f"its tensor {name} overlaps another one")
        end = start + tensor.offset + tensor.size
        if end > size:
            raise _damaged(path, f"its tensor {name} ends {end - size} bytes after the end of the file")
    return GgufHeader(metadata, tensors)
