"""Scores of points and of counts. Coordinates are percent of the image, except where pixels are named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from molmo_edge.evaluation.text_scores import read_integer
from molmo_edge.frontend.points import Point, extract_points, parse_count

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


_NUMBER = r"\s*\d+(\.\d+)?"
_PAIRS = re.compile(r"(\(\s*-?\d+(\.\d+)?\s*,\s*-?\d+(\.\d+)?\s*\)\n?)+")
_ONE_TAG = re.compile(rf'<point\s+(x="{_NUMBER}"\s+y="{_NUMBER}"|p=\s*\d{{3}}\s*,\s*\d{{3}})\s+alt="')
_MANY_TAG = re.compile(
    rf'<points\s+((x\d+="{_NUMBER}"\s+y\d+="{_NUMBER}"\s+)+|(\d+=\s*\d{{3}}\s*,\s*\d{{3}}\s+)+)alt="'
)


def is_valid_point_answer(text: str) -> bool:
    """Whether an answer is one tag of points, or pairs in parentheses, and nothing else.

    "There are none." and a counting answer are not valid, nor is a tag without alt. In time linear in the text, so
    without the pattern of the reference (olmo/eval/evaluators.py::is_valid_format), but it accepts the same.
    """
    text = text.strip()
    if _PAIRS.fullmatch(text):
        return True
    for tag, closing in ((_ONE_TAG, "</point>"), (_MANY_TAG, "</points>")):
        match = tag.match(text)
        if match:
            return text.endswith(closing) and text.find('">', match.end(), -len(closing)) >= 0
    return False


def score_in_masks(
    text: str, points: Sequence[tuple[float, float]], masks: Sequence[np.ndarray], width: float, height: float
) -> dict[str, float]:
    """Precision, recall and F1, under "precision", "recall" and "f1", of an answer that points at things with masks.

    The places in the answer and the true `points`, in pixels and one for each of `masks`, are matched by distance.
    A place is a hit if the mask of its match holds it. Masks are bool, height x width. Precision is hits over
    places, recall hits over masks. An answer in no valid format scores 0, and so does one in a valid format that
    gives no place, where the reference fails. With nothing to find, an answer without places scores 1, others 0.

    Reference: olmo/eval/evaluators.py::PointingEval. Its data set (olmo/data/pixmo_datasets.py::PixMoPointsEval)
    hands it `points` in percent though, and it matches pixels with percent: for its figures, do the same.
    """
    said = extract_points(text.strip(), width, height)
    if len(points) == 0:
        return dict.fromkeys(("precision", "recall", "f1"), float(not said))
    hits = 0
    if said and is_valid_point_answer(text):
        hits = sum(_in_mask(masks[mask], *said[place]) for place, mask in assign(_distances(said, points)))
    if not hits:
        return dict.fromkeys(("precision", "recall", "f1"), 0.0)
    precision, recall = hits / len(said), hits / len(masks)
    # The reference's epsilon: a perfect answer scores 5e-11 less than 1.
    return {"precision": precision, "recall": recall, "f1": 2 * (precision * recall) / (precision + recall + 1e-10)}


def _in_mask(mask: np.ndarray, x: float, y: float) -> bool:
    """Rounded to the nearest pixel, halves to even, as the reference does: its last half pixel is outside."""
    column, row = round(x), round(y)
    return 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1] and bool(mask[row, column])


def _distances(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> np.ndarray:
    """Euclidean, len(a) x len(b)."""
    differences = np.asarray(a, np.float64)[:, None] - np.asarray(b, np.float64)[None]
    return np.sqrt((differences**2).sum(-1))


def drift(a: Sequence[Point], b: Sequence[Point], width: float, height: float) -> list[float]:
    """How far two answers' points lie apart: the distance of each matched pair in percent of the image's diagonal.

    As many as the answer with fewer points has, in the order of `a`; what is left over says nothing here.
    """
    if not a or not b:
        return []
    distances = _distances(*([point.pixel(width, height) for point in points] for points in (a, b)))
    diagonal = float(np.hypot(width, height))
    return [float(distances[pair]) / diagonal * 100.0 for pair in assign(distances)]


def assign(cost: np.ndarray) -> list[tuple[int, int]]:
    """The pairs (row, column) of least total cost, each row and column at most once, sorted; `cost` is finite.

    As many pairs as the shorter side has. Shortest augmenting paths in O(n^3): D. F. Crouse, "On implementing 2D
    rectangular assignment algorithms", 2016. Of several best answers it gives the one that
    scipy.optimize.linear_sum_assignment gives, which the reference calls, so that scores of ties are equal too.
    """
    if cost.shape[0] > cost.shape[1]:
        return sorted((row, column) for column, row in assign(cost.T))
    rows, columns = cost.shape
    costs: list[list[float]] = cost.tolist()
    row_price, column_price = [0.0] * rows, [0.0] * columns  # the dual variables
    row_of, column_of = [-1] * columns, [-1] * rows
    for start in range(rows):
        # The cheapest paths from `start` to each column, as Dijkstra finds them, until one ends in a free column.
        length, before = [float("inf")] * columns, [start] * columns
        unreached, reached = list(reversed(range(columns))), list[int]()
        row, shortest = start, 0.0
        while row >= 0:
            nearest, best = 0, float("inf")
            for place, column in enumerate(unreached):
                through = shortest + costs[row][column] - row_price[row] - column_price[column]
                if through < length[column]:
                    length[column], before[column] = through, row
                # A free column wins a tie, the last one in scipy's order.
                if length[column] < best or (length[column] == best and row_of[column] < 0):
                    nearest, best = place, length[column]
            column, shortest = unreached[nearest], best
            unreached[nearest] = unreached[-1]
            unreached.pop()
            reached.append(column)
            row = row_of[column]
        row_price[start] += shortest
        for column in reached:
            column_price[column] -= shortest - length[column]
            if row_of[column] >= 0:
                row_price[row_of[column]] += shortest - length[column]
        # Every row on the path to the free column, the last reached, takes the column it leads to.
        column, row = reached[-1], -1
        while row != start:
            row = before[column]
            row_of[column] = row
            column_of[row], column = column, column_of[row]
    return list(enumerate(column_of))


def point_count_score(text: str, count: int) -> dict[str, float]:
    """Whether an answer states the count: "correct", "close" (at most one off), "valid" (it states any).

    "There are none." states none here, as the reference looks for it with "\\b" for a backspace; and of several
    lines only the first is searched for "a total of". `molmo_edge.frontend.points.parse_count` reads both.
    Reference: olmo/eval/evaluators.py::PointCountEval.
    """
    plain = text.strip().lower().rstrip(".").strip()
    word = "".join(plain.split()[-1:])
    said = read_integer(word)
    if said is None and word.isalpha() and word != "none":
        said = parse_count(word)
    if said is None:
        total = re.match(r".*a total of ([0-9]+)", plain)
        said = read_integer(total.group(1)) if total else None
    if said is None:
        return {"correct": 0.0, "close": 0.0, "valid": 0.0}
    return {"correct": float(said == count), "close": float(abs(said - count) <= 1), "valid": 1.0}
