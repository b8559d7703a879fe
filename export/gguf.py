"""The decoder as a GGUF in llama.cpp's own names, for its own graphs: olmoe, qwen2 and olmo2.

Written tensor by tensor in 16 or 32 bits; molmo_edge.quantize.llama_quantize makes fewer of them. The file is a
whole language
model with its tokenizer, which any program on llama.cpp can chat with in text; images enter as embeddings, from the
graphs beside it (molmo_edge.runtimes.llama).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

from molmo_edge.checkpoints.gguf_layout import GgufTensor, architecture, decoder_tensors, shape_metadata
from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.export.errors import ExportError
from molmo_edge.export.gguf_vocab import add_vocabulary
from molmo_edge.export.safetensors_checkpoint import round_to_bfloat16
from molmo_edge.export.staging import check_disk
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.quantize.llama_quantize import FLOATS, quantize_gguf
from molmo_edge.system.version import __version__

_FLOATS = {
    "f32": (4, GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (2, GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (2, GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
_LARGEST = 65504.0  # of float16


class TooLargeForFloat16Error(ExportError):
    """A weight beyond 65504."""


def export_decoder(
    directory: Path,
    scratch: Path,
    tokenizer: Tokenizer,
    config: MolmoConfig,
    tensors: TensorSource,
    word: str,
    name: str,
    importance: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """The decoder in `directory` in one of GGUF_WORDS, by way of 16 bits in `scratch` where it is rounded.

    Raises as `write_decoder` and `quantize_gguf` do, and ExportError where the disk
    has no room.
    """
    path = directory / f"decoder-{word}.gguf"
    listed = list(decoder_tensors(config.decoder))
    weights = sum(tensor.weights for tensor in listed)
    if word in FLOATS:
        check_disk(directory, _FLOATS[word][0] * weights)
        write_decoder(path, tokenizer, config, tensors, word, name)
        return path
    # By way of 16 bits: a bfloat16 checkpoint's own, and of others float16's, which keep far more than is left after.
    stored = {tensors.dtype(tensor.parts[0].hub) for tensor in listed if not tensor.exact}
    whole, kind = scratch / path.name, "bf16" if stored == {"BF16"} else "f16"
    check_disk(directory, 3 * weights)  # 16 bits, and the 8 or fewer that are made of them
    try:
        write_decoder(whole, tokenizer, config, tensors, kind, name)
    except TooLargeForFloat16Error:
        whole.unlink()
        check_disk(directory, 5 * weights)
        write_decoder(whole, tokenizer, config, tensors, "f32", name)
    quantize_gguf(whole, path, word, importance)
    whole.unlink()
    return path


def write_decoder(
    path: Path, tokenizer: Tokenizer, config: MolmoConfig, tensors: TensorSource, kind: str, name: str
) -> None:
    """Write the decoder to `path` in `kind`, "f32", "f16" or "bf16".

    Memory holds one tensor, for experts those of one kind in a layer. Raises NoGraphError where llama.cpp has no graph
    for it, ExportError where it has no way to cut its texts, TooLargeForFloat16Error for weights beyond that.
    """
    d = config.decoder
    listed = list(decoder_tensors(d))
    writer = GGUFWriter(path, architecture(d))
    try:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(_FLOATS[kind][2])
        writer.add_string("molmo_edge.created_by", f"molmo-edge {__version__}")
        for key, value in shape_metadata(d).items():
            if isinstance(value, float):
                writer.add_float32(key, value)
            else:
                writer.add_uint32(key, value)
        add_vocabulary(writer, tokenizer, d)
        for tensor in listed:
            size, raw, _ = _FLOATS["f32" if tensor.exact else kind]
            # The dtype only tells numbers from packed blocks; what is stored is `raw`.
            bytes_ = size * tensor.weights
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), bytes_, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in listed:
            writer.write_tensor_data(_values(tensor, tensors, "f32" if tensor.exact else kind))
    finally:
        writer.close()


def _values(tensor: GgufTensor, tensors: TensorSource, kind: str) -> np.ndarray:
    parts = []
    for part in tensor.parts:
        rows = slice(part.start, None if part.rows is None else part.start + part.rows)
        parts.append(_narrow(tensors.get(part.hub)[rows], kind, part.hub))
    values = parts[0] if len(parts) == 1 else np.stack(parts)
    return np.ascontiguousarray(values.reshape(tensor.shape))


def _narrow(values: np.ndarray, kind: str, name: str) -> np.ndarray:
    if kind == "bf16":
        return round_to_bfloat16(values)
    if kind == "f16" and np.abs(values).max(initial=0.0) > _LARGEST:
        raise TooLargeForFloat16Error(f"{name} has weights that float16 cannot hold: choose bf16 or f32")
    return np.asarray(values, np.float16 if kind == "f16" else np.float32)
