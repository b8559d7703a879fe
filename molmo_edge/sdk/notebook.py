"""How notebooks show an answer: the text, its points, and the image with the points drawn in."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from molmo_edge.frontend.points import Point
from molmo_edge.sdk.contact_sheet import draw_one, draw_sheet
from molmo_edge.sdk.shown import Shown

_SIDE = 1024  # pixels; larger images are scaled down, because a notebook stores what it shows


def to_png(shown: Shown | None, points: Sequence[Point]) -> bytes | None:
    """Return the images with their points; None without images or points: the notebook then shows the text."""
    return None if shown is None or not points else _drawn(shown, points, "PNG")


def to_html(text: str, points: Sequence[Point], shown: Shown | None, *, complete: bool) -> str:
    """Return the text, and, for an answer with points, a table of them and the image or a sheet of images."""
    several = shown is not None and len(shown.images) > 1
    parts = [f"<p>{html.escape(text)}</p>"]
    if not complete:
        parts.append("<p><em>cut off</em></p>")
    if points:
        rows = []
        for number, point in enumerate(points, 1):
            place = f"{point.x:.1f} %, {point.y:.1f} %"
            index = None if shown is None else shown.index_of(point)
            if shown is not None and index is not None:
                height, width = shown.size_of(index)
                x, y = point.pixel(width, height)
                place = f"{x:.0f}, {y:.0f}"
            where = ""
            if several and shown is not None:
                where = f"<td>{'' if index is None else shown.title(index)}</td>"
            rows.append(f"<tr><td>{number}</td>{where}<td>{html.escape(point.label)}</td><td>{place}</td></tr>")
        unit = "x, y" if shown is None else "x, y in pixels"
        head = "<th></th><th>where</th>" if several else "<th></th>"
        parts.append(f"<table><tr>{head}<th>label</th><th>{unit}</th></tr>{''.join(rows)}</table>")
    if points and shown is not None:
        data = base64.b64encode(_drawn(shown, points, "JPEG")).decode()
        parts.append(f'<img src="data:image/jpeg;base64,{data}" alt="the image with its points">')
    return f"<div>{''.join(parts)}</div>"


def _drawn(shown: Shown, points: Sequence[Point], file_format: str) -> bytes:
    file = io.BytesIO()
    one = len(shown.images) == 1
    image = draw_one(shown, 0, points, side=_SIDE) if one else draw_sheet(shown, points)
    image.save(file, file_format)
    return file.getvalue()
