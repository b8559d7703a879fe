"""From a checkpoint in hub layout to a bundle of ONNX graphs (imported as `molmo_edge.export`)."""

from molmo_edge.errors import MolmoEdgeError


class ExportError(MolmoEdgeError):
    """An export that was asked for something it cannot do, or that this installation lacks a part for."""


try:
    import onnx as _onnx  # noqa: F401  (the whole subpackage stands on it)
except ImportError:
    raise ExportError("exporting needs the onnx package: pip install 'molmo-edge[export]'") from None

from molmo_edge.export.bundle import CheckPhoto, export_bundle  # noqa: E402

__all__ = ["CheckPhoto", "ExportError", "export_bundle"]
