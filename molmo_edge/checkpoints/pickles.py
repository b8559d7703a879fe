"""Locate the tensors in PyTorch pickles: MolmoE's single file of 28.9 GB, or `model.pt` of the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from molmo_edge.checkpoints.tensor_sources import DTYPES, CheckpointError, Entry
from molmo_edge.errors import first_line

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def read_pickle(path: Path, *, floats_only: bool = False) -> dict[str, Entry]:
    """Read where the tensors of a state dict are stored, without their values.

    PyTorch unpickles the file with `weights_only=True`: code in it is never run. `floats_only`: skip other tensors
    instead of raising an error. Raises CheckpointError for anything but a complete state dict.
    """
    try:
        with FakeTensorMode():  # tensors without data that record their offset in the file
            tensors: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for a bad file
        raise CheckpointError(
            f"{path} is not a complete PyTorch state dict ({first_line(error)}): download it again"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path} is not a state dict: it must contain only named tensors")
    if floats_only:
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    size = path.stat().st_size
    return {str(name): _entry(path, name, tensor, size) for name, tensor in tensors.items()}


def _entry(path: Path, name: object, tensor: torch.Tensor, size: int) -> Entry:
    if tensor.dtype not in _NAMES:
        raise CheckpointError(f'{path}: "{name}" has the dtype {tensor.dtype}, which no Molmo checkpoint uses')
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise CheckpointError(
            f"{path}: PyTorch {torch.__version__} does not report the offsets of tensors in this file. It needs "
            "PyTorch 2.7 or later, and a file in the zip format of PyTorch 1.6 or later"
        )
    dtype = _NAMES[tensor.dtype]
    offset = start + tensor.storage_offset() * DTYPES[dtype].itemsize
    span = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    if tensor.numel() and offset + span * DTYPES[dtype].itemsize > size:
        raise CheckpointError(f'{path} is truncated: "{name}" ends after the end of the file. Download it again')
    return Entry(path, dtype, tuple(tensor.shape), offset, tuple(tensor.stride()))
