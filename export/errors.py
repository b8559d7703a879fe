"""The exporter's error."""

from molmo_edge.errors import MolmoEdgeError


class ExportError(MolmoEdgeError):
    """The export cannot be done: an unknown or contradictory option, a missing dependency, or unusable weights."""
