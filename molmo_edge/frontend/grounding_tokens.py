"""Grounding tokens of MolmoPoint: a point is a patch, a subpatch and a location, chosen by the model in this order.

Their ids follow the vocabulary and depend on the prompt: as many patches as its images have tokens, then "no more
points", the slots of a patch's pooling window, and the 3 x 3 locations within a subpatch. In text each is written
`<POINT_k>`. Source: `hf_model/modeling_molmo_point.py` of allenai/molmo2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from molmo_edge.frontend.coords_points import format_coords
from molmo_edge.frontend.points import Point, parse_points

# Three tokens, and the number of the object.
TRIPLE = re.compile(r"<POINT_([0-9]+)> ?<POINT_([0-9]+)> ?<POINT_([0-9]+)> ?([0-9]+)")
UNNUMBERED = re.compile(r"<POINT_([0-9]+)><POINT_([0-9]+)><POINT_([0-9]+)>")
TOKEN = re.compile(r"<POINT_[0-9]+>")
_CELL = 0.33  # of a patch: the reference's step from one location to the next


@dataclass(frozen=True)
class GroundingIds:
    """The ids of one prompt's grounding tokens."""

    first: int  # the first id after the vocabulary and its additional tokens
    n_patches: int  # rows of the pooling array, all images together
    n_slots: int  # patches in a pooling window: 4 of an image, 9 of a video
    n_locations: int = 9
    no_more_class: bool = True
    numbered: bool = True  # whether text with the object's number follows each point

    @property
    def no_more(self) -> int | None:
        """The id of "no more points", after which the model generates only text."""
        return self.first + self.n_patches if self.no_more_class else None

    @property
    def slots(self) -> int:
        """The first subpatch."""
        return self.first + self.n_patches + self.no_more_class

    @property
    def locations(self) -> int:
        """The first location."""
        return self.slots + self.n_slots

    @property
    def end(self) -> int:
        """The first id after the grounding tokens."""
        return self.locations + self.n_locations

    def token(self, token_id: int) -> str:
        """The text of a grounding token, `<POINT_k>`."""
        return f"<POINT_{token_id - self.first}>"

    def allowed(
        self, history: Sequence[int], *, repeats: bool = False, patch_order: bool = True, slot_order: bool = True
    ) -> list[tuple[int, int]]:
        """The ids that may follow `history`, as half-open intervals.

        A patch is followed by a subpatch and then a location. With `patch_order`, patches ascend through the answer;
        with `slot_order` subpatches ascend within a patch, and without `repeats` no subpatch is chosen twice.
        """
        last, finished = history[-1], history[:-2]
        patch = next((i for i in reversed(finished) if self.first <= i < self.slots), None)
        # Without a number after it, a point is complete with its location.
        complete = finished if self.numbered else history[:-1]
        slot = next((i for i in reversed(complete) if self.slots <= i < self.locations), None)
        if self.no_more in history:
            return [(0, self.first)]
        if self.first <= last < self.slots:
            start = self.slots
            if slot_order and patch == last and slot is not None:
                start = slot if repeats else slot + 1
            return [(start, self.locations)]
        if self.slots <= last < self.locations:
            return [(self.locations, self.end)]
        start = self.first
        closed = slot_order and not repeats and slot == self.locations - 1 and patch is not None
        if patch_order and patch is not None:
            start = patch + closed
        elif closed and patch is not None and patch > self.first:
            return [(0, patch), (patch + 1, self.slots)]
        return [(0, self.slots)] if start == self.first else [(0, self.first), (start, self.slots)]


def point_target(
    x: float, y: float, pooling: np.ndarray, grid: np.ndarray, frame: Sequence[float]
) -> tuple[int, int, int]:
    """(patch, slot, location) of a point, the inverse of `decode_grounding`.

    x, y: fractions of the image's width and height, clipped to 0 to 1. `pooling`: int [n_patches, n_slots]; `grid`: int
    [rows, cols], the patches that tile the image; `frame`: (left, top, width, height) of the image in it, in patches.
    Source: get_patch_coordinates in `olmo/models/molmo_point/molmo_point_example_preprocessor.py`.
    """
    left, top, width, height = frame
    at = [left + min(max(x, 0.0), 1.0) * width, top + min(max(y, 0.0), 1.0) * height]
    col, row = (min(int(v), length - 1) for v, length in zip(at, grid.shape[::-1], strict=True))
    patch, slot = np.argwhere(pooling == grid[row, col])[0]
    in_x, in_y = (min(int(3 * (v - cell)), 2) for v, cell in zip(at, (col, row), strict=True))
    return int(patch), int(slot), 3 * in_x + in_y


def slot_places(pooling: np.ndarray, grids: Sequence[np.ndarray]) -> np.ndarray:
    """Where the patches of image tokens are, float32 [n_patches, n_slots, 3]: their grid, and row and column in it.

    `pooling` and `grids`: as in `decode_grounding`. NaN for missing patches and for those in no grid.
    """
    size = 1 + max(int(numbers.max(initial=0)) for numbers in (pooling, *grids))
    places = np.full((size, 3), np.nan, np.float32)
    for number, grid in enumerate(grids):
        known = grid >= 0
        rows, columns = np.nonzero(known)
        places[grid[known]] = np.stack([np.full(len(rows), number), rows, columns], axis=-1)
    return np.where((pooling >= 0)[..., None], places[np.maximum(pooling, 0)], np.float32(np.nan))


