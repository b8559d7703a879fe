"""Scores of points and counts. Coordinates are percent of the image unless a docstring says pixels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from molmo_edge.evaluation.text_scores import read_integer
from molmo_edge.frontend.coords_points import find_coords
from molmo_edge.frontend.points import Point, extract_points, parse_count

Box = Sequence[float]  # x0, y0, x1, y1


@dataclass(frozen=True)
class Pointing:
    """Points matched to boxes, one to one."""

    hits: int  # matched pairs
    points: int
    boxes: int

    @property
    def f1(self) -> float:
        """2 * hits / (points + boxes); 1 if there are neither points nor boxes."""
        total = self.points + self.boxes
        return 2 * self.hits / total if total else 1.0


def score_points(points: Sequence[Point], boxes: Sequence[Box]) -> Pointing:
    """Match points to the boxes that contain them, one to one, with as many matches as possible."""
    inside = np.array([[_contains(box, point) for box in boxes] for point in points], bool).reshape(
        len(points), len(boxes)
    )
    hits = int(inside[linear_sum_assignment(inside, maximize=True)].sum())
    return Pointing(hits, len(points), len(boxes))


def _contains(box: Box, point: Point) -> bool:
    return box[0] <= point.x <= box[2] and box[1] <= point.y <= box[3]


_NUMBER = r"\s*\d+(\.\d+)?"
_PAIRS = re.compile(r"(\(\s*-?\d+(\.\d+)?\s*,\s*-?\d+(\.\d+)?\s*\)\n?)+")
_ONE_TAG = re.compile(rf'<point\s+(x="{_NUMBER}"\s+y="{_NUMBER}"|p=\s*\d{{3}}\s*,\s*\d{{3}})\s+alt="')
_MANY_TAG = re.compile(
    rf'<points\s+((x\d+="{_NUMBER}"\s+y\d+="{_NUMBER}"\s+)+|(\d+=\s*\d{{3}}\s*,\s*\d{{3}}\s+)+)alt="'
)


def is_valid_point_answer(text: str) -> bool:
    """Whether an answer is a single tag of points or a list of (x, y) pairs, and nothing else.

    "There are none.", a counting answer and a tag without alt are not valid. The reference's pattern
    (olmo/eval/evaluators.py::is_valid_format) accepts the same texts, but backtracks; this takes linear time. Besides,
    a tag of Molmo2 (`coords`) with points and a label is valid.
    """
    text = text.strip()
    if _PAIRS.fullmatch(text):
        return True
    for pattern, closing in ((_ONE_TAG, "</point>"), (_MANY_TAG, "</points>")):
        match = pattern.match(text)
        if match:
            return text.endswith(closing) and text.find('">', match.end(), -len(closing)) >= 0
    tag = next(find_coords(text), None)
    if tag is None or tag.start or not tag.points:
        return False
    closing = f"</{text[1:7]}>"  # of points or tracks
    return text.endswith(closing) and text.count("<") == 2 and bool(text[tag.end : -len(closing)].strip())


def score_in_masks(
    text: str, points: Sequence[tuple[float, float]], masks: Sequence[np.ndarray], width: float, height: float
) -> dict[str, float]:
    """Precision, recall and F1 of an answer that points at objects with masks, as {"precision", "recall", "f1"}.

    Args:
        text: The answer.
        points: A true point for each mask, in pixels. Answered points are matched to these by distance.
        masks: Bool [height, width] each. An answered point is a hit if the mask of its match contains it.
        width, height: Of the image, pixels.

    Precision is hits / answered points, recall is hits / masks. An answer in no valid format scores 0, as does a
    valid format without points, where the reference fails. Without masks, an answer without points scores 1.

    Reference: olmo/eval/evaluators.py::PointingEval. Its data set (olmo/data/pixmo_datasets.py::PixMoPointsEval)
    passes `points` in percent although they are compared with pixels: do the same to reproduce its figures.
    """
    answered = extract_points(text.strip(), width, height)
    if len(points) == 0:
        return dict.fromkeys(("precision", "recall", "f1"), float(not answered))
    hits = 0
    if answered and is_valid_point_answer(text):
        hits = sum(_in_mask(masks[mask], *answered[i]) for i, mask in assign(_distances(answered, points)))
    if not hits:
        return dict.fromkeys(("precision", "recall", "f1"), 0.0)
    precision, recall = hits / len(answered), hits / len(masks)
    # The reference's epsilon: a perfect answer scores 5e-11 less than 1.
    return {"precision": precision, "recall": recall, "f1": 2 * (precision * recall) / (precision + recall + 1e-10)}


def _in_mask(mask: np.ndarray, x: float, y: float) -> bool:
    """Coordinates are rounded half to even, as in the reference: the last half pixel is outside."""
    column, row = round(x), round(y)
    return 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1] and bool(mask[row, column])


def _distances(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> np.ndarray:
    """Euclidean, len(a) x len(b)."""
    differences = np.asarray(a, np.float64)[:, None] - np.asarray(b, np.float64)[None]
    distances: np.ndarray = np.sqrt((differences**2).sum(-1))
    return distances


def drift(a: Sequence[Point], b: Sequence[Point], width: float, height: float) -> list[float]:
    """The distances of matched pairs of two answers' points, in percent of the image's diagonal, in the order of `a`.

    There are min(len(a), len(b)) pairs; `width` and `height` are in pixels.
    """
    if not a or not b:
        return []
    distances = _distances(*([point.pixel(width, height) for point in points] for points in (a, b)))
    diagonal = float(np.hypot(width, height))
    return [float(distances[pair]) / diagonal * 100.0 for pair in assign(distances)]


def assign(cost: np.ndarray) -> list[tuple[int, int]]:
    """The one-to-one assignment (row, column) of least total cost, sorted by row.

    The reference calls the same function of SciPy, so that among several best assignments both take the same one.
    """
    rows, columns = linear_sum_assignment(cost)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def point_count_score(text: str, count: int) -> dict[str, float]:
    """{"correct", "close", "valid"}: the answer's count is right, is at most 1 off, exists.

    As in the reference (olmo/eval/evaluators.py::PointCountEval), "There are none." has no count, because its pattern
    contains "\\b" as a backspace, and "a total of" is searched for in the first line only.
    `molmo_edge.frontend.points.parse_count` reads both.
    """
    plain = text.strip().lower().rstrip(".").strip()
    word = "".join(plain.split()[-1:])
    stated = read_integer(word)
    if stated is None and word.isalpha() and word != "none":
        stated = parse_count(word)
    if stated is None:
        total = re.match(r".*a total of ([0-9]+)", plain)
        stated = read_integer(total.group(1)) if total else None
    if stated is None:
        return {"correct": 0.0, "close": 0.0, "valid": 0.0}
    return {"correct": float(stated == count), "close": float(abs(stated - count) <= 1), "valid": 1.0}
