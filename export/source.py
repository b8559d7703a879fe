"""The source of an export: a checkpoint, or a bundle whose weights are restored."""

from __future__ import annotations

from pathlib import Path

from molmo_edge.checkpoints.bundle import is_bundle
from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.tensor_sources import TensorSource, check_tensors
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.config import MolmoConfig


def open_source(directory: Path, *, dither: int | None = None) -> tuple[MolmoConfig, TensorSource]:
    """The configuration and a complete set of tensors with the right shapes.

    Quantising a bundle's restored weights again adds error again, though little from eight bits to four. `dither`: see
    BundleTensors.

    Raises CheckpointError, ConfigError or BundleError, and ExportError for a bundle with a GGUF decoder.
    """
    if is_bundle(directory):  # complete, since it was exported
        from molmo_edge.export.bundle_weights import BundleTensors

        bundle = BundleTensors(directory, dither=dither)
        return bundle.config, bundle
    config, tensors = read_config(directory), open_tensors(directory)
    check_tensors(config, tensors, where=directory)
    return config, tensors
