"""Quantisers and calibration: they work on arrays and do not depend on graphs (imported as `molmo_edge.quantize`)."""

from molmo_edge.errors import MolmoEdgeError


class QuantizeError(MolmoEdgeError):
    """The weights cannot be quantised, or the calibration data cannot be used."""
