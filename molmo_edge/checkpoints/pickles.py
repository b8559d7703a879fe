"""PyTorch pickles: where each tensor lies in MolmoE's one file of 28.9 GB, or in `model.pt` of the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from molmo_edge.checkpoints.tensor_sources import DTYPES, CheckpointError, Entry
from molmo_edge.errors import first_line

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def read_pickle(path: Path, *, floats_only: bool = False) -> dict[str, Entry]:
    """The tensors of a state dict, without their values.

    Unpickling is PyTorch's, with `weights_only=True`: code in the file is never run. floats_only: pass over other
    tensors instead of refusing them. Raises CheckpointError for anything that is not a whole file of named tensors.
    """
    try:
        with FakeTensorMode():  # tensors that know their place in the file, and hold nothing
            tensors: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for a bad file
        raise CheckpointError(
            f"{path} is not a plain, whole PyTorch checkpoint ({first_line(error)}): download it again"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path} holds something else than named tensors")
    if floats_only:
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    size = path.stat().st_size
    return {str(name): _entry(path, name, tensor, size) for name, tensor in tensors.items()}


def _entry(path: Path, name: object, tensor: torch.Tensor, size: int) -> Entry:
    if tensor.dtype not in _NAMES:
        raise CheckpointError(f'{path}: "{name}" is stored as {tensor.dtype}, which no weight of a Molmo is')
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise CheckpointError(
            f"{path}: PyTorch {torch.__version__} does not say where in this file a tensor lies. It takes 2.7 or "
            "later, and a file in the zip format that PyTorch writes since 1.6"
        )
    dtype = _NAMES[tensor.dtype]
    offset = start + tensor.storage_offset() * DTYPES[dtype].itemsize
    span = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    if tensor.numel() and offset + span * DTYPES[dtype].itemsize > size:
        raise CheckpointError(f'{path} was cut short: "{name}" ends past it; download it again')
    return Entry(path, dtype, tuple(tensor.shape), offset, tuple(tensor.stride()))
