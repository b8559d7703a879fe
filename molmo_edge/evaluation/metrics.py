"""The metrics of a loss: from compared answers to estimates, and how to print them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from molmo_edge.evaluation.comparison import ComparedAnswer, Comparison
from molmo_edge.evaluation.stats import Estimate, mean, quantile, score_mean, transformed


@dataclass(frozen=True)
class Metric:
    """How a metric is named and printed, and its best value."""

    title: str
    format: Callable[[float], str]
    lossless: float  # the value where nothing is lost


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _digits(number: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{number}f}"


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}"


# In the order of a report: what users see, then tokens, then internals.
METRICS = {
    "same_points": Metric("answers with identical points", _percent, 1.0),
    "drift": Metric("point drift, % of diagonal", _digits(2), 0.0),
    "drift_p95": Metric("point drift, 95th percentile", _digits(2), 0.0),
    "unmatched": Metric("unmatched points per answer", _digits(2), 0.0),
    "same_answer": Metric("identical answers", _percent, 1.0),
    "first_divergence": Metric("first different token", _digits(1), math.nan),
    "same_top": Metric("top-1 token agreement", _percent, 1.0),
    "kl_mean": Metric("KL per token, mean", _small, 0.0),
    "kl_median": Metric("KL, median", _small, 0.0),
    "kl_p99": Metric("KL, 99th percentile", _small, 0.0),
    "kl_grounding": Metric("KL per grounding token, mean", _small, 0.0),
    "perplexity_ratio": Metric("perplexity ratio", _digits(4), 1.0),
    "router": Metric("expert agreement", _percent, 1.0),
    "vision": Metric("vision features, 1 - cosine", _small, 0.0),
    "vision_worst": Metric("worst patch, 1 - cosine", _small, 0.0),
    "image": Metric("image features, 1 - cosine", _small, 0.0),
    "image_worst": Metric("worst cell, 1 - cosine", _small, 0.0),
}


def compute_metrics(comparison: Comparison, router: Sequence[float] | None = None) -> dict[str, Estimate]:
    """Estimates by the names of METRICS; metrics without samples are left out.

    `router`: the share of equal expert choices for each of some questions.
    """
    images, answers = comparison.images, comparison.answers
    ids = [image.image_id for image in images]
    found: dict[str, Estimate] = {}
    for name, parts in (("vision", [i.patches for i in images]), ("image", [i.cells for i in images])):
        if given := [part for part in parts if part is not None]:
            found[name] = mean([part.mean for part in given], ids)
            worst = max(part.worst for part in given)  # over all images, so that an interval has no meaning
            found[f"{name}_worst"] = Estimate(worst, worst, worst, len(given))
    kl, tokens = _flatten(answers, lambda a: a.kl)
    found["kl_mean"] = mean(kl, tokens)
    found["kl_median"] = quantile(kl, tokens, 0.5)
    found["kl_p99"] = quantile(kl, tokens, 0.99)
    grounded, ids_grounded = _flatten(answers, lambda a: a.kl[a.grounding] if a.grounding is not None else ())
    if len(grounded):
        found["kl_grounding"] = mean(grounded, ids_grounded)
    found["same_top"] = mean(*_flatten(answers, lambda a: a.same_top))
    log_ratio, _ = _flatten(answers, lambda a: a.nll - a.nll_reference)
    found["perplexity_ratio"] = transformed(mean(log_ratio, tokens), math.exp)
    if router:
        found["router"] = mean(router, range(len(router)))
    found["same_answer"] = score_mean([float(a.divergence is None) for a in answers], _image_ids(answers))
    diverged = [(a, a.divergence) for a in answers if a.divergence is not None]
    if diverged:
        found["first_divergence"] = mean([index for _, index in diverged], _image_ids([a for a, _ in diverged]))
    if pointing := [a for a in answers if a.reference_points or a.points]:
        ids = _image_ids(pointing)
        found["same_points"] = score_mean([float(not a.unmatched and not any(a.drift)) for a in pointing], ids)
        found["unmatched"] = mean([a.unmatched for a in pointing], ids)
        drifts, ids = _flatten(pointing, lambda a: a.drift)
        if len(drifts):
            found["drift"] = mean(drifts, ids)
            found["drift_p95"] = quantile(drifts, ids, 0.95)
    return found


@dataclass(frozen=True)
class ScoreComparison:
    """A score of both models on the same questions."""

    reference: Estimate
    candidate: Estimate
    difference: Estimate  # mean over questions of candidate - reference


def compare_scores(answers: Sequence[ComparedAnswer]) -> dict[str, dict[str, ScoreComparison]]:
    """{group: {score: ScoreComparison}}; "KIND/all" spans the groups of a kind where there are several."""
    gathered: dict[str, dict[str, list[tuple[float, float, str]]]] = {}
    groups_of: dict[str, set[str]] = {}
    for a in answers:
        groups_of.setdefault(a.question.kind, set()).add(a.question.group)
    for a in answers:
        q = a.question
        groups = [q.group, *([f"{q.kind}/all"] if len(groups_of[q.kind]) > 1 and q.kind != "task" else [])]
        for group in groups:
            for name, value in a.scores.items():
                if name in a.scores_reference:
                    row = (a.scores_reference[name], value, q.image_id)
                    gathered.setdefault(group, {}).setdefault(name, []).append(row)
    return {
        group: {name: _compare_score(rows) for name, rows in by_name.items()} for group, by_name in gathered.items()
    }


def _compare_score(rows: Sequence[tuple[float, float, str]]) -> ScoreComparison:
    images = [image for _, _, image in rows]
    return ScoreComparison(
        score_mean([reference for reference, _, _ in rows], images),
        score_mean([candidate for _, candidate, _ in rows], images),
        mean([candidate - reference for reference, candidate, _ in rows], images),
    )


def _image_ids(answers: Sequence[ComparedAnswer]) -> list[str]:
    return [a.question.image_id for a in answers]


def _flatten(
    answers: Sequence[ComparedAnswer], get: Callable[[ComparedAnswer], Sequence[float] | np.ndarray]
) -> tuple[np.ndarray, list[str]]:
    """The values of all answers in one array, and the image of each value."""
    parts = [np.asarray(get(a), np.float64) for a in answers]
    ids = [a.question.image_id for a, part in zip(answers, parts, strict=True) for _ in range(len(part))]
    return np.concatenate(parts) if parts else np.zeros(0), ids
