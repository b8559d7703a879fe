"""A plot of the use of experts in a run, as SVG: the spread of loads over the steps, and the load of each expert."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molmo_edge.system.files import atomic_write
from molmo_edge.training.telemetry import LOG

PLOT = "experts.svg"
_WIDTH, _LEFT, _CURVES = 720, 70, 150  # pixels
_TEXT, _GRID = "#5c6670", "#d8dde2"
_LINES = {"expert_load_max": ("#e5256b", "most used"), "expert_load_min": ("#0072ce", "least used")}
_RANGE = 2.0  # powers of two from an even load to the ends of the colour scale


def plot_experts(run: Path) -> Path | None:
    """Draw the log of `run` to RUN/experts.svg; None if its model has no experts. Skips lines that were cut off."""
    lines = map(_parsed, (run / LOG).read_text(encoding="utf-8", errors="replace").splitlines())
    shown = [line for line in lines if "expert_loads" in line]
    if not shown:
        return None
    with atomic_write(run / PLOT) as part:
        part.write_text(experts_svg(shown), encoding="utf-8")
    return run / PLOT


def _parsed(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:  # of a process that was killed while it wrote
        return {}
    return found if isinstance(found, dict) else {}


def experts_svg(lines: Sequence[dict[str, Any]]) -> str:
    """An SVG document of log lines with `expert_loads`: per layer, the load of each expert relative to an even one."""
    loads: list[list[float]] = lines[-1]["expert_loads"]
    height = max(12, min(28, 420 // len(loads)))
    top = _CURVES + 110
    total = top + len(loads) * height + 60
    idle = sum(load == 0 for layer in loads for load in layer)
    title = f"Use of experts: {len(loads)} layers, {len(loads[0])} experts, {idle} idle at step {lines[-1]['step']}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{total}" '
            f'viewBox="0 0 {_WIDTH} {total}" role="img" font-family="DejaVu Sans, Verdana, sans-serif" font-size="12">',
            f"<title>{title}</title>",
            f'<rect width="{_WIDTH}" height="{total}" fill="#fff"/>',
            _label(_LEFT, 22, title, size=14, fill="#1c2329"),
            *_curves(lines),
            _label(_LEFT, top - 14, f"load of each expert at step {lines[-1]['step']}, one row per layer"),
            *_cells(loads, top, height),
            *_scale(top + len(loads) * height + 26),
            "</svg>\n",
        ]
    )


def _curves(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The largest and smallest loads, means over layers, on a logarithmic axis."""
    first, last = int(lines[0]["step"]), int(lines[-1]["step"])
    most = max([2.0, *(float(line["expert_load_max"]) for line in lines)])
    low, high = -3, math.ceil(math.log2(most))
    right, bottom, top = _WIDTH - 110, _CURVES + 50, 50

    def y(load: float) -> float:
        value = max(low, math.log2(load)) if load > 0 else low
        return bottom - (value - low) / (high - low) * (bottom - top)

    def x(step: float) -> float:
        return _LEFT + (step - first) / max(1, last - first) * (right - _LEFT)

    drawn = []
    for power in range(low, high + 1):
        at, load = y(2.0**power), f"{2.0**power:g}x" if power > low else "≤ 1/8"
        drawn.append(f'<path d="M{_LEFT} {at:.1f}H{right}" stroke="{_GRID}"/>')
        drawn.append(_label(_LEFT - 8, at + 4, load, anchor="end"))
    for name, (colour, words) in _LINES.items():
        points = [f"{x(line['step']):.1f},{y(line[name]):.1f}" for line in lines]
        if len(points) == 1:
            points.append(f"{right},{y(lines[0][name]):.1f}")
        drawn.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn.append(_label(right + 8, y(lines[-1][name]) + 4, words, fill=colour))
    drawn += [_label(_LEFT, bottom + 18, f"step {first}"), _label(right, bottom + 18, f"{last}", anchor="end")]
    return drawn


def _cells(loads: Sequence[Sequence[float]], top: int, height: int) -> list[str]:
    width = (_WIDTH - _LEFT - 20) / len(loads[0])
    drawn = []
    for layer, row in enumerate(loads):
        y = top + layer * height
        drawn.append(_label(_LEFT - 8, y + height / 2 + 4, str(layer), anchor="end"))
        for expert, load in enumerate(row):
            drawn.append(
                f'<rect x="{_LEFT + expert * width:.1f}" y="{y}" width="{width:.1f}" height="{height}" '
                f'fill="{_colour(load)}" stroke="#fff" stroke-width=".5">'
                f"<title>layer {layer}, expert {expert}: {load:g}x</title></rect>"
            )
    return drawn


def _scale(y: int) -> list[str]:
    drawn = []
    for n, load in enumerate((0.0, 0.25, 0.5, 1.0, 2.0, 4.0)):
        x = _LEFT + 90 * n
        words = "idle" if not load else f"{load:g}x"
        drawn.append(f'<rect x="{x}" y="{y}" width="18" height="14" fill="{_colour(load)}" stroke="{_GRID}"/>')
        drawn.append(_label(x + 24, y + 12, words))
    return drawn


def _colour(load: float) -> str:
    """Black for an idle expert; else from blue (a quarter of an even load) over light grey to red (four times)."""
    if load == 0:
        return "#1c2329"
    share = max(-1.0, min(1.0, math.log2(load) / _RANGE))
    end = (229, 37, 107) if share > 0 else (0, 114, 206)
    mixed = (round(238 + (part - 238) * abs(share)) for part in end)
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _label(x: float, y: float, text: str, *, anchor: str = "start", fill: str = _TEXT, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" font-size="{size}">{text}</text>'
