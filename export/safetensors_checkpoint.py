"""A checkpoint in, sharded safetensors in hub layout out: MolmoE's pickle is touched once, and never again.

One tensor is read and converted while the one before it is written, so memory does not grow with the model.
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

SHARD_BYTES = 5_000_000_000  # as the hub's libraries cut them
_AT_ONCE = 1 << 16  # values that are rounded in the processor's cache
_BESIDE = ("generation_config.json", "LICENSE", "tokenizer_config.json", "special_tokens_map.json")


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    precision: str = "bf16",
    *,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Convert a checkpoint directory, in hub layout or the reference's own, or a bundle to safetensors in hub layout.

    `precision`: "bf16" or "fp32". `out` must not exist yet, and appears whole or not at all. `on_progress` is told
    the values that are written and all that there are. Returns the files of weights.

    Raises ExportError for what cannot be asked for, or does not fit on the disk, and before any weight is read
    CheckpointError, ConfigError or TokenizerError for a checkpoint that is not whole.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    check_checkpoint_options(out, precision)
    if shard_bytes <= 0:
        raise ExportError(f"a shard must have room for something, not for {shard_bytes} bytes")
    dtype = SAFETENSORS_PRECISIONS[precision]
    config, tensors = open_source(checkpoint)
    Tokenizer.from_file(checkpoint / TOKENIZER)
    shapes = hub_shapes(config)
    total = sum(math.prod(shape) for shape in shapes.values())
    with staged(out, total * DTYPES[dtype].itemsize) as scratch:
        staging = scratch / "checkpoint"
        staging.mkdir()
        done = 0
        with ShardWriter(staging, shapes, dtype, shard_bytes) as writer:
            for name, shape in shapes.items():
                writer.write(name, _converted(tensors, name, dtype))
                done += math.prod(shape)
                if on_progress is not None:
                    on_progress(done, total)
        write_hub_config(config, staging)
        for name in (TOKENIZER, *_BESIDE):
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, staging / name)
        publish(staging, out)
    return sorted(out.glob("model*.safetensors"))


def check_checkpoint_options(out: Path, precision: str) -> None:
    """Raise ExportError for what cannot be asked for, before a checkpoint is fetched."""
    if precision not in SAFETENSORS_PRECISIONS:
        supported = ", ".join(SAFETENSORS_PRECISIONS)
        raise ExportError(f"{precision!r} is not a supported precision for safetensors (supported: {supported})")
    if out.exists():
        raise ExportError(f"{out} exists already: remove it, or choose another directory")


def _converted(tensors: TensorSource, name: str, dtype: str) -> np.ndarray:
    raw, stored = tensors.raw(name), tensors.dtype(name)
    if stored == dtype:
        return raw
    values = widen(raw, stored)
    return values if dtype == "F32" else round_to_bfloat16(values)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16 as uint16, to nearest, ties to even. Overflow gives infinity, NaN stays NaN."""
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    rounded = np.empty(flat.shape, np.uint16)
    for start in range(0, flat.size, _AT_ONCE):
        part = flat[start : start + _AT_ONCE]
        bits = part.view(np.uint32)
        half = (bits >> 16) & 1
        half += bits
        half += 0x7FFF
        rounded[start : start + _AT_ONCE] = half >> 16
        if np.isnan(part.min()):
            rounded[start : start + _AT_ONCE][np.isnan(part)] = 0x7FC0
    return rounded.reshape(values.shape)
