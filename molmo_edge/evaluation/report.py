"""A loss as a self-contained HTML page: tables, plots, and photos with both models' points."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image, ImageDraw

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.evaluation.comparison import ComparedAnswer
from molmo_edge.evaluation.loss import Loss, ModelLoss
from molmo_edge.evaluation.loss_tables import columns, metric_rows, score_rows, summary_rows
from molmo_edge.evaluation.plots import check_matplotlib, plot_drift, plot_size_and_loss
from molmo_edge.frontend.crops import load_image
from molmo_edge.frontend.points import Point, parse_points
from molmo_edge.sdk.readable_text import counted, readable
from molmo_edge.system.files import atomic_write

PAGE, DATA = "report.html", "loss.json"
EXAMPLES = 6  # per candidate: the answers whose points differ most
_SIDE = 460  # longest side of an example, pixels
_REFERENCE, _CANDIDATE, _WHITE = (0, 135, 90), (229, 37, 107), (255, 255, 255)


class ReportError(MolmoEdgeError):
    """A report that cannot be written."""


def check_report(folder: Path) -> None:
    """Make `folder`. Raises ReportError if it cannot be written to, ModuleNotFoundError without matplotlib."""
    check_matplotlib()
    if folder.exists() and not folder.is_dir():
        raise ReportError(f"{folder} is a file: name a folder for the report")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"{folder} cannot be created: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise ReportError(f"{folder} is not writable")


def write_report(loss: Loss, folder: Path) -> None:
    """Write report.html and loss.json into `folder`. Images are opened again for the examples."""
    write_data(loss, folder)
    _write(folder / PAGE, render(loss))


def write_data(loss: Loss, folder: Path) -> None:
    """Write loss.json into `folder`; more candidates may follow."""
    check_report(folder)
    _write(folder / DATA, json.dumps(loss.to_dict(), indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def render(loss: Loss) -> str:
    """The page. It starts with the summary; tokens and features come last."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(
        (files("molmo_edge.evaluation") / "report.html.jinja").read_text(encoding="utf-8")
    )
    models = columns(loss)
    moved = any(distance > 0 for m in models for a in m.comparison.answers for distance in a.drift)
    return template.render(
        loss=loss,
        counted=counted,
        names=[m.info.name for m in models],
        engines=[Markup("{}<br><small>{}</small>").format(m.info.name, m.engine) for m in models],
        summary=summary_rows(loss),
        candidates=[_examples(m) for m in loss.candidates],
        drift_plot=Markup(plot_drift(loss)) if moved else "",
        scores=score_rows(models),
        size_plot=Markup(plot_size_and_loss(loss)) if len(loss.candidates) > 1 else "",
        metrics=metric_rows(models),
    )


def _examples(model: ModelLoss) -> dict[str, Any]:
    def distance(a: ComparedAnswer) -> float:
        return max((*a.drift, 100.0 * a.unmatched), default=0.0)

    answers = model.comparison.answers
    different = sorted((a for a in answers if distance(a) > 0), key=distance, reverse=True)
    return {
        "name": model.info.name,
        "has_points": any(a.reference_points for a in answers),
        "examples": [
            {
                "jpeg": base64.b64encode(_draw(a)).decode(),
                "question": a.question.text,
                "reference": _shorten(a.reference_text),
                "candidate": _shorten(a.text),
            }
            for a in different[:EXAMPLES]
        ],
    }


def _draw(a: ComparedAnswer) -> bytes:
    """The image as JPEG, with a ring at each point of the reference and a cross at each of the candidate."""
    image = Image.fromarray(load_image(a.question.image()))
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(image)
    for x, y in _pixels(a.reference_points, image.size):
        for radius, colour in ((9, _WHITE), (8, _REFERENCE), (7, _REFERENCE)):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour)
    for x, y in _pixels(a.points, image.size):
        for width, colour in ((5, _WHITE), (3, _CANDIDATE)):
            draw.line((x - 6, y - 6, x + 6, y + 6), fill=colour, width=width)
            draw.line((x - 6, y + 6, x + 6, y - 6), fill=colour, width=width)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


def _pixels(points: Sequence[Point], size: tuple[int, int]) -> list[tuple[float, float]]:
    return [point.pixel(*size) for point in points]


def _shorten(text: str) -> str:
    plain = " ".join(readable(text).split())
    plain = plain if len(plain) <= 120 else plain[:119] + "…"
    points = len(parse_points(text))
    return f"{plain} ({counted(points, 'point')})" if points else plain
