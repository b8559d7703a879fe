"""Place boxes, such as labels, beside points of a picture: inside it, and clear of markers and of each other.

Greedy: the widest box is placed first, each at the cheapest of its candidates. The candidates are rings of positions
around its anchors; if none of them is free, all positions of a grid over the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_DIRECTIONS = 16  # candidates per ring
_RINGS = 8
GRID = 48  # positions along each side of the picture, if no ring has a free place
_MOST_SEARCHES = 16  # of the grid, for one picture: more boxes than that do not find room anyway
_COMPARED = 48  # candidates for which the leaders are compared, too
_MOST_ANCHORS = 12  # of a box that may be placed at any of several points
# Costs. The unit is the height of the box, for the distance from its anchor.
_OVER_LEADER = 8.0  # for a leader that passes over a marker
_LATER_ANCHOR = 0.4
# Weights of what a box covers, by which candidates are compared first.
_OVER_BOX = 3.0
_OVER_DISC = 1.0


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Whether the two have more than an edge in common."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The point of the box that is nearest to (x, y)."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)


@dataclass(frozen=True)
class Request:
    """A box of width x height pixels to place beside one of `anchors`, at least `gap` pixels from it."""

    width: float
    height: float
    anchors: tuple[tuple[float, float], ...]
    gap: float


@dataclass(frozen=True)
class Placed:
    """Where a box was placed, and beside which of its anchors."""

    box: Box
    anchor: tuple[float, float]


def place(
    requests: Sequence[Request], discs: np.ndarray, size: tuple[float, float], *, spacing: float = 2.0
) -> list[Placed]:
    """Place the requested boxes in a picture of `size` (width, height) and return them in the order of `requests`.

    `discs`: float [n, 3], x, y and radius of markers to keep clear of. `spacing`: pixels to leave around boxes. A box
    overlaps another one, or a disc, only if no candidate is free; if many boxes are crowded, only candidates near their
    anchors are tried. A box larger than the picture begins at its top left.
    """
    placed: dict[int, Placed] = {}
    taken, searches = np.empty((0, 4)), 0
    for index in sorted(range(len(requests)), key=lambda i: -requests[i].width):
        request = requests[index]
        found = _best(request, _around(request), discs, taken, size, spacing)
        if found.covers and searches < _MOST_SEARCHES:
            searches += 1
            found = min(found, _best(request, _everywhere(request, size), discs, taken, size, spacing))
        placed[index] = Placed(Box(*found.box), request.anchors[found.anchor])
        taken = np.concatenate([taken, [found.box]])
    return [placed[index] for index in range(len(requests))]


class _Found(NamedTuple):
    covers: float  # how much it covers of other boxes and of discs
    cost: float
    box: tuple[float, float, float, float]
    anchor: int


class _Candidates(NamedTuple):
    corners: np.ndarray  # [n, 2], left and top
    cost: np.ndarray  # [n], of their direction
    anchor: np.ndarray  # int [n], the index of their anchor
    columns: int | None = None  # of a grid: rows of corners with equal y, whose x are those of the first row


def _around(request: Request) -> _Candidates:
    """Candidates in rings around the anchors."""
    angles = np.arange(_DIRECTIONS) * (2 * math.pi / _DIRECTIONS)
    toward = np.stack([np.cos(angles), np.sin(angles)], -1)  # the first is to the right, then clockwise
    distances = request.gap + np.arange(_RINGS) * 0.7 * request.height
    nearest = (distances[:, None, None] * toward).reshape(-1, 2)
    side = np.tile(np.sign(np.where(np.abs(toward) < 0.2, 0, toward)), (_RINGS, 1))  # -1, 0, 1 per axis
    corners = nearest - (1 - side) / 2 * (request.width, request.height)
    # To the right is best, then straight to the left, below and above, then askew.
    cost = np.tile(0.3 * (1 - toward[:, 0]) / 2 + 0.3 * (side != 0).all(1)[:_DIRECTIONS], _RINGS)
    anchors = np.array(request.anchors[:_MOST_ANCHORS])
    index = np.repeat(np.arange(len(anchors)), len(corners))
    every = (anchors[:, None] + corners).reshape(-1, 2)
    return _Candidates(every, np.tile(cost, len(anchors)) + _LATER_ANCHOR * index, index)


def _everywhere(request: Request, size: tuple[float, float]) -> _Candidates:
    """Candidates in a grid over the whole picture, for the first anchor."""
    xs, ys = (
        np.linspace(0, max(0.0, whole - own), GRID)
        for whole, own in zip(size, (request.width, request.height), strict=True)
    )
    corners = np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2)
    return _Candidates(corners, np.zeros(len(corners)), np.zeros(len(corners), int), GRID)


def _best(
    request: Request,
    candidates: _Candidates,
    discs: np.ndarray,
    taken: np.ndarray,
    size: tuple[float, float],
    spacing: float,
) -> _Found:
    """The cheapest candidate, moved into the picture."""
    corners, cost, index, columns = candidates
    own = np.array([request.width, request.height])
    corners = np.maximum(0.0, np.minimum(corners, np.array(size) - own))
    boxes = np.concatenate([corners, corners + own], 1)  # [n, 4]
    anchors = np.array(request.anchors)[index]
    near = np.clip(anchors, boxes[:, :2], boxes[:, 2:])
    distance = np.hypot(*(near - anchors).T)
    cost = cost + np.abs(distance - request.gap) / max(1.0, request.height)
    area = max(1.0, request.width * request.height)
    covers = np.zeros(len(boxes))
    # What no candidate and no leader reaches costs none of them anything.
    reach = np.concatenate([np.minimum(boxes[:, :2], anchors).min(0), np.maximum(boxes[:, 2:], anchors).max(0)])
    around = _touching(taken + np.array([-spacing, -spacing, spacing, spacing]), reach)[0]
    if len(around):
        covers += _OVER_BOX * _covered(boxes, around, area, columns)
    squares = np.concatenate([discs[:, :2] - discs[:, 2:], discs[:, :2] + discs[:, 2:]], 1)
    squares, reached = _touching(squares, reach)
    discs = discs[reached]
    if len(discs):
        covers += _OVER_DISC * _covered(boxes, squares, area, columns)
    best = np.lexsort((cost, covers))[:_COMPARED]
    if len(discs):
        led = best[distance[best] > 1.5 * request.gap + 1]  # those with a leader
        cost[led] += _OVER_LEADER * _passes(anchors[led], near[led], discs).any(1)
    at = int(best[np.lexsort((cost[best], covers[best]))[0]])
    left, top, right, bottom = map(float, boxes[at])
    return _Found(float(covers[at]), float(cost[at]), (left, top, right, bottom), int(index[at]))


def _touching(boxes: np.ndarray, reach: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of `boxes` [n, 4] that have something in common with the box `reach` [4], and their indexes."""
    found = np.flatnonzero((boxes[:, :2] <= reach[2:]).all(1) & (boxes[:, 2:] >= reach[:2]).all(1))
    return boxes[found], found


