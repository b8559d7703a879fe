"""Scores of a model that answers: pointing, counting, absence, reading and clocks, on photos and on drawn scenes.

Each score comes with the baseline of a model that ignores the picture: one point in the centre, the most frequent
count, the most frequent answer.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from molmo_edge.evaluation.annotated_pictures import RECEIPTS, Picture, photo_pictures, scene_pictures
from molmo_edge.evaluation.pointing import Pointing, score_points
from molmo_edge.evaluation.text_scores import character_error
from molmo_edge.frontend.points import Point
from molmo_edge.molmo import Molmo

CENTRE = (Point(50.0, 50.0),)


def evaluate(
    molmo: Molmo, pictures: Iterable[Picture], per_picture: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Ask about every picture; at most `per_picture` labels of each for pointing and counting."""
    pointed: dict[str, list[Pointing]] = {}
    centre: dict[str, list[Pointing]] = {}
    counted: dict[str, list[tuple[int | None, int]]] = {}
    refused: dict[str, list[bool]] = {}
    read: list[tuple[str, str]] = []
    clocks: list[tuple[str, str]] = []
    started = time.monotonic()
    for n, picture in enumerate(pictures, 1):
        scene = molmo.encode(picture.rgb())
        for label, boxes in picture.labels()[:per_picture]:
            points = molmo.point(scene, label).points
            pointed.setdefault(picture.group, []).append(score_points(points, boxes))
            centre.setdefault(picture.group, []).append(score_points(CENTRE, boxes))
            counted.setdefault(picture.group, []).append((molmo.count(scene, label).count, len(boxes)))
        if absent := picture.absent():
            refused.setdefault(picture.group, []).append(not molmo.point(scene, absent).points)
        if len(picture.annotation.get("texts", ())) == 1:
            read.append(
                (molmo.ask(scene, "What does the text say?").text.strip(), picture.annotation["texts"][0]["text"])
            )
        if len(picture.annotation.get("clocks", ())) == 1:
            clocks.append((molmo.ask(scene, "What time is it?").text.strip(), picture.annotation["clocks"][0]["time"]))
        progress(f"{n} pictures, {time.monotonic() - started:.0f} s")
    return {
        "pointing": {g: summarise_points(v, centre[g]) for g, v in pointed.items()},
        "counting": {g: summarise_counts(v) for g, v in counted.items()},
        "absent": {g: {"n": len(v), "no_points": mean(map(float, v))} for g, v in refused.items()},
        "reading": summarise_texts(read),
        "clocks": summarise_texts(clocks),
    }


def summarise_points(scores: list[Pointing], centre: list[Pointing]) -> dict[str, float]:
    """F1 is the mean over questions; precision and recall are over all points and boxes."""
    hits, points, boxes = (sum(getattr(s, k) for s in scores) for k in ("hits", "points", "boxes"))
    return {
        "n": len(scores),
        "f1": mean(s.f1 for s in scores),
        "precision": hits / max(1, points),
        "recall": hits / max(1, boxes),
        "centre_guess_f1": mean(s.f1 for s in centre),
    }


def summarise_counts(pairs: list[tuple[int | None, int]]) -> dict[str, float]:
    majority = Counter(truth for _, truth in pairs).most_common(1)[0][1] if pairs else 0
    return {
        "n": len(pairs),
        "exact": mean(float(ours == truth) for ours, truth in pairs),
        "majority_exact": majority / max(1, len(pairs)),
    }


def summarise_texts(pairs: list[tuple[str, str]]) -> dict[str, float]:
    majority = Counter(truth for _, truth in pairs).most_common(1)[0][1] if pairs else 0
    return {
        "n": len(pairs),
        "exact": mean(float(ours.lower() == truth.lower()) for ours, truth in pairs),
        "character_error": mean(character_error(ours, truth) for ours, truth in pairs),
        "majority_exact": majority / max(1, len(pairs)),
    }


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return round(sum(listed) / len(listed), 4) if listed else 0.0


def pictures(roots: Sequence[Path], limit: int | None, sprites: Path | None, scenes: int) -> list[Picture]:
    """Photographs of the validation split, `limit` of each folder at most, evenly chosen, and drawn scenes.

    scenes: of sprites; a third as many are drawn of words and of clocks.
    """
    found: list[Picture] = []
    for root in roots:
        photos = [photo for photo in photo_pictures(root) if photo.group != RECEIPTS]
        found += photos[:: -(-len(photos) // limit) if limit else 1]
    if sprites:
        for kind, share in (("sprites", 1), ("words", 3), ("clocks", 3)):
            found += scene_pictures(sprites, scenes // share, kind)
    return found


def score(model: Path | None, asked: Sequence[Picture], *, per_picture: int = 3, max_crops: int | None = None) -> Any:
    """`evaluate` for a bundle or checkpoint directory; None: the embedded nano."""
    with Molmo(model, max_crops=max_crops) as molmo:
        return evaluate(molmo, asked, per_picture, lambda line: print(f"\r{line}", end="", file=sys.stderr))
