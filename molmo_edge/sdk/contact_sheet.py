"""The images or frames of an answer with its points, alone or on one sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from molmo_edge.frontend.points import Point
from molmo_edge.sdk import lettering
from molmo_edge.sdk.annotation import DrawOptions
from molmo_edge.sdk.drawing import draw_some
from molmo_edge.sdk.shown import Shown

_SIDES = ((4, 640), (9, 480), (16, 360))  # pixels; the longest side of a picture on a sheet of up to so many
_SMALLEST = 240
_GAP = 12
_TITLE = 26
_INK = (30, 30, 30)


def draw_one(
    shown: Shown, index: int, points: Sequence[Point], options: DrawOptions | None = None, *, side: int | None = None
) -> Image.Image:
    """The image or frame `index` with those of an answer's points that are in it. `side`: reduce it to so many pixels.

    Points keep their numbers in the answer.
    """
    image = Image.fromarray(shown.images[index])
    if side is not None:
        image.thumbnail((side, side))  # before drawing, so that markers keep a readable size
    return draw_some(image, shown.points_in(index, points), points, options)


def draw_sheet(shown: Shown, points: Sequence[Point], options: DrawOptions | None = None) -> Image.Image:
    """The pictures of `Shown.to_draw` in rows on a white sheet, each below its title."""
    indices = shown.to_draw(points)
    side = next((side for most, side in _SIDES if len(indices) <= most), _SMALLEST)
    cells = [draw_one(shown, index, points, options, side=side) for index in indices]
    columns = math.ceil(math.sqrt(len(cells)))
    rows = [cells[at : at + columns] for at in range(0, len(cells), columns)]
    widths = [max(row[i].width for row in rows if i < len(row)) for i in range(columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    size = sum(widths) + _GAP * (columns + 1), sum(heights) + (_GAP + _TITLE) * len(rows) + _GAP
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), lettering.embedded_font(16)
    for number, (cell, index) in enumerate(zip(cells, indices, strict=True)):
        row, column = divmod(number, columns)
        x = _GAP + sum(widths[:column]) + _GAP * column
        y = _GAP + sum(heights[:row]) + (_GAP + _TITLE) * row
        draw.text((x, y + _TITLE / 2), shown.title(index), font=font, fill=_INK, anchor="lm")
        sheet.paste(cell, (x, y + _TITLE))
    return sheet
