"""The points of a given answer in the notation of a model.

Data sets write points in the grammar of Molmo v1, in tenths of a percent (molmo_edge/frontend/points.py). Molmo2 writes
`<points coords="1 1 105 200">`, MolmoPoint grounding tokens. The text around a tag is the same in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from molmo_edge.frontend.coords_points import format_coords
from molmo_edge.frontend.grounding_tokens import GroundingIds
from molmo_edge.frontend.points import Point, parse_points, written_absent
from molmo_edge.frontend.tokenizer import Tokenizer

_TAG = re.compile(r'<points?\s.*?"\s*>(?P<label>.*?)</points?>', re.DOTALL)
_ABSENT = re.compile(r'<points alt="[^"]*">(?P<label>[^<]*)</points>')  # of `points.format_absent`
_ALT = re.compile(r'\salt="([^"]*)"')

Target = tuple[int, int, int]  # the patch, the slot and the location of a point, see `grounding_tokens.point_target`


def in_coords(text: str) -> str:
    """`text` with its points in the grammar of Molmo2's released models ("html-v2")."""
    return "".join(piece if isinstance(piece, str) else _coords_tag(*piece) for piece in _pieces(text))


def _coords_tag(points: Sequence[Point], label: str, alt: str | None) -> str:
    frames: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        frames.setdefault(str(point.image or 1), []).append((point.x / 100, point.y / 100))
    return format_coords(frames, label, alt=alt)


def grounded(text: str, target: Callable[[float, float], Target], ids: GroundingIds) -> list[str | list[int]]:
    """`text` with its points as grounding tokens: strings, and lists of ids between them.

    target: from x and y, fractions of the image's sides. Points are in the order of their targets, as in the reference
    (molmo_point_data_formatter.py, "no_space_id_last"): `<points coords="` PATCH SLOT LOCATION 1 ... NO_MORE `">`, the
    numbers only where `ids.numbered` says so. A tag without points has NO_MORE alone.
    """
    parts: list[str | list[int]] = [""]

    def write(part: str | list[int]) -> None:
        last = parts[-1]
        if isinstance(part, str) and isinstance(last, str):
            parts[-1] = last + part  # tokenised together
        else:
            parts.append(part)

    for piece in _pieces(text, absent=True):
        if isinstance(piece, str):
            write(piece)
            continue
        points, label, _ = piece
        write('<points coords="')
        targets = sorted(target(point.x / 100, point.y / 100) for point in points)
        for number, (patch, slot, location) in enumerate(targets, start=1):
            write([ids.first + patch, ids.slots + slot, ids.locations + location])
            if ids.numbered:
                write(str(number))
        if ids.no_more is not None:
            write([ids.no_more])
        write(f'">{label}</points>')
    return parts


def encode_parts(tokenizer: Tokenizer, parts: Sequence[str | list[int]]) -> list[int]:
    """The ids of the result of `grounded`."""
    return [token for part in parts for token in (tokenizer.encode(part) if isinstance(part, str) else part)]


def without_absent(text: str) -> str:
    """`text` with its tags of `points.format_absent` as the SDK shows them."""
    return _ABSENT.sub(lambda tag: written_absent(tag["label"], alone=tag[0] == text.strip()), text)


def _pieces(text: str, *, absent: bool = False) -> Iterator[str | tuple[list[Point], str, str | None]]:
    """The text between the tags, and for each tag its points, its label, and its `alt` where that differs from it.

    absent: tags of `points.format_absent` are tags as well.
    """
    start = 0
    for tag in _TAG.finditer(text):
        points = parse_points(tag[0])
        if points or (absent and _ABSENT.fullmatch(tag[0])):
            yield text[start : tag.start()]
            alt = _ALT.search(tag[0])
            yield points, tag["label"], alt[1] if alt and alt[1] != tag["label"] else None
            start = tag.end()
    yield text[start:]
