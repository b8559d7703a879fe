"""Smaller weights for the exported graphs, and what they cost (imported as `molmo_edge.quantize`)."""
