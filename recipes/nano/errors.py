"""Errors of the recipe."""

from __future__ import annotations

from molmo_edge.errors import MolmoEdgeError


class NotTrainedError(MolmoEdgeError):
    """A stage whose checkpoint is needed has not been run yet."""
