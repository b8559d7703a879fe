"""How notebooks show an answer: the text, its points, and the image with the points drawn in."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING

from PIL import Image

from molmo_edge.answer import draw_points

if TYPE_CHECKING:
    from molmo_edge.answer import Answer

_SIDE = 1024  # pixels; a larger image is scaled down, because a notebook keeps what it shows


def to_png(answer: Answer) -> bytes | None:
    """The image with the points; None without image or points, and the notebook shows the text."""
    if answer.image is None or not answer.points:
        return None
    return _encoded(_drawn(answer), "PNG")


def to_html(answer: Answer) -> str:
    """The text, a table of the points, and the image with them, if there are any."""
    parts = [f"<p>{html.escape(answer.readable)}</p>"]
    if not answer.complete:
        parts.append("<p><em>cut off</em></p>")
    if answer.points:
        pixels = answer.pixels() if answer.image is not None else [None] * len(answer.points)
        rows = []
        for number, (point, pixel) in enumerate(zip(answer.points, pixels, strict=True), 1):
            place = f"{point.x:.1f} %, {point.y:.1f} %" if pixel is None else f"{pixel[0]:.0f}, {pixel[1]:.0f}"
            rows.append(f"<tr><td>{number}</td><td>{html.escape(point.label)}</td><td>{place}</td></tr>")
        unit = "x, y" if answer.image is None else "x, y in pixels"
        parts.append(f"<table><tr><th></th><th>label</th><th>{unit}</th></tr>{''.join(rows)}</table>")
        if answer.image is not None:
            data = base64.b64encode(_encoded(_drawn(answer), "JPEG")).decode()
            parts.append(f'<img src="data:image/jpeg;base64,{data}" alt="the image with its points">')
    return f"<div>{''.join(parts)}</div>"


def _drawn(answer: Answer) -> Image.Image:
    assert answer.image is not None  # both callers look first
    image = Image.fromarray(answer.image)
    image.thumbnail((_SIDE, _SIDE))  # before drawing: markers keep a readable size
    return draw_points(image, answer.points)


def _encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()
