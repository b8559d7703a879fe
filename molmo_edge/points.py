"""Public import path for parsing points from the text of an answer and formatting them."""

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
