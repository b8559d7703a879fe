"""Draw markers and labels on a picture."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from molmo_edge.frontend.points import Point
from molmo_edge.sdk import lettering
from molmo_edge.sdk.annotation import Annotation, Colour, DrawOptions, Plate, annotate, number_size

_OVERSAMPLING = 4  # shapes are drawn this many times larger and scaled down: Pillow's shapes are not antialiased
_LARGE = 1_000_000  # pixels; larger shapes are not oversampled
_MANY = 100  # shapes; more of them are drawn at half this size and scaled down by a mean, ten times faster
_STRIP = 64  # pixels: the part of a line that is drawn at once among many
WHITE = (255, 255, 255, 255)
SHADE = (0, 0, 0, 96)  # the edge outside of white lines, which shows them on a white ground


def draw_points(image: Image.Image, points: Sequence[Point], options: DrawOptions | None = None) -> Image.Image:
    """Return a copy of `image` in RGB with a marker on each point, numbered if there are several, and their labels.

    Sizes follow the image's. The centre of a marker is always its point: at the border, the marker is cropped. Labels
    are inside the image; where there is room, they cover neither markers nor each other.
    """
    return draw_some(image, list(enumerate(points, 1)), points, options)


def draw_some(
    image: Image.Image,
    numbered: Sequence[tuple[int, Point]],
    points: Sequence[Point],
    options: DrawOptions | None = None,
) -> Image.Image:
    """Like `draw_points`, for those of an answer's points that are in `image`, with their numbers in the answer.

    `points`: all of them, so that a label has the same colour in every image.
    """
    canvas = image.convert("RGB")
    if canvas is image:
        canvas = image.copy()
    annotation = annotate(canvas.width, canvas.height, numbered, points, options)
    many = max(len(annotation.plates), len(annotation.markers)) > _MANY
    for plate in annotation.plates:  # below everything, so that no leader crosses a number or a label
        if plate.leader:
            _draw_leader(canvas, plate, annotation, many=many)
    for plate in annotation.plates:
        _draw_plate(canvas, plate, annotation, many=many)
    # After the plates, which must not cover a point. A point without room for its number must not cover another number.
    for marker in sorted(annotation.markers, key=lambda marker: bool(marker.text)):
        disc = _disc(marker.radius, marker.text, marker.colour, many=many)
        x, y = round(marker.x - (disc.width - 1) / 2), round(marker.y - (disc.height - 1) / 2)
        canvas.paste(disc, (x, y), disc)
    return canvas


def ring(radius: float) -> float:
    """The width of the white ring of a marker or plate, in pixels."""
    return max(1.0, radius / 6)


@functools.lru_cache(maxsize=256)
def _disc(radius: float, text: str, colour: Colour, *, many: bool) -> Image.Image:
    """A disc of `radius` pixels in a white ring with a dark edge. In it: `text`, or else a white dot."""
    edge = ring(radius) / 2
    size = 2 * math.ceil(radius + edge) + 1
    scale = _scale(many=many)
    big = size * scale
    disc = Image.new("RGBA", (big, big), (255, 255, 255, 0))
    draw = ImageDraw.Draw(disc)
    for reach, fill in ((radius + edge, SHADE), (radius, WHITE), (radius - ring(radius), (*colour, 255))):
        _circle(draw, big / 2, reach * scale, fill)
    if text:
        font = lettering.embedded_font(number_size(radius, len(text)) * scale)
        draw.text((big / 2, big / 2), text, font=font, fill=WHITE, anchor="mm")
    else:
        _circle(draw, big / 2, max(1.0, 0.28 * radius) * scale, WHITE)
    return _shrunk(disc, (size, size), many=many)


def _circle(draw: ImageDraw.ImageDraw, centre: float, radius: float, fill: tuple[int, ...]) -> None:
    draw.ellipse((centre - radius, centre - radius, centre + radius - 1, centre + radius - 1), fill=fill)


def _scale(*, many: bool) -> int:
    return _OVERSAMPLING // 2 if many else _OVERSAMPLING


def _shrunk(shape: Image.Image, size: tuple[int, int], *, many: bool) -> Image.Image:
    if shape.size == size:
        return shape
    return shape.reduce(shape.width // size[0]) if many else shape.resize(size, Image.Resampling.LANCZOS)


def _draw_plate(canvas: Image.Image, plate: Plate, annotation: Annotation, *, many: bool) -> None:
    """Draw a rounded plate in a white ring with a dark edge, and its letters."""
    line, edge = ring(annotation.radius), ring(annotation.radius) / 2
    box = plate.box
    left, top = math.floor(box.left - edge), math.floor(box.top - edge)
    size = math.ceil(box.right + edge) - left + 1, math.ceil(box.bottom + edge) - top + 1
    scale = _scale(many=many) if size[0] * size[1] < _LARGE else 1
    tile = Image.new("RGBA", (size[0] * scale, size[1] * scale), (255, 255, 255, 0))
    draw = ImageDraw.Draw(tile)
    for reach, fill in ((edge, SHADE), (0.0, WHITE), (-line, (*plate.colour, 255))):
        corners = (box.left - reach - left, box.top - reach - top, box.right + reach - left, box.bottom + reach - top)
        rounding = max(1.0, plate.rounding + reach) * scale
        draw.rounded_rectangle([value * scale for value in corners], radius=rounding, fill=fill)
    tile = _shrunk(tile, size, many=many)
    canvas.paste(tile, (left, top), tile)
    x0, y0, x1, y1 = plate.line.box
    x, y = (box.left + box.right - (x1 - x0)) / 2, (box.top + box.bottom + 1 - (y1 - y0)) / 2
    plate.line.draw(ImageDraw.Draw(canvas), round(x), round(y), WHITE[:3])


def _draw_leader(canvas: Image.Image, plate: Plate, annotation: Annotation, *, many: bool) -> None:
    """Draw the line from a plate to its point: coloured, in a white ring with a dark edge."""
    ends = (plate.anchor, plate.box.nearest(*plate.anchor))
    width = ring(annotation.radius)
    margin = math.ceil(3 * width)
    left, top = (math.floor(min(end[axis] for end in ends)) - margin for axis in (0, 1))
    right, bottom = (math.ceil(max(end[axis] for end in ends)) + margin for axis in (0, 1))
    parts = _strips(ends, (left, top, right, bottom), margin) if many else [(left, top, right, bottom)]
    for left, top, right, bottom in parts:
        size = right - left, bottom - top
        scale = _scale(many=many) if size[0] * size[1] < _LARGE else 1
        tile = Image.new("RGBA", (size[0] * scale, size[1] * scale), (255, 255, 255, 0))
        draw = ImageDraw.Draw(tile)
        path = [((x - left) * scale, (y - top) * scale) for x, y in ends]
        for factor, fill in ((4.0, SHADE), (3.0, WHITE), (1.2, (*plate.colour, 255))):
            draw.line(path, fill=fill, width=max(1, round(factor * width * scale)))
        tile = _shrunk(tile, size, many=many)
        canvas.paste(tile, (left, top), tile)


def _strips(
    ends: tuple[tuple[float, float], tuple[float, float]], box: tuple[int, int, int, int], margin: int
) -> list[tuple[int, int, int, int]]:
    """Parts of `box` (left, top, right, bottom) that together hold the line between `ends`, `margin` pixels wide.

    A long line is in a small part of its box.
    """
    long = 0 if box[2] - box[0] > box[3] - box[1] else 1  # the axis along which the line is cut
    (start, end), short = sorted(ends, key=lambda at: at[long]), 1 - long
    slope = (end[short] - start[short]) / max(1e-9, end[long] - start[long])
    parts = []
    for low in range(box[long], box[long + 2], _STRIP):
        high = min(low + _STRIP, box[long + 2])
        # Where the strip, with what reaches into it from beside, meets the line.
        met = [min(max(at, start[long]), end[long]) for at in (low - margin, high + margin)]
        across = [start[short] + (at - start[long]) * slope for at in met]
        side = max(box[short], math.floor(min(across)) - margin), min(box[short + 2], math.ceil(max(across)) + margin)
        parts.append((low, side[0], high, side[1]) if long == 0 else (side[0], low, side[1], high))
    return parts
