"""The plot of the use of experts: what it shows of a log."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import torch

from molmo_edge.training.expert_plot import plot_experts
from molmo_edge.training.telemetry import LOG, expert_figures

SVG = "{http://www.w3.org/2000/svg}"


def test_a_plot_shows_every_expert_of_the_last_line(tmp_path: Path) -> None:
    loads = torch.tensor([[10, 10, 0, 20], [40, 0, 0, 0]])
    lines = [{"step": 1, "loss": 1.0} | expert_figures(torch.full((2, 4), 5)), {"step": 2, "note": "stopped"}]
    lines.append({"step": 9} | expert_figures(loads))
    whole = [json.dumps(line) for line in lines]
    torn = ['{"step": 5, "expert_loads": [[1.', '{"st' + whole[0], "7", "\ufffd"]  # of a process that was killed
    (tmp_path / LOG).write_text("".join(line + "\n" for line in [whole[0], *torn, *whole[1:]]), encoding="utf-8")
    assert plot_experts(tmp_path) == tmp_path / "experts.svg"
    svg = ET.parse(tmp_path / "experts.svg").getroot()
    titles = [title.text for title in svg.iter(f"{SVG}title")]
    assert titles[0] == "Use of experts: 2 layers, 4 experts, 4 idle at step 9"
    assert titles[1:] == [
        f"layer {layer}, expert {e}: {load:g}x"
        for layer, row in ((0, (1, 1, 0, 2)), (1, (4, 0, 0, 0)))
        for e, load in enumerate(row)
    ]
    assert len(list(svg.iter(f"{SVG}polyline"))) == 2


def test_a_dense_model_has_no_plot(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    assert plot_experts(tmp_path) is None
    assert not (tmp_path / "experts.svg").exists()
