"""Where an export takes its weights from: a checkpoint, or a bundle, read back."""

from __future__ import annotations

from pathlib import Path

from molmo_edge.checkpoints.bundle import is_bundle
from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.tensor_sources import TensorSource, check_tensors
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.config import MolmoConfig


def open_source(directory: Path, *, dither: int | None = None) -> tuple[MolmoConfig, TensorSource]:
    """Configuration and tensors, all of them there and of the right shapes.

    Rounded weights of a bundle are the floats that they stand for: rounding them again costs again, though little where
    they had eight bits and get four. `dither`: see BundleTensors.

    Raises CheckpointError, ConfigError or BundleError, and ExportError for a bundle whose decoder is a GGUF.
    """
    if is_bundle(directory):  # all there, or it would not have been made
        from molmo_edge.export.bundle_weights import BundleTensors

        bundle = BundleTensors(directory, dither=dither)
        return bundle.config, bundle
    config, tensors = read_config(directory), open_tensors(directory)
    check_tensors(config, tensors, where=directory)
    return config, tensors