def patch_places(pooling: np.ndarray, grids: Sequence[np.ndarray]) -> np.ndarray:
    """Where image tokens are, float32 [n_patches, 3]: the mean of `slot_places`, NaN for tokens in no grid."""
    found = slot_places(pooling, grids)
    there = ~np.isnan(found[..., :1])
    sums, counts = np.where(there, found, 0).sum(1), there.sum(1)
    return np.asarray(np.where(counts > 0, sums / np.maximum(counts, 1), np.nan), np.float32)


class GroundedPoint(NamedTuple):
    """One decoded point."""

    id: int  # number that the model gave the object
    frame: int  # index of the image, or of the video's frame
    x: float  # 0 to 1 from the left edge
    y: float  # 0 to 1 from the upper edge


def decode_grounding(
    text: str,
    pooling: np.ndarray,
    grids: Sequence[np.ndarray],
    *,
    frames: Sequence[Sequence[float]] = (),
    no_more_class: bool = True,
    numbered: bool = True,
    strict: bool = False,
) -> Iterator[GroundedPoint]:
    """Decode the points of the grounding tokens in `text`.

    `pooling`: int32 [n_patches, n_slots], patches of each token, numbered through all images. `grids`: for each image
    or frame int32 [rows, cols], the same numbers. `frames`: (left, top, width, height) of each image in its grid, in
    patches; empty: it fills the grid. `numbered`: as in PointHeadConfig; the points count from 1 without. Points in no
    grid (the low-resolution view, padding) are skipped. Ids out of range are skipped as well; with `strict` they index
    as in the reference, which may raise IndexError.
    """
    n_patches, n_slots = pooling.shape
    for number, match in enumerate((TRIPLE if numbered else UNNUMBERED).finditer(text), start=1):
        patch, slot, location, *names = map(int, match.groups())
        name = names[0] if names else number
        slot -= n_patches + no_more_class
        location -= n_patches + no_more_class + n_slots
        if not strict and not (patch < n_patches and 0 <= slot < n_slots and 0 <= location < 9):
            continue
        for frame, row, col in _places(int(pooling[patch, slot]), grids):
            x, y = col + (location // 3 + 0.5) * _CELL, row + (location % 3 + 0.5) * _CELL
            if frames:
                left, top, width, height = frames[frame]
                x, y = min(max((x - left) / width, 0.0), 1.0), min(max((y - top) / height, 0.0), 1.0)
            else:
                x, y = x / grids[frame].shape[1], y / grids[frame].shape[0]
            yield GroundedPoint(name, frame, x, y)


def _places(patch: int, grids: Sequence[np.ndarray]) -> Iterator[tuple[int, int, int]]:
    """The grid, row and column of a patch; nothing for a patch in no grid."""
    for frame, grid in enumerate(grids):
        rows, cols = np.nonzero(grid == patch)
        if len(rows):
            yield frame, int(rows[0]), int(cols[0])
            return


def written_out(text: str, points_of: Callable[[str], Sequence[Point]], *, numbered: bool = True) -> str:
    """`text` with its grounding tokens replaced by coordinates, in the grammar of Molmo2.

    `points_of`: the points of a text with grounding tokens, none for ids that stand for no point; those are left out.
    `numbered`: as in PointHeadConfig.
    """
    parts, end, number = list[str](), 0, 0
    follows = False  # another point of the same attribute comes before
    for match in (TRIPLE if numbered else UNNUMBERED).finditer(text):
        between = TOKEN.sub("", text[end : match.start()])
        follows = follows and not between.strip()
        points = points_of(match[0])
        parts.append(";" if follows and points else between)
        for point in points:
            number += 1
            parts.append(f"{_frame(point)} {number} {round(10 * point.x):03d} {round(10 * point.y):03d}")
            follows = True
        end = match.end()
    return "".join(parts) + TOKEN.sub("", text[end:])


def with_coordinates(text: str, points_of: Callable[[str], Sequence[Point]], *, numbered: bool = True) -> str:
    """An answer with grounding tokens in a form that can be read without the image: `parse_points` finds its points.

    As `written_out`. If the points are not in a tag, as in an answer that was cut off or is malformed, the result is a
    tag of all points alone.
    """
    written, points = written_out(text, points_of, numbered=numbered), points_of(text)
    if not points or [_place(point) for point in parse_points(written)] == [_place(point) for point in points]:
        return written
    frames: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        frames.setdefault(_frame(point), []).append((point.x / 100, point.y / 100))
    return format_coords(frames, points[0].label)


def _frame(point: Point) -> str:
    return f"{point.image or 1}" if point.time is None else f"{point.time:.1f}"


def _place(point: Point) -> tuple[int, int]:
    return round(10 * point.x), round(10 * point.y)
