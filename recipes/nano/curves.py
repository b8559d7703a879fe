"""Learning curves of the stages of a run, as SVG, from their logs. Needs matplotlib."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo_edge.training.telemetry import LOG

STAGES = ("sight", "answers", "student", "head")
CURVES = "curves.svg"
# Of each stage: the curve's key in the log, that of the same loss on validation data, and its name.
LOSSES = {
    "sight": (("heat_map_loss", "validation_heat_map_loss", "heat maps"),),
    "answers": (
        ("loss", "validation_loss", "answer tokens"),
        ("point_loss", "validation_point_loss", "grounding tokens"),
    ),
    "student": (
        ("loss", "validation_loss", "answer tokens"),
        ("point_loss", "validation_point_loss", "grounding tokens"),
        ("divergence", "validation_divergence", "divergence from the teacher"),
    ),
    "head": (("point_loss", "validation_point_loss", "heat maps of the grounding head"),),
}
SMOOTHED = 9  # logged steps in a mean; single steps have a few pictures
TICKS = tuple(digit * 10.0**power for power in range(-3, 3) for digit in (1, 1.5, 2, 3, 5, 7))
COLORS = ("#0072ce", "#e5256b", "#00875a")


@dataclass(frozen=True)
class Curve:
    """A quantity over the steps of a stage."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def smoothed(self) -> Curve:
        """The running mean of the last SMOOTHED values."""
        means = []
        for i in range(len(self.values)):
            last = self.values[max(0, i + 1 - SMOOTHED) : i + 1]
            means.append(sum(last) / len(last))
        return Curve(self.steps, tuple(means))


def read_log(directory: Path) -> list[dict[str, Any]]:
    """The lines of a stage's log, without those that were cut off when a process was killed.

    A run that resumed from a checkpoint repeats steps: the last line of a step counts.
    """
    return list(_last_of_each_step((directory / LOG).read_text(encoding="utf-8").splitlines()))


def _last_of_each_step(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    found: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in lines:
        try:
            parsed = json.loads(line)
        except ValueError:
            continue
        if "note" not in parsed:
            found[parsed["step"], "validation_loss" in parsed] = parsed
    yield from (found[key] for key in sorted(found))


def curve(lines: Sequence[dict[str, Any]], key: str) -> Curve:
    """The values of `key` in a log."""
    points = [(line["step"], line[key]) for line in lines if key in line]
    return Curve(tuple(step for step, _ in points), tuple(value for _, value in points))


def draw(run: Path) -> Path:
    """Draw the logs of the stages below `run` that exist to RUN/curves.svg. Raises FileNotFoundError without any."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    logs = {stage: read_log(run / stage) for stage in STAGES if (run / stage / LOG).exists()}
    if not logs:
        raise FileNotFoundError(f"{run}: no stage has a {LOG}. Run a stage first")
    figure = Figure(figsize=(3.6 * len(logs), 4.2), layout="constrained")
    for axes, (stage, lines) in zip(figure.subplots(1, len(logs), squeeze=False)[0], logs.items(), strict=True):
        for color, (key, validated, name) in zip(COLORS, LOSSES[stage], strict=False):
            trained, held_out = curve(lines, key).smoothed(), curve(lines, validated)
            axes.plot(trained.steps, trained.values, color=color, linewidth=1.2, label=name)
            axes.plot(held_out.steps, held_out.values, "o--", color=color, markersize=4, linewidth=1)
        axes.set_title(stage, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_yticks([tick for tick in TICKS if low <= tick <= high], minor=False)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.tick_params(labelsize=8, which="both")
        axes.grid(True, color="#e4e7eb", linewidth=0.7, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        validated_somewhere = any(key in line for _, key, _ in LOSSES[stage] for line in lines)
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.18),  # inside, it would cover curves
            frameon=False,
            fontsize=8,
            title="dots: validation" if validated_somewhere else None,
            title_fontsize=8,
        )
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "molmo-edge"}):
        figure.savefig(run / CURVES, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return run / CURVES