def _covered(boxes: np.ndarray, others: np.ndarray, area: float, columns: int | None) -> np.ndarray:
    """The share of `area` that each of `boxes` [n, 4] has in common with `others` [m, 4], added up: [n].

    `columns`: see _Candidates.
    """
    if columns is not None:
        tall, wide = _overlap(boxes[::columns], others, 1), _overlap(boxes[:columns], others, 0)
        return np.asarray(tall @ wide.T).ravel() / area
    return np.asarray((_overlap(boxes, others, 0) * _overlap(boxes, others, 1) / area).sum(1))


def _overlap(boxes: np.ndarray, others: np.ndarray, axis: int) -> np.ndarray:
    """The length along `axis` (0: x) that each of `boxes` [n, 4] has in common with each of `others` [m, 4]."""
    low = np.maximum(boxes[:, None, axis], others[None, :, axis])
    high = np.minimum(boxes[:, None, axis + 2], others[None, :, axis + 2])
    return np.asarray(np.maximum(0.0, high - low))


def _passes(start: np.ndarray, end: np.ndarray, discs: np.ndarray) -> np.ndarray:
    """Whether the line from `start` to `end` [n, 2] passes over each disc [m, 3] that is not at `start`: [n, m]."""
    along_x, along_y = (end - start).T[:, :, None]
    length = np.maximum(1e-9, along_x**2 + along_y**2)
    x, y = (discs[None, :, axis] - start[:, None, axis] for axis in (0, 1))
    share = np.clip((x * along_x + y * along_y) / length, 0, 1)
    distance = np.hypot(x - share * along_x, y - share * along_y)
    return np.asarray((distance < discs[:, 2]) & (np.hypot(x, y) > discs[:, 2]))
