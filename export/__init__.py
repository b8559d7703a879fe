"""Convert a checkpoint to a bundle or to safetensors (imported as `molmo_edge.export`).

Names are imported on first use: writing safetensors does not need onnx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from molmo_edge.export.errors import ExportError
from molmo_edge.system.extras import pip_command

if TYPE_CHECKING:
    from molmo_edge.export.bundle import CheckPhoto, check_bundle_options, export_bundle
    from molmo_edge.export.bundle_weights import load_bundle_weights
    from molmo_edge.export.optimum import export_with_optimum, quantize_with_optimum
    from molmo_edge.export.options import ExportOptions
    from molmo_edge.export.safetensors_checkpoint import check_checkpoint_options, export_checkpoint

_HOME = {
    "CheckPhoto": "bundle",
    "ExportOptions": "options",
    "check_bundle_options": "bundle",
    "check_checkpoint_options": "safetensors_checkpoint",
    "export_bundle": "bundle",
    "export_checkpoint": "safetensors_checkpoint",
    "export_with_optimum": "optimum",
    "load_bundle_weights": "bundle_weights",
    "quantize_with_optimum": "optimum",
}

__all__ = [
    "CheckPhoto",
    "ExportError",
    "ExportOptions",
    "check_bundle_options",
    "check_checkpoint_options",
    "export_bundle",
    "export_checkpoint",
    "export_with_optimum",
    "load_bundle_weights",
    "quantize_with_optimum",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise ExportError(f"this needs the onnx package: {pip_command('export')}") from None
