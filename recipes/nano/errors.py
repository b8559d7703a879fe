"""Errors of the recipe."""

from __future__ import annotations

from molmo_edge.errors import MolmoEdgeError


class NotTrainedError(MolmoEdgeError):
    """A stage before this one was not run."""
