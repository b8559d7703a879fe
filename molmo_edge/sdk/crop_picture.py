"""A picture of the crops of an image, their patches, and the cell of each image token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from molmo_edge.frontend.crop_map import CropMap
from molmo_edge.sdk import lettering
from molmo_edge.sdk.annotation import COLOURS, Colour

_CELL = 32  # pixels of a cell in the picture
_SMALL_CELL = 20  # without numbers, for images with many cells
_MOST_CELLS = 70  # along a side, with numbers
_GAP = 28
_TITLE = 34
_INK = (30, 30, 30)
_GLOBAL: Colour = (60, 60, 60)


def draw_crops(image: Image.Image, layout: CropMap, heading: str) -> Image.Image:
    """Draw a sheet: the crops over the image, the cells of the crops, and those of the global view.

    Each cell is tinted with the colour of the crop that its patches are taken from, and has the number of its token.
    """
    scale = _scale(layout)
    whole = ~layout.is_global
    panels = [("Global view: cells and their tokens", _cells(image, layout, layout.is_global, scale))]
    if layout.tiling != (0, 0):
        panels.insert(0, ("Crops, and where they overlap", _outlines(image, layout, scale)))
        panels.insert(1, ("Crops: cells and their tokens", _cells(image, layout, whole, scale)))
    wide = sum(panel.width for _, panel in panels[:2]) + 3 * _GAP
    rows = [panels[:1], panels[1:]] if len(panels) > 1 and wide > 2600 else [panels]
    return _sheet(heading, rows)


def _scale(layout: CropMap) -> float:
    """Pixels of the picture per pixel of the image, horizontally."""
    rows, cols = layout.config.cell_grids(layout.tiling)[-1]
    cell = _CELL if max(rows, cols) <= _MOST_CELLS else _SMALL_CELL
    boxes = layout.cells[~layout.is_global] if layout.tiling != (0, 0) else layout.cells
    return cell * cols / float(boxes[:, 2].max() - boxes[:, 0].min())


def _ground(image: Image.Image, boxes: np.ndarray, scale: float) -> tuple[Image.Image, float, float]:
    """The image, faded, on the canvas that `boxes` cover, and the canvas' left and top in pixels of the image."""
    left, top = float(boxes[:, 0].min()), float(boxes[:, 1].min())
    right, bottom = float(boxes[:, 2].max()), float(boxes[:, 3].max())
    ground = Image.new("RGB", (round((right - left) * scale), round((bottom - top) * scale)), "black")
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    ground.paste(image.resize(size, Image.Resampling.BICUBIC), (round(-left * scale), round(-top * scale)))
    return ground, left, top


def _outlines(image: Image.Image, layout: CropMap, scale: float) -> Image.Image:
    crops = layout.crops[1:]
    ground, left, top = _ground(image, crops, scale)
    tints = Image.new("RGBA", ground.size, (0, 0, 0, 0))
    for number, crop in enumerate(crops, 1):
        tint = Image.new("RGBA", ground.size, (0, 0, 0, 0))
        ImageDraw.Draw(tint).rectangle(_box(crop, left, top, scale), fill=(*_colour(number), 80))
        tints = Image.alpha_composite(tints, tint)
    picture = Image.alpha_composite(ground.convert("RGBA"), tints).convert("RGB")
    draw = ImageDraw.Draw(picture)
    for number, crop in enumerate(crops, 1):
        x0, y0, x1, y1 = _box(crop, left, top, scale)
        inset = 3 + 5 * ((number - 1 + (number - 1) // layout.tiling[1]) % 2)  # neighbours' lines lie side by side
        corners = (x0 + inset, y0 + inset, x1 - inset, y1 - inset)
        draw.rectangle(corners, outline="white", width=6)
        draw.rectangle(
            (corners[0] + 1, corners[1] + 1, corners[2] - 1, corners[3] - 1), outline=_colour(number), width=4
        )
        _write(draw, str(number), ((x0 + x1) / 2, (y0 + y1) / 2), 40)
    return picture


def _cells(image: Image.Image, layout: CropMap, chosen: np.ndarray, scale: float) -> Image.Image:
    cells, members, crops = layout.cells[chosen], layout.members[chosen], layout.crops_of[chosen]
    if not layout.is_global[chosen].any():
        factor = scale
    else:  # the global view has fewer cells, of the same size in the picture
        factor = _CELL * layout.config.cells / float(cells[:, 2].max() - cells[:, 0].min())
    ground, left, top = _ground(image, cells, factor)
    tint = Image.new("RGBA", ground.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(tint)
    for patch, crop in zip(members.reshape(-1), crops.reshape(-1), strict=True):
        if patch >= 0:
            corners = _box(layout.patches[patch], left, top, factor)
            draw.rectangle(corners, fill=(*_colour(int(crop)), 90), outline=(255, 255, 255, 70))
    picture = Image.alpha_composite(ground.convert("RGBA"), tint).convert("RGB")
    draw = ImageDraw.Draw(picture)
    for cell in cells:
        draw.rectangle(_box(cell, left, top, factor), outline="white", width=1)
    size = min(15.0, 0.36 * factor * float((cells[:, 2] - cells[:, 0]).max()))
    if size >= 9:
        for token, cell in zip(layout.tokens[chosen], cells, strict=True):
            x0, y0, x1, y1 = _box(cell, left, top, factor)
            _write(draw, str(token), ((x0 + x1) / 2, (y0 + y1) / 2), size)
    return picture


def _box(box: Sequence[float] | np.ndarray, left: float, top: float, scale: float) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = (
        round((float(value) - low) * scale) for value, low in zip(box, (left, top, left, top), strict=True)
    )
    return x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)


def _colour(crop: int) -> Colour:
    return _GLOBAL if crop == 0 else COLOURS[(crop - 1) % len(COLOURS)]


def _write(draw: ImageDraw.ImageDraw, text: str, at: tuple[float, float], size: float) -> None:
    font = lettering.embedded_font(size)
    draw.text(at, text, font=font, fill="white", anchor="mm", stroke_width=max(1, round(size / 8)), stroke_fill="black")


def _sheet(heading: str, rows: Sequence[Sequence[tuple[str, Image.Image]]]) -> Image.Image:
    width = max(sum(panel.width for _, panel in row) + _GAP * (len(row) + 1) for row in rows)
    size = 20.0
    text = [lettering.line(part, size) for part in heading.split("\n")]
    top = _GAP + math.ceil(1.5 * size) * len(text)
    width = max(width, *(line.box[2] - line.box[0] + 2 * _GAP for line in text))
    height = top + sum(max(panel.height for _, panel in row) + _TITLE + _GAP for row in rows)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(text):
        line.draw(draw, _GAP, _GAP / 2 + number * 1.5 * size - line.box[1] - 0.8 * size + 4, _INK)
    y = top
    for row in rows:
        x = _GAP
        for title, panel in row:
            lettering.line(title, 16.0, float(panel.width)).draw(draw, x, y + 8, _INK)
            sheet.paste(panel, (x, y + _TITLE))
            x += panel.width + _GAP
        y += max(panel.height for _, panel in row) + _TITLE + _GAP
    return sheet
