"""Scores of single answers. All coordinates are percent of the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from molmo_edge.points import Point

Box = Sequence[float]  # x0, y0, x1, y1


@dataclass(frozen=True)
class Pointing:
    """Points against boxes, matched one to one."""

    hits: int  # points that found a box of their own
    points: int
    boxes: int

    @property
    def f1(self) -> float:
        """2 * hits / (points + boxes); 1 where there was nothing to find and nothing was pointed at."""
        total = self.points + self.boxes
        return 2 * self.hits / total if total else 1.0


def score_points(points: Sequence[Point], boxes: Sequence[Box]) -> Pointing:
    """The largest one-to-one matching of points to boxes that hold them (Kuhn's algorithm)."""
    inside = [[b for b, box in enumerate(boxes) if _holds(box, p)] for p in points]
    taken: dict[int, int] = {}  # box -> point

    def place(point: int, tried: set[int]) -> bool:
        for box in inside[point]:
            if box not in tried:
                tried.add(box)
                if box not in taken or place(taken[box], tried):
                    taken[box] = point
                    return True
        return False

    hits = sum(place(point, set()) for point in range(len(points)))
    return Pointing(hits, len(points), len(boxes))


def _holds(box: Box, point: Point) -> bool:
    return box[0] <= point.x <= box[2] and box[1] <= point.y <= box[3]


def character_error(answer: str, truth: str) -> float:
    """Edit distance over the truth's length, 1 at most. Case and spaces at the ends are ignored."""
    a, b = answer.strip().lower(), truth.strip().lower()
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return min(1.0, row[-1] / max(1, len(b)))
