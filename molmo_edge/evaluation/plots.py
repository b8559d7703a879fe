"""Plots of a loss report as inline SVG. Needs matplotlib."""

from __future__ import annotations

import io
import logging
from typing import TYPE_CHECKING, Any

from molmo_edge.sdk.readable_text import counted

if TYPE_CHECKING:
    from molmo_edge.evaluation.loss import Loss

COLOURS = ("#0072ce", "#e5256b", "#00875a", "#d95f02", "#754cc0", "#00a3a3", "#a67c00")
_GREY = "#5c6670"


def plot_size_and_loss(loss: Loss) -> str:
    """Mean KL over model size, with intervals, and the noise as a line."""
    figure, axes = _axes()
    for i, m in enumerate(loss.candidates):
        f = m.metrics["kl_mean"]
        megabytes = m.info.bytes / 1e6
        error = [[max(0.0, f.value - f.low)], [max(0.0, f.high - f.value)]]
        axes.errorbar(megabytes, f.value, yerr=error, fmt="o", color=COLOURS[i % len(COLOURS)], capsize=3)
        axes.annotate(m.info.name, (megabytes, f.value), xytext=(7, 5), textcoords="offset points", fontsize=9)
    values = [m.metrics["kl_mean"].value for m in loss.candidates]
    noise = None if loss.noise is None else loss.noise.metrics["kl_mean"].value
    if noise:
        axes.axhline(noise, color=_GREY, linestyle=":", label=f"noise ({loss.noise_kind}): {noise:.1g}")
        axes.legend(frameon=False, fontsize=9)
    if values and min(values) > 0:
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(values) / 10)  # noise may be ten orders of magnitude below: the legend shows it
    axes.set_xlabel("MB of weights")
    axes.set_ylabel("mean KL per token, nats")
    axes.margins(x=0.25)
    return _svg(figure)


def plot_drift(loss: Loss) -> str:
    """A histogram of point drift for the noise and each candidate, in the colours of `plot_size_and_loss`."""
    figure, axes = _axes()
    shown = [(m, COLOURS[i % len(COLOURS)]) for i, m in enumerate(loss.candidates)]
    if loss.noise:
        shown.insert(0, (loss.noise, _GREY))
    moved = [[d for a in m.comparison.answers for d in a.drift] for m, _ in shown]
    most = max((d for distances in moved for d in distances), default=0.0)
    edges = [most * i / 30 for i in range(31)] if most else [0, 1]
    for (m, colour), distances in zip(shown, moved, strict=True):
        unmoved = sum(distance == 0 for distance in distances)
        label = f"{m.info.name}: {unmoved} of {counted(len(distances), 'point')} did not move"
        axes.hist(distances, bins=edges, histtype="step", linewidth=1.6, color=colour, label=label)
    axes.set_yscale("symlog")
    highest = axes.get_ylim()[1]
    steps = [0, *(digit * 10**power for power in range(9) for digit in (1, 2, 5))]
    axes.set_yticks([step for step in steps if step <= highest], minor=False)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("drift of a point, % of the image's diagonal")
    axes.set_ylabel("points")
    axes.legend(frameon=False, fontsize=9)
    return _svg(figure)


def check_matplotlib() -> None:
    """Raises ModuleNotFoundError without matplotlib."""
    log = logging.getLogger("matplotlib")
    if log.level == logging.NOTSET:  # an unwritable home directory is only a warning: it uses a temporary folder
        log.setLevel(logging.ERROR)
    import matplotlib.figure  # noqa: F401


def _axes() -> tuple[Any, Any]:
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(True, color="#e4e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "molmo-edge"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    return text[text.index("<svg") :]
