"""Convert a checkpoint to sharded safetensors in hub layout, so that a pickle is opened only once.

One tensor is converted while the one before it is written, so memory does not grow with the model.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from molmo_edge.checkpoints.hub_config import write_hub_config
from molmo_edge.checkpoints.manifest import TOKENIZER
from molmo_edge.checkpoints.safetensors_files import ShardWriter
from molmo_edge.checkpoints.tensor_names import hub_shapes
from molmo_edge.checkpoints.tensor_sources import DTYPES, TensorSource, widen
from molmo_edge.export.errors import ExportError
from molmo_edge.export.precisions import SAFETENSORS_PRECISIONS
from molmo_edge.export.source import open_source
from molmo_edge.export.staging import publish, staged
from molmo_edge.frontend.tokenizer import Tokenizer

SHARD_BYTES = 5_000_000_000  # the default of the hub's libraries
_CHUNK = 1 << 16  # values, which fit into the processor's cache
_COPIED_FILES = ("generation_config.json", "LICENSE", "tokenizer_config.json", "special_tokens_map.json")


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    precision: str = "bf16",
    *,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Convert a checkpoint directory, in hub layout or the reference's own, or a bundle to safetensors in hub layout.

    `precision`: "bf16" or "fp32". `out` must not exist yet, and is created atomically. `on_progress` is called
    with the number of values written and their total. Returns the weight files.

    Raises ExportError for unknown options or a disk that is too small, and CheckpointError, ConfigError or
    TokenizerError for an incomplete checkpoint, before any weight is read.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    check_checkpoint_options(out, precision)
    if shard_bytes <= 0:
        raise ExportError(f"shard_bytes must be positive, not {shard_bytes}")
    dtype = SAFETENSORS_PRECISIONS[precision]
    config, tensors = open_source(checkpoint)
    tokenizer = Tokenizer.from_file(checkpoint / TOKENIZER)
    shapes = hub_shapes(config)
    total = sum(math.prod(shape) for shape in shapes.values())
    with staged(out, total * DTYPES[dtype].itemsize) as scratch:
        staging = scratch / "checkpoint"
        staging.mkdir()
        done = 0
        with ShardWriter(staging, shapes, dtype, shard_bytes) as writer:
            for name, shape in shapes.items():
                writer.write(name, _convert(tensors, name, dtype))
                done += math.prod(shape)
                if on_progress is not None:
                    on_progress(done, total)
        write_hub_config(config, staging, tokenizer.special)
        for name in (TOKENIZER, *_COPIED_FILES):
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, staging / name)
        publish(staging, out)
    return sorted(out.glob("model*.safetensors"))


def check_checkpoint_options(out: Path, precision: str) -> None:
    """Raise ExportError for options of `export_checkpoint` that cannot be met, before a checkpoint is downloaded."""
    if precision not in SAFETENSORS_PRECISIONS:
        supported = ", ".join(SAFETENSORS_PRECISIONS)
        raise ExportError(f"{precision!r} is not a supported precision for safetensors (supported: {supported})")
    if out.exists():
        raise ExportError(f"{out} exists already: remove it, or choose another directory")


def _convert(tensors: TensorSource, name: str, dtype: str) -> np.ndarray:
    raw, stored = tensors.raw(name), tensors.dtype(name)
    if stored == dtype:
        return raw
    values = widen(raw, stored)
    return values if dtype == "F32" else round_to_bfloat16(values)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits as uint16, rounded to nearest even. Overflow gives infinity, NaN stays NaN."""
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    rounded = np.empty(flat.shape, np.uint16)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        bits = part.view(np.uint32)
        half = (bits >> 16) & 1
        half += bits
        half += 0x7FFF
        rounded[start : start + _CHUNK] = half >> 16
        if np.isnan(part.min()):
            rounded[start : start + _CHUNK][np.isnan(part)] = 0x7FC0
    return rounded.reshape(values.shape)
