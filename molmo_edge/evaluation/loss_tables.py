"""What a user asks of a loss first: are the points the same, how far do they drift, which part costs it?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from molmo_edge.evaluation.metrics import METRICS
from molmo_edge.evaluation.stats import Estimate

if TYPE_CHECKING:
    from molmo_edge.evaluation.loss import Loss, ModelLoss

_MOST, _LITTLE = 2 / 3, 1 / 3  # shares of the divergence above and below which one side is named
_ABOVE_NOISE = 3.0  # times the noise: less is no loss


@dataclass(frozen=True)
class Line:
    question: str
    cells: tuple[str, ...]  # for each of `columns`


def columns(loss: Loss) -> list[ModelLoss]:
    """The noise, if it was measured, and the candidates."""
    return [*([loss.noise] if loss.noise else []), *loss.candidates]


def summary(loss: Loss) -> list[Line]:
    """Questions and, for each of `columns`, what the loss answers; a question that nothing answers is left out."""
    shown = columns(loss)
    lines = [
        Line("Same points?", tuple(_same_points(m) for m in shown)),
        Line("How far do points drift?", tuple(_drift(m) for m in shown)),
        Line("Points that only one has?", tuple(_figure(m.metrics.get("unmatched"), "unmatched") for m in shown)),
        Line("Same answers, word for word?", tuple(_share(m, "same_answer", "answers") for m in shown)),
        Line("Better or worse?", tuple(_scores(m) for m in shown)),
        Line("Which part costs it?", tuple(which_part(m, loss.noise) for m in shown)),
        Line("Size?", tuple("" if m is loss.noise else _size(m, loss) for m in shown)),
    ]
    return [line for line in lines if any(line.cells)]


def which_part(measured: ModelLoss, noise: ModelLoss | None = None) -> str:
    """The side of the model that the divergence comes from. Empty for the noise."""
    kl = measured.metrics["kl_mean"].value
    if measured is noise:
        return ""
    if kl == 0:
        return "nothing is lost"
    if noise is not None and kl <= _ABOVE_NOISE * noise.metrics["kl_mean"].value:
        return "no more than noise"
    parts = measured.parts
    if parts is None:
        return ""
    if parts.decoder is None:
        return "the decoder: it sees the same image features"
    whole, decoder = parts.whole["kl_mean"].value, parts.decoder["kl_mean"].value
    if whole == 0:
        return ""
    # Where nothing is lost before the connector, the connector is to blame.
    tower = measured.metrics.get("vision")
    image = "the connector" if tower is not None and tower.value == 0 else "the vision tower and connector"
    share = decoder / whole
    says = "the decoder" if share >= _MOST else image if share <= _LITTLE else f"both the decoder and {image}"
    return f"{says} (decoder alone: KL {decoder:.2g} of {whole:.2g})"


def _same_points(measured: ModelLoss) -> str:
    return _share(measured, "same_points", "answers with points")


def _share(measured: ModelLoss, name: str, what: str) -> str:
    f = measured.metrics.get(name)
    if f is None:
        return ""
    return f"{round(f.value * f.n)} of {f.n} {what}{_interval(f, name)}"


def _drift(measured: ModelLoss) -> str:
    f, far = measured.metrics.get("drift"), measured.metrics.get("drift_p95")
    if f is None or far is None:
        return ""
    if f.value == 0:
        return "not at all"
    return f"{f.value:.1f} % of the diagonal{_interval(f, 'drift')}; 95 % of points by less than {far.value:.1f} %"


def _figure(f: Estimate | None, name: str) -> str:
    if f is None:
        return ""
    unit = " an answer" if name == "unmatched" else ""
    return METRICS[name].format(f.value) + unit + _interval(f, name)


def _interval(f: Estimate, name: str) -> str:
    if f.low == f.high:
        return ""
    return " [?]" if math.isnan(f.low) else f" [{METRICS[name].format(f.low)}, {METRICS[name].format(f.high)}]"


def _scores(measured: ModelLoss) -> str:
    changed = [
        f"{group} {name} {100 * s.difference.value:+.1f}"
        for group, by_name in measured.scores.items()
        for name, s in by_name.items()
        if s.difference.low > 0 or s.difference.high < 0
    ]
    if changed:
        return "; ".join(changed)
    return "no score changed for certain" if measured.scores else ""


def _size(measured: ModelLoss, loss: Loss) -> str:
    share = measured.info.bytes / max(1, loss.reference.bytes)
    return f"{measured.info.bytes / 1e6:.1f} MB, {100 * share:.0f} % of the reference's"
