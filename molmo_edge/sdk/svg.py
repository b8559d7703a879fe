"""An SVG of a picture with its points: sharp at any size, with a title and a description for screen readers."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections import Counter
from collections.abc import Sequence
from xml.sax.saxutils import escape, quoteattr

from PIL import Image

from molmo_edge.frontend.points import Point
from molmo_edge.sdk.annotation import Annotation, Colour, DrawOptions, Marker, Plate, annotate, number_size
from molmo_edge.sdk.drawing import ring

_FONTS = "DejaVu Sans, Verdana, Noto Sans, sans-serif"
_SHADE = 'fill="#000" fill-opacity=".38"'
# Characters that XML 1.0 does not allow, and format characters that reorder the text around them.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def to_svg(
    image: Image.Image,
    numbered: Sequence[tuple[int, Point]],
    points: Sequence[Point],
    *,
    href: str | None = None,
    embed: bool = True,
    options: DrawOptions | None = None,
) -> str:
    """Return an SVG document of `image` with the same markers and labels as `draw_some` draws.

    Args:
        image: RGB.
        numbered: The points in this picture, with their numbers in the answer.
        points: All points of the answer.
        href: URL or path of the picture to link to, relative to the SVG. None: the picture is embedded as JPEG.
        embed: With False and without `href`, the document has no picture, to be laid over one.
        options: Defaults: DrawOptions().
    """
    layout = annotate(image.width, image.height, numbered, points, options)
    picture = href if href is not None else _data_uri(image) if embed else None
    body = [
        f"<desc>{_text(_describe(layout))}</desc>",
        *([f'<image href={_attribute(picture)} width="{image.width}" height="{image.height}"/>'] if picture else []),
        *(_leader(plate, ring(layout.radius)) for plate in layout.plates if plate.leader),
        *(_plate(plate, ring(layout.radius)) for plate in layout.plates),
        *(_marker(marker) for marker in sorted(layout.markers, key=lambda marker: bool(marker.text))),
    ]
    # Unique, since a page may contain several SVGs.
    title = "t" + hashlib.sha256("".join(body).encode()).hexdigest()[:12]
    body[0] = f'<title id="{title}">{_text(_title(layout))}</title><desc id="{title}d">{body[0][6:]}'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{image.width}" height="{image.height}" '
        f'viewBox="0 0 {image.width} {image.height}" role="img" aria-labelledby="{title} {title}d" '
        f'font-family="{_FONTS}">'
    )
    return "\n".join([head, *body, "</svg>", ""])


def _title(layout: Annotation) -> str:
    """ "3 points: 2 dog, 1 cat"."""
    counts = Counter(marker.point.label for marker in layout.markers)
    kinds = ", ".join(f"{count} {label}" for label, count in counts.items() if label.strip())
    number = len(layout.markers)
    start = "No points" if not number else "1 point" if number == 1 else f"{number} points"
    return f"{start}: {kinds}" if kinds else start


def _describe(layout: Annotation) -> str:
    return "; ".join(_sentence(marker) for marker in layout.markers) or "The picture has no points."


def _sentence(marker: Marker) -> str:
    return f"{marker.number} {marker.point.label}".rstrip() + f" at x {marker.x:.0f}, y {marker.y:.0f}"


def _marker(marker: Marker) -> str:
    x, y, radius, line = marker.x, marker.y, marker.radius, ring(marker.radius)
    inner = (
        _letters(
            marker.text, x, y + 0.36 * number_size(radius, len(marker.text)), number_size(radius, len(marker.text))
        )
        if marker.text
        else _circle(x, y, max(1.0, 0.28 * radius), 'fill="#fff"')
    )
    return (
        f'<g class="point" data-number="{marker.number}"><title>{_text(_sentence(marker))}</title>'
        f"{_circle(x, y, radius + line / 2, _SHADE)}{_circle(x, y, radius, _fill((255, 255, 255)))}"
        f"{_circle(x, y, radius - line, _fill(marker.colour))}{inner}</g>"
    )


def _plate(plate: Plate, line: float) -> str:
    box, rounding = plate.box, plate.rounding
    parts = []
    for reach, fill in ((line / 2, _SHADE), (0.0, 'fill="#fff"'), (-line, _fill(plate.colour))):
        parts.append(
            f'<rect x="{_n(box.left - reach)}" y="{_n(box.top - reach)}" '
            f'width="{_n(box.right - box.left + 2 * reach)}" height="{_n(box.bottom - box.top + 2 * reach)}" '
            f'rx="{_n(max(0.0, rounding + reach))}" {fill}/>'
        )
    left, top, right, bottom = plate.line.box
    baseline = (box.top + box.bottom - top - bottom) / 2
    written = "".join(text for text, _ in plate.line.pieces)
    letters = _letters(written, (box.left + box.right) / 2, baseline, plate.letters, right - left)
    return f'<g class="label"><title>{_text(plate.text)}</title>{"".join(parts)}{letters}</g>'


def _leader(plate: Plate, line: float) -> str:
    (x0, y0), (x1, y1) = plate.anchor, plate.box.nearest(*plate.anchor)
    path = f'd="M{_n(x0)} {_n(y0)}L{_n(x1)} {_n(y1)}"'
    strokes = (("#000", 4.0, ' stroke-opacity=".38"'), ("#fff", 3.0, ""), (_hex(plate.colour), 1.2, ""))
    return "".join(f'<path {path} stroke="{c}" stroke-width="{_n(w * line)}"{more}/>' for c, w, more in strokes)


def _letters(text: str, x: float, baseline: float, size: float, width: float | None = None) -> str:
    """Centred at x. `width`: in pixels, where another font must not be wider than the plate."""
    fit = "" if width is None else f' textLength="{_n(width)}" lengthAdjust="spacingAndGlyphs"'
    where = f'x="{_n(x)}" y="{_n(baseline)}" font-size="{_n(size)}"'
    return f'<text {where} text-anchor="middle" fill="#fff"{fit}>{_text(text)}</text>'


def _circle(x: float, y: float, radius: float, fill: str) -> str:
    return f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" {fill}/>'


def _fill(colour: Colour) -> str:
    return f'fill="{_hex(colour)}"'


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _text(text: str) -> str:
    return escape(_FORBIDDEN.sub("\ufffd", text))


def _attribute(text: str) -> str:
    return quoteattr(_FORBIDDEN.sub("\ufffd", text))


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
