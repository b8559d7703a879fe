"""Scores of a model that answers: pointing, counting, absence, captions, reading and clocks, on photos and drawings.

Photographs are asked the questions of `score_sight`: all names in them, and as many absent ones. Each score has a 95 %
confidence interval by photographs, and comes with that of a model that ignores the picture: a point in the center, the
most frequent count, the most frequent caption.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge.data.english import plural
from molmo_edge.evaluation.annotated_pictures import Picture, scene_pictures
from molmo_edge.evaluation.pointing import Pointing, score_points
from molmo_edge.evaluation.stats import score_mean
from molmo_edge.evaluation.text_scores import anls, token_f1
from molmo_edge.frontend.points import Point
from molmo_edge.molmo import Molmo
from recipes.nano.photos import Vocabulary, read
from recipes.nano.score_sight import GROUPS, Question, questions

CENTRE = (Point(50.0, 50.0),)
OTHERS = "others"  # photographs of sources that are not in GROUPS
CLOSE = 5  # minutes
_DAY = 12 * 60  # minutes on a dial


@dataclass(frozen=True)
class Case:
    """A picture and what is asked about it."""

    group: str
    rgb: Callable[[], np.ndarray]  # uint8 [h, w, 3]
    questions: tuple[Question, ...]
    annotation: Mapping[str, Any]


def photo_cases(roots: Sequence[Path], limit: int | None = None) -> list[Case]:
    """The photographs of the validation split; `limit`: at most so many of each group, evenly chosen."""
    train, val = read(list(roots), "train"), read(list(roots), "val")
    vocabulary = Vocabulary([*train, *val], list(roots))
    sources = {source: group for group, some in GROUPS.items() for source in some}
    cases: dict[str, list[Case]] = {}
    for photo in val:
        group_name = sources.get(photo.annotation["source"], OTHERS)
        group = cases.setdefault(group_name, [])
        if photo.annotation.get("objects") or photo.annotation.get("captions"):
            # Seeded as in `score_sight.evaluate`, which numbers the photographs with objects of a group.
            number = sum(bool(case.annotation.get("objects")) for case in group)
            asked = questions(photo, vocabulary, np.random.default_rng([0, number]))
            group.append(Case(group_name, photo.rgb, tuple(asked), photo.annotation))
    return [case for group in cases.values() for case in group[:: -(-len(group) // limit) if limit else 1]]


def picture_case(picture: Picture, per_picture: int) -> Case:
    """At most `per_picture` labels of a picture, and an absent one."""
    asked = [Question(label, tuple(map(tuple, boxes))) for label, boxes in picture.labels()[:per_picture]]  # type: ignore[misc]
    if absent := picture.absent():
        asked.append(Question(absent, ()))
    return Case(picture.group, picture.rgb, tuple(asked), picture.annotation)


def drawn_cases(sprites: Path, scenes: int) -> list[Case]:
    """Scenes of sprites, and a third as many of words and of clocks."""
    kinds = (("sprites", 1), ("words", 3), ("clocks", 3))
    return [picture_case(p, 3) for kind, share in kinds for p in scene_pictures(sprites, scenes // share, kind)]


@dataclass
class _Results:
    """What was found, by group; each result with the number of its picture."""

    pointed: dict[str, list[tuple[int, Pointing, Pointing]]] = field(default_factory=dict)  # the model's, the center's
    counted: dict[str, list[tuple[int, int | None, int]]] = field(default_factory=dict)
    absent: dict[str, list[tuple[int, bool]]] = field(default_factory=dict)
    captions: list[tuple[int, str, Sequence[str], Sequence[str]]] = field(
        default_factory=list
    )  # with references, names
    read: list[tuple[int, str, str]] = field(default_factory=list)
    clocks: list[tuple[int, str, str]] = field(default_factory=list)


def evaluate(molmo: Molmo, cases: Iterable[Case], progress: Callable[[str], None]) -> dict[str, Any]:
    """Ask about every picture."""
    found, started = _Results(), time.monotonic()
    for n, case in enumerate(cases):
        scene = molmo.encode(case.rgb())
        for question in case.questions:
            points = molmo.point(scene, question.name).points
            if question.boxes:
                scores = score_points(points, list(question.boxes)), score_points(CENTRE, list(question.boxes))
                found.pointed.setdefault(case.group, []).append((n, *scores))
                count = molmo.count(scene, question.name).count
                found.counted.setdefault(case.group, []).append((n, count, len(question.boxes)))
            else:
                found.absent.setdefault(case.group, []).append((n, not points))
        if captions := case.annotation.get("captions"):
            names = [question.name for question in case.questions if question.boxes]
            found.captions.append((n, molmo.caption(scene).text.strip(), captions, names))
        for key, question_text, value, into in (
            ("texts", "What does the text say?", "text", found.read),
            ("clocks", "What time is it?", "time", found.clocks),
        ):
            if len(case.annotation.get(key, ())) == 1:
                answer = molmo.ask(scene, question_text).text.strip()
                into.append((n, answer, case.annotation[key][0][value]))
        progress(f"{n + 1} pictures, {time.monotonic() - started:.0f} s")
    return {
        "pointing": {group: _pointing(rows) for group, rows in found.pointed.items()},
        "counting": {group: _counting(rows) for group, rows in found.counted.items()},
        "none": {group: _none(rows) for group, rows in found.absent.items()},
        "captions": _captions(found.captions),
        "reading": _reading(found.read),
        "clocks": _clocks(found.clocks),
    }


def _share(values: Sequence[float], pictures: Sequence[Hashable]) -> dict[str, float | int | None]:
    """The mean with its interval, whose ends are None where a single picture was asked about."""
    found = score_mean(list(map(float, values)), pictures).to_dict()
    return {k: None if math.isnan(v) else round(v, 4) for k, v in found.items()}


def _pointing(rows: Sequence[tuple[int, Pointing, Pointing]]) -> dict[str, Any]:
    """F1 is the mean over questions; precision and recall are over all points and boxes."""
    at, ours = [n for n, _, _ in rows], [score for _, score, _ in rows]
    hits, points, boxes = (sum(getattr(s, k) for s in ours) for k in ("hits", "points", "boxes"))
    return {
        "f1": _share([s.f1 for s in ours], at),
        "centre_f1": _share([s.f1 for _, _, s in rows], at),
        "precision": round(hits / max(1, points), 4),
        "recall": round(hits / max(1, boxes), 4),
    }


def _counting(rows: Sequence[tuple[int, int | None, int]]) -> dict[str, Any]:
    at, usual = [n for n, _, _ in rows], Counter(truth for _, _, truth in rows).most_common(1)[0][0]
    return {
        "exact": _share([ours == truth for _, ours, truth in rows], at),
        "usual_exact": _share([usual == truth for _, _, truth in rows], at),
    }


def _none(rows: Sequence[tuple[int, bool]]) -> dict[str, Any]:
    return {"right": _share([right for _, right in rows], [n for n, _ in rows])}


def _captions(rows: Sequence[tuple[int, str, Sequence[str], Sequence[str]]]) -> dict[str, Any]:
    """Token F1 with the nearest human caption, and the share of the picture's names that a caption mentions."""
    if not rows:
        return {}
    at = [n for n, *_ in rows]
    counts = Counter(text.strip() for _, _, references, _ in rows for text in references)
    usual = counts.most_common(1)[0][0]

    def nearest(text: str, references: Sequence[str]) -> float:
        return max(token_f1(text, other) for other in references)

    scores = {
        "token_f1": _share([nearest(text, references) for _, text, references, _ in rows], at),
        "usual_token_f1": _share([nearest(usual, references) for _, _, references, _ in rows], at),
    }
    named = [(n, text, name) for n, text, _, names in rows for name in names]
    if named:
        at = [n for n, _, _ in named]
        scores["names"] = _share([_mentions(text, name) for _, text, name in named], at)
        scores["usual_names"] = _share([_mentions(usual, name) for _, _, name in named], at)
    return scores


