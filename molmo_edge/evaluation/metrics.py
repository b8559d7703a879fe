"""The figures of a loss report: from what was compared to values with intervals, and how to print them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from molmo_edge.evaluation.comparison import ComparedAnswer, Comparison
from molmo_edge.evaluation.stats import Estimate, average, mean, quantile, transformed


@dataclass(frozen=True)
class Metric:
    """What a figure is and how it is written."""

    title: str
    format: Callable[[float], str]
    lossless: float  # its value where nothing is lost


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}"


# In the order in which a report has them: what a user sees, then tokens, then what causes it.
METRICS = {
    "same_points": Metric("answers with same points", _percent, 1.0),
    "drift": Metric("drift, % of diagonal", lambda value: f"{value:.2f}", 0.0),
    "drift_p95": Metric("drift, 95th percentile", lambda value: f"{value:.2f}", 0.0),
    "unmatched": Metric("unmatched points an answer", lambda value: f"{value:.2f}", 0.0),
    "same_answer": Metric("answers word for word", _percent, 1.0),
    "first_divergence": Metric("token where others part", lambda value: f"{value:.1f}", math.nan),
    "same_top": Metric("same likeliest token", _percent, 1.0),
    "kl_mean": Metric("KL a token, mean", _small, 0.0),
    "kl_median": Metric("KL, median", _small, 0.0),
    "kl_p99": Metric("KL, 99th percentile", _small, 0.0),
    "perplexity_ratio": Metric("perplexity ratio", lambda value: f"{value:.4f}", 1.0),
    "router": Metric("experts chosen alike", _percent, 1.0),
    "vision": Metric("vision features, 1-cosine", _small, 0.0),
    "vision_worst": Metric("worst patch, 1-cosine", _small, 0.0),
    "image": Metric("image features, 1-cosine", _small, 0.0),
    "image_worst": Metric("worst cell, 1-cosine", _small, 0.0),
}


def compute_metrics(comparison: Comparison, router: Sequence[float] | None = None) -> dict[str, Estimate]:
    """By the names of METRICS; one that there is nothing for is left out.

    `router`: the share of choices kept, of some questions.
    """
    images, answers = comparison.images, comparison.answers
    ids = [image.image_id for image in images]
    found: dict[str, Estimate] = {}
    for name, parts in (("vision", [i.patches for i in images]), ("image", [i.cells for i in images])):
        if given := [part for part in parts if part is not None]:
            found[name] = mean([part.mean for part in given], ids)
            worst = np.array([part.worst for part in given])
            top = float(worst.max())  # over all images: an interval of it would say nothing
            found[f"{name}_worst"] = Estimate(top, top, top, len(given))
    kl, tokens = _at_tokens(answers, lambda a: a.kl)
    found["kl_mean"] = mean(kl, tokens)
    found["kl_median"] = quantile(kl, tokens, 0.5)
    found["kl_p99"] = quantile(kl, tokens, 0.99)
    found["same_top"] = mean(*_at_tokens(answers, lambda a: a.same_top))
    worse, _ = _at_tokens(answers, lambda a: a.nll - a.nll_reference)
    found["perplexity_ratio"] = transformed(mean(worse, tokens), math.exp)
    if router:
        found["router"] = mean(router, list(range(len(router))))
    pictures = [a.question.image_id for a in answers]
    found["same_answer"] = average([float(a.divergence is None) for a in answers], pictures)
    if parted := [a for a in answers if a.divergence is not None]:
        found["first_divergence"] = mean(
            [a.divergence for a in parted if a.divergence is not None], [a.question.image_id for a in parted]
        )
    if pointed := [a for a in answers if a.reference_points or a.points]:
        pictures = [a.question.image_id for a in pointed]
        found["same_points"] = average([float(not a.unmatched and not any(a.drift)) for a in pointed], pictures)
        found["unmatched"] = mean([a.unmatched for a in pointed], pictures)
        moved = [(distance, a.question.image_id) for a in pointed for distance in a.drift]
        if moved:
            distances, pictures = [d for d, _ in moved], [picture for _, picture in moved]
            found["drift"] = mean(distances, pictures)
            found["drift_p95"] = quantile(distances, pictures, 0.95)
    return found


@dataclass(frozen=True)
class ScoreComparison:
    """A score of both models, on the same questions."""

    reference: Estimate
    candidate: Estimate
    difference: Estimate  # of each question's two scores: candidate - reference


def compare_scores(answers: Sequence[ComparedAnswer]) -> dict[str, dict[str, ScoreComparison]]:
    """{group: {score: ScoreComparison}}; "KIND/all" is over the groups of a kind where there are several."""
    gathered: dict[str, dict[str, list[tuple[float, float, str]]]] = {}
    kinds: dict[str, set[str]] = {}
    for a in answers:
        kinds.setdefault(a.question.kind, set()).add(a.question.group)
    for a in answers:
        q = a.question
        groups = [q.group, *([f"{q.kind}/all"] if len(kinds[q.kind]) > 1 and q.kind != "task" else [])]
        for group in groups:
            for name, value in a.scores.items():
                if name in a.scores_reference:
                    row = (a.scores_reference[name], value, q.image_id)
                    gathered.setdefault(group, {}).setdefault(name, []).append(row)
    return {group: {name: _score_figure(rows) for name, rows in by_name.items()} for group, by_name in gathered.items()}


def _score_figure(rows: Sequence[tuple[float, float, str]]) -> ScoreComparison:
    exact, found = [a for a, _, _ in rows], [b for _, b, _ in rows]
    pictures = [picture for _, _, picture in rows]
    return ScoreComparison(
        average(exact, pictures),
        average(found, pictures),
        mean([b - a for a, b in zip(exact, found, strict=True)], pictures),
    )


def _at_tokens(
    answers: Sequence[ComparedAnswer], get: Callable[[ComparedAnswer], np.ndarray]
) -> tuple[np.ndarray, list[str]]:
    """All tokens' values, and the picture of each."""
    parts = [np.asarray(get(a), np.float64) for a in answers]
    pictures = [a.question.image_id for a, part in zip(answers, parts, strict=True) for _ in range(len(part))]
    return np.concatenate(parts) if parts else np.zeros(0), pictures
