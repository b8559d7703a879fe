"""Write a GGUF tensor by tensor, so that memory holds one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType

from molmo_edge.system.version import __version__


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to write, whose values are loaded when their turn comes."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    load: Callable[[], np.ndarray]  # the values, in the bytes of `type`

    @property
    def bytes(self) -> int:
        """Size of the values in the file."""
        values, size = GGML_QUANT_SIZES[self.type]  # of a block
        return math.prod(self.shape) // values * size


@contextmanager
def open_writer(
    path: Path, *, architecture: str, content: str, name: str, file_type: LlamaFileType
) -> Iterator[GGUFWriter]:
    """A writer with the general metadata. `content`: "model" or "mmproj"."""
    writer = GGUFWriter(path, architecture)
    try:
        writer.add_type(content)
        writer.add_name(name)
        writer.add_file_type(file_type)
        writer.add_string("molmo_edge.created_by", f"molmo-edge {__version__}")
        yield writer
    finally:
        writer.close()


def write_header(writer: GGUFWriter) -> None:
    """Write the header, the metadata and the list of tensors that were added to `writer`."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def write_tensors(writer: GGUFWriter, tensors: Sequence[TensorEntry]) -> None:
    """Write the header, which lists all tensors, and then their values."""
    for tensor in tensors:
        # The dtype only distinguishes numbers from packed blocks; raw_dtype is what the file states.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, raw_dtype=tensor.type)
    write_header(writer)
    for tensor in tensors:
        writer.write_tensor_data(np.ascontiguousarray(tensor.load().reshape(tensor.shape)))