def _mentions(text: str, name: str) -> bool:
    """Whether a text has the name or its plural, as whole words."""
    return any(re.search(rf"\b{re.escape(word)}\b", text.lower()) for word in (name, plural(name)))


def _reading(rows: Sequence[tuple[int, str, str]]) -> dict[str, Any]:
    if not rows:
        return {}
    at = [n for n, _, _ in rows]
    return {
        "anls": _share([anls(truth, text) for _, text, truth in rows], at),
        "exact": _share([text.lower() == truth.lower() for _, text, truth in rows], at),
    }


def _clocks(rows: Sequence[tuple[int, str, str]]) -> dict[str, Any]:
    if not rows:
        return {}
    at = [n for n, _, _ in rows]
    return {"close": _share([minutes_apart(text, truth) <= CLOSE for _, text, truth in rows], at)}


def minutes_apart(answer: str, truth: str) -> int:
    """Minutes between two times on a dial, such as "3:25"; half a day if `answer` is not a time."""
    try:
        (h, m), (hour, minute) = (map(int, text.strip().split(":")) for text in (answer, truth))
    except ValueError:
        return _DAY // 2
    apart = abs((h - hour) * 60 + m - minute) % _DAY
    return min(apart, _DAY - apart)


def score(model: Path | None, cases: Sequence[Case], *, max_crops: int | None = None) -> Any:
    """`evaluate` for a bundle or checkpoint directory; None: the embedded nano."""
    with Molmo(model, max_crops=max_crops) as molmo:
        return evaluate(molmo, cases, lambda line: print(f"\r{line}", end="", file=sys.stderr))
