"""How notebooks show an answer: the text, its points, and the image with the points drawn in."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from molmo_edge.frontend.points import Point
from molmo_edge.sdk.drawing import draw_points

_SIDE = 1024  # pixels; larger images are scaled down, because a notebook stores what it shows


def to_png(image: np.ndarray | None, points: Sequence[Point]) -> bytes | None:
    """Return the image with its points; None without image or points: the notebook then shows the text."""
    return None if image is None or not points else _drawn(image, points, "PNG")


def to_html(text: str, points: Sequence[Point], image: np.ndarray | None, *, complete: bool) -> str:
    """Return the text, and, for an answer with points, a table of them and the image."""
    parts = [f"<p>{html.escape(text)}</p>"]
    if not complete:
        parts.append("<p><em>cut off</em></p>")
    if points:
        rows = []
        for number, point in enumerate(points, 1):
            place = f"{point.x:.1f} %, {point.y:.1f} %"
            if image is not None:
                x, y = point.pixel(image.shape[1], image.shape[0])
                place = f"{x:.0f}, {y:.0f}"
            rows.append(f"<tr><td>{number}</td><td>{html.escape(point.label)}</td><td>{place}</td></tr>")
        unit = "x, y" if image is None else "x, y in pixels"
        parts.append(f"<table><tr><th></th><th>label</th><th>{unit}</th></tr>{''.join(rows)}</table>")
    if points and image is not None:
        data = base64.b64encode(_drawn(image, points, "JPEG")).decode()
        parts.append(f'<img src="data:image/jpeg;base64,{data}" alt="the image with its points">')
    return f"<div>{''.join(parts)}</div>"


def _drawn(rgb: np.ndarray, points: Sequence[Point], file_format: str) -> bytes:
    image = Image.fromarray(rgb)
    image.thumbnail((_SIDE, _SIDE))  # before drawing, so that markers keep a readable size
    file = io.BytesIO()
    draw_points(image, points).save(file, file_format)
    return file.getvalue()
