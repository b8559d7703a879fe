"""Open the weights of a checkpoint directory, in any of the formats that hold a Molmo."""

from __future__ import annotations

from pathlib import Path

from molmo_edge.checkpoints.reference_layout import hub_entries
from molmo_edge.checkpoints.safetensors_files import INDEX, SAFETENSORS, read_header, read_index
from molmo_edge.checkpoints.tensor_sources import CheckpointError, Entry, FileSource, TensorSource
from molmo_edge.system.extras import pip_command

PICKLE = "pytorch_model.bin"
REFERENCE_PICKLE = "model.pt"  # beside config.yaml, in the reference's own checkpoints


def open_tensors(directory: str | Path) -> TensorSource:
    """Open the weights of a checkpoint directory. Reads only headers; tensors are read on demand.

    Uses the first that exists of `model.safetensors`, `model.safetensors.index.json` with its shards,
    `pytorch_model.bin` and the reference's `model.pt`. Code in a pickle is never run. Raises CheckpointError.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; a checkpoint is a directory in hub layout")
    if (directory / SAFETENSORS).is_file():
        return FileSource(read_header(directory / SAFETENSORS))
    if (directory / INDEX).is_file():
        return FileSource(read_index(directory / INDEX))
    for path in (directory / PICKLE, directory / REFERENCE_PICKLE):
        if path.is_file():
            return FileSource(_read_pickle(path))
    raise CheckpointError(
        f"{directory} contains no weights: expected {SAFETENSORS}, {INDEX}, {PICKLE}, or the reference's "
        f"{REFERENCE_PICKLE}"
    )


def _read_pickle(path: Path) -> dict[str, Entry]:
    try:
        from molmo_edge.checkpoints.pickles import read_pickle
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise CheckpointError(f"{path} is a pickle, which only PyTorch can read: {pip_command('torch')}") from None
    if path.name == PICKLE:
        return read_pickle(path)
    return hub_entries(read_pickle(path), path)
