"""The decoder as a GGUF for llama.cpp's own graphs: olmoe, qwen2 and olmo2.

The tensors are written in 16 or 32 bits; molmo_edge.quantize.llama_quantize makes smaller types of them. The file is a
complete language model with its tokenizer: any program that uses llama.cpp can chat with it in text. Images enter as
embeddings from the graphs beside it (molmo_edge.runtimes.llama).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from molmo_edge.checkpoints.gguf_layout import GgufTensor, architecture, decoder_tensors, shape_metadata
from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.export.errors import ExportError
from molmo_edge.export.gguf_vocab import add_vocabulary
from molmo_edge.export.gguf_writer import TensorEntry, open_writer, write_tensors
from molmo_edge.export.precisions import GGUF_FLOATS
from molmo_edge.export.safetensors_checkpoint import round_to_bfloat16
from molmo_edge.export.staging import check_disk
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.quantize.llama_quantize import quantize_gguf

FLOAT16_MAX = float(np.finfo(np.float16).max)


class Float16OverflowError(ExportError):
    """A weight exceeds float16's range."""


def export_decoder(
    directory: Path,
    scratch: Path,
    tokenizer: Tokenizer,
    config: MolmoConfig,
    tensors: TensorSource,
    precision: str,
    name: str,
    importance: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write the decoder to `directory` in `precision`, one of GGUF_PRECISIONS.

    Quantised types are made from a 16-bit file in `scratch`. Raises the errors of `write_decoder` and `quantize_gguf`,
    and ExportError if the disk is too small.
    """
    path = directory / f"decoder-{precision}.gguf"
    layout = list(decoder_tensors(config))
    weights = sum(tensor.weights for tensor in layout)
    if precision in GGUF_FLOATS:
        check_disk(directory, _bytes_per_weight(precision) * weights)
        write_decoder(path, tokenizer, config, tensors, precision, name)
        return path
    # bfloat16 loses nothing of a bfloat16 checkpoint; of others float16 keeps far more than the quantised types do.
    stored = {tensors.dtype(part.hub) for tensor in layout if not tensor.exact for part in tensor.parts[:1]}
    unquantized, dtype = scratch / path.name, "bf16" if stored == {"BF16"} else "f16"
    check_disk(directory, 3 * weights)  # 16 bits, and at most 8 for the quantised file
    try:
        write_decoder(unquantized, tokenizer, config, tensors, dtype, name)
    except Float16OverflowError:
        unquantized.unlink()
        check_disk(directory, 5 * weights)
        write_decoder(unquantized, tokenizer, config, tensors, "f32", name)
    quantize_gguf(unquantized, path, precision, importance)
    unquantized.unlink()
    return path


def write_decoder(
    path: Path, tokenizer: Tokenizer, config: MolmoConfig, tensors: TensorSource, dtype: str, name: str
) -> None:
    """Write the decoder to `path` in `dtype`, one of GGUF_FLOATS.

    Memory holds one tensor; of experts one matrix of all experts in a layer. Raises NoGraphError if llama.cpp has no
    graph for this decoder, ExportError if it cannot tokenize like this tokenizer, and Float16OverflowError.
    """
    d = config.decoder
    file_type = LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"]
    with open_writer(path, architecture=architecture(d), content="model", name=name, file_type=file_type) as writer:
        for key, value in shape_metadata(config).items():
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            else:
                writer.add_uint32(key, value)
        add_vocabulary(writer, tokenizer, d)
        write_tensors(writer, [_entry(tensor, tensors, dtype) for tensor in decoder_tensors(config)])


def _bytes_per_weight(dtype: str) -> int:
    return GGML_QUANT_SIZES[GGMLQuantizationType[dtype.upper()]][1]


def _entry(tensor: GgufTensor, tensors: TensorSource, dtype: str) -> TensorEntry:
    dtype = "f32" if tensor.exact else dtype
    load = partial(_values, tensor, tensors, dtype)
    return TensorEntry(tensor.name, tensor.shape, GGMLQuantizationType[dtype.upper()], load)


def _values(tensor: GgufTensor, tensors: TensorSource, dtype: str) -> np.ndarray:
    if not tensor.parts:
        return _round(np.zeros(tensor.shape, np.float32), dtype, tensor.name)
    parts = []
    for part in tensor.parts:
        rows = slice(part.start, None if part.rows is None else part.start + part.rows)
        parts.append(_round(tensors.get(part.hub)[rows], dtype, part.hub))
    if len(parts) == 1:
        return parts[0]
    return np.stack(parts) if len(tensor.shape) == 3 else np.concatenate(parts)


def _round(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    if dtype == "bf16":
        return round_to_bfloat16(values)
    if dtype == "f16" and np.abs(values).max(initial=0.0) > FLOAT16_MAX:
        raise Float16OverflowError(f"{name} has weights beyond float16's range: choose bf16 or f32")
    return np.asarray(values, np.float16 if dtype == "f16" else np.float32)
