"""Molmo's points: read from an answer's text, and written. The import path for apps."""

from molmo_edge.frontend.points import (
    Point,
    StreamParser,
    extract_points,
    format_count,
    format_points,
    parse_count,
    parse_points,
)

__all__ = ["Point", "StreamParser", "extract_points", "format_count", "format_points", "parse_count", "parse_points"]
