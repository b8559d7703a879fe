"""The exporter's errors."""

from molmo_edge.errors import MolmoEdgeError


class ExportError(MolmoEdgeError):
    """The export cannot be done: an unknown or contradictory option, a missing dependency, or unusable weights."""


class GraphError(ExportError):
    """The exported model does not run."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the exported model does not run: {reason}. Check that config.json belongs to these weights")
