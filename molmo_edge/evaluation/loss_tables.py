"""The tables of a loss, for the command line and the report: first a summary, then scores, then all metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from molmo_edge.evaluation.loss import Loss, ModelLoss
from molmo_edge.evaluation.metrics import METRICS
from molmo_edge.sdk.readable_text import counted

_MOST, _LITTLE = 2 / 3, 1 / 3  # shares of the KL divergence above and below which one side is named
_HALF_A_POINT = 0.005  # of F1, as 0 to 1
_ABOVE_NOISE = 3.0  # times the noise; a smaller divergence is not counted as a loss


@dataclass(frozen=True)
class Cell:
    """A model's entry in a row."""

    text: str
    detail: str = ""  # the interval and sample size, in smaller type where there is one
    verdict: str = ""  # "worse" or "better" where a score changed significantly

    def __str__(self) -> str:
        return f"{self.text} {self.detail}".strip()


@dataclass(frozen=True)
class Row:
    """A row of one of the tables."""

    title: str
    leading: tuple[str, ...]  # values that all models share, such as n
    cells: tuple[Cell, ...]  # one for each of `columns`

    def texts(self) -> list[str]:
        """The texts of all columns: the title, the leading values and the cells."""
        return [self.title, *self.leading, *map(str, self.cells)]


def columns(loss: Loss) -> list[ModelLoss]:
    """The noise, if it was measured, and the candidates."""
    return [*([loss.noise] if loss.noise else []), *loss.candidates]


def summary_rows(loss: Loss) -> list[Row]:
    """The rows of the summary; rows without data are left out."""
    answers: dict[str, Callable[[ModelLoss], str]] = {
        "Same points?": lambda m: _share(m, "same_points", " with points"),
        "How far do points drift?": _drift,
        "Points that only one model gives?": _unmatched,
        "Same answers, word for word?": lambda m: _share(m, "same_answer"),
        "Better or worse scores?": _changed_scores,
        "Which part causes the loss?": lambda m: which_part(m, loss.noise),
        "Size?": lambda m: "" if m is loss.noise else _size(m, loss),
    }
    rows = [Row(title, (), tuple(Cell(answer(m)) for m in columns(loss))) for title, answer in answers.items()]
    return [row for row in rows if any(cell.text for cell in row.cells)]


def score_rows(models: Sequence[ModelLoss]) -> list[Row]:
    """Title, n, the reference's score and, for each of `models`, its score and the change, in percent."""

    def percent(value: float) -> str:
        return f"{100 * value:+.1f}"

    def cell(model: ModelLoss, group: str, name: str) -> Cell:
        score = model.scores[group][name]
        change = score.difference
        verdict = "worse" if change.high < 0 else "better" if change.low > 0 else ""
        unchanged = change.value == change.low == change.high == 0
        return Cell(f"{100 * score.candidate.value:.1f}", "" if unchanged else change.format(percent), verdict)

    return [
        Row(
            f"{group} {name}",
            (str(score.reference.n), f"{100 * score.reference.value:.1f}"),
            tuple(cell(model, group, name) for model in models),
        )
        for group, by_name in models[0].scores.items()
        for name, score in by_name.items()
    ]


def needed_lines(loss: Loss) -> list[str]:
    """For each candidate, how many pointing questions an interval of half a point of F1 takes."""
    lines = []
    for model in loss.candidates:
        groups = [name for name in model.scores if name.startswith("point/") and "f1" in model.scores[name]]
        if not groups:
            continue
        group = "point/all" if "point/all" in groups else groups[0]
        n = model.scores[group]["f1"].difference.samples_for(_HALF_A_POINT)
        if n is not None:
            lines.append(f"{model.info.name}: an interval of ±0.5 points of {group} f1 takes about {n} questions")
    return lines


def metric_rows(models: Sequence[ModelLoss]) -> list[Row]:
    """Title, n and, for each of `models`, the metric and its interval; n is in the cells where it differs."""
    rows = []
    for name, metric in METRICS.items():
        estimates = [model.metrics.get(name) for model in models]
        if not (counts := {estimate.n for estimate in estimates if estimate}):
            continue
        same = len(counts) == 1
        cells = (
            Cell(metric.format(e.value), f"{e.interval(metric.format)}{'' if same else f' n={e.n}'}".strip())
            if e
            else Cell("")
            for e in estimates
        )
        rows.append(Row(metric.title, (str(counts.pop()) if same else "",), tuple(cells)))
    return rows


def which_part(model: ModelLoss, noise: ModelLoss | None = None) -> str:
    """The part of the model that the KL divergence comes from; "" for the noise itself."""
    kl = model.metrics["kl_mean"].value
    if model is noise:
        return ""
    if kl == 0:
        return "nothing is lost"
    if noise is not None and kl <= _ABOVE_NOISE * noise.metrics["kl_mean"].value:
        return "no more than noise"
    if model.rotation_differs:
        return "not measured: the channels of only one of the two models are rotated"
    if (breakdown := model.breakdown) is None:
        return ""
    if breakdown.decoder is None:
        return "the decoder: the image features are identical"
    whole, decoder = breakdown.whole["kl_mean"].value, breakdown.decoder["kl_mean"].value
    if whole == 0:
        return ""
    tower = model.metrics.get("vision")
    image = "the connector" if tower is not None and tower.value == 0 else "the vision tower and connector"
    share = decoder / whole
    part = "the decoder" if share >= _MOST else image if share <= _LITTLE else f"both the decoder and {image}"
    return f"{part} (decoder alone: KL {decoder:.2g} of {whole:.2g})"


def _share(model: ModelLoss, name: str, which: str = "") -> str:
    if (e := model.metrics.get(name)) is None:
        return ""
    return _join(f"{round(e.value * e.n)} of {counted(e.n, 'answer')}{which}", e.interval(METRICS[name].format))


def _drift(model: ModelLoss) -> str:
    drift, p95 = model.metrics.get("drift"), model.metrics.get("drift_p95")
    if drift is None or p95 is None:
        return ""
    if drift.value == 0:
        return "not at all"
    text = _join(f"{drift.value:.1f} % of the diagonal", drift.interval(METRICS["drift"].format))
    return f"{text}; 95 % of points by less than {p95.value:.1f} %"


def _unmatched(model: ModelLoss) -> str:
    if (e := model.metrics.get("unmatched")) is None:
        return ""
    write = METRICS["unmatched"].format
    return _join(f"{write(e.value)} per answer", e.interval(write))


def _changed_scores(model: ModelLoss) -> str:
    changed = [
        f"{group} {name} {100 * score.difference.value:+.1f}"
        for group, by_name in model.scores.items()
        for name, score in by_name.items()
        if score.difference.low > 0 or score.difference.high < 0
    ]
    return "; ".join(changed) or ("no significant change" if model.scores else "")


def _size(model: ModelLoss, loss: Loss) -> str:
    share = model.info.bytes / max(1, loss.reference.bytes)
    return f"{model.info.bytes / 1e6:.1f} MB, {100 * share:.0f} % of the reference's"


def _join(*parts: str) -> str:
    return " ".join(filter(None, parts))
