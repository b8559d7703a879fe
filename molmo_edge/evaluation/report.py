"""A loss as a page that stands alone: tables, plots, and photos with both models' points. Nothing is fetched by it."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.evaluation.comparison import ComparedAnswer
from molmo_edge.evaluation.loss import Loss, ModelLoss
from molmo_edge.evaluation.loss_tables import columns, summary
from molmo_edge.evaluation.metrics import METRICS, ScoreComparison
from molmo_edge.evaluation.plots import check_plots, drifts, size_and_loss
from molmo_edge.evaluation.stats import Estimate
from molmo_edge.frontend.crops import load_image
from molmo_edge.frontend.points import Point, parse_points
from molmo_edge.sdk.readable_text import readable
from molmo_edge.system.files import atomic_write

PAGE, DATA = "report.html", "loss.json"
EXAMPLES = 6  # of each candidate: where its points lie furthest from the reference's
_SIDE = 460  # longest side of an example, pixels
_REFERENCE, _CANDIDATE = (0, 135, 90), (229, 37, 107)


class ReportError(MolmoEdgeError):
    """A report that cannot be written."""


def check_report(folder: Path) -> None:
    """Raises ReportError, or PlotError without matplotlib, before hours of measuring."""
    check_plots()
    if folder.exists() and not folder.is_dir():
        raise ReportError(f"{folder} is a file: name a folder for the report")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"{folder} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise ReportError(f"{folder} cannot be written to")


def write_report(loss: Loss, folder: Path) -> None:
    """`folder`/report.html and loss.json. Images are opened again for the examples."""
    write_data(loss, folder)
    _write(folder / PAGE, page(loss))


def write_data(loss: Loss, folder: Path) -> None:
    """`folder`/loss.json, of a loss that may have more candidates to come."""
    check_report(folder)
    _write(folder / DATA, json.dumps(loss.to_dict(), indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def page(loss: Loss) -> str:
    """What a user asks comes first (molmo_edge.evaluation.loss_tables); tokens and features come last."""
    shown = columns(loss)
    r = loss.reference
    body = [
        f"<h1>What {_e(', '.join(m.info.name for m in loss.candidates))} lost</h1>",
        f"<p>Against <b>{_e(r.name)}</b> ({_e(loss.engine)}, {_e(r.precision)}, {r.bytes / 1e6:.1f} MB), on "
        f"{_e(', '.join(loss.suites) or 'questions of your own')}: {loss.images} images, {loss.questions} "
        "questions.</p>",
        _summary(loss, shown),
        f"<p class=note>{_e(_NOTE)}{_e(_NOISE[loss.noise_kind])}</p>",
    ]
    for measured in loss.candidates:
        body += [f"<h2>Where {_e(measured.info.name)} points elsewhere</h2>", *_examples(measured)]
    if any(distance > 0 for m in shown for a in m.comparison.answers for distance in a.drift):
        body += ["<h2>Points that moved</h2>", drifts(loss)]
    if shown[-1].scores:
        body += ["<h2>Scores</h2>", _scores(shown)]
    if len(loss.candidates) > 1:  # one candidate would be one dot
        body += ["<h2>Size and loss</h2>", size_and_loss(loss)]
    body += [
        "<h2>All figures</h2>",
        f"<p class=note>Tokens are the {loss.tokens} of the reference's own answers. KL is how far the candidate's "
        "distribution lies from the reference's at each of them, in nats; 1-cosine how far features do.</p>",
        _figures(shown),
    ]
    return f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>molmo-edge loss</title>{_STYLE}{''.join(body)}"


_NOTE = (
    "Drift is the distance between a point of the candidate and the reference's point for the same thing. Brackets "
    "hold 95 % intervals: a bootstrap over images, Wilson's for shares; [?] where one image tells none."
)
_NOISE = {
    "threads": " Noise is what the reference differs from itself by, with one thread and pixels moved by a millionth: "
    "rounded models have more of it, and what is not well above it is no loss.",
    "bf16": " Noise is what the reference differs from itself by in bf16: what is not well above it is no loss.",
    "none": "",
}


def _summary(loss: Loss, shown: Sequence[ModelLoss]) -> str:
    rows = [f"<tr><th>{_e(line.question)}{''.join(f'<td>{_e(cell)}' for cell in line.cells)}" for line in summary(loss)]
    heads = "".join(f"<th>{_e(m.info.name)}" for m in shown)
    return f"<table class=summary><thead><tr><th>{heads}<tbody>{''.join(rows)}</table>"


def _figures(shown: Sequence[ModelLoss]) -> str:
    rows = []
    for name, kind in METRICS.items():
        given = [m.metrics.get(name) for m in shown]
        counts = {f.n for f in given if f}
        if counts:
            cells = [_cell(f, kind.format, own_n=len(counts) > 1) for f in given]
            n = str(counts.pop()) if len(counts) == 1 else ""
            rows.append(f"<tr><th>{_e(kind.title)}<td>{n}{''.join(cells)}")
    heads = "".join(f"<th>{_e(m.info.name)}<br><small>{_e(m.engine)}</small>" for m in shown)
    return f"<table><thead><tr><th><th>n{heads}<tbody>{''.join(rows)}</table>"


def _cell(f: Estimate | None, write: Callable[[float], str], *, own_n: bool) -> str:
    if f is None:
        return "<td>"
    n = f" <small>n={f.n}</small>" if own_n else ""
    return f"<td>{_e(write(f.value))} <small>{_interval(f, write)}</small>{n}"


def _interval(f: Estimate, write: Callable[[float], str]) -> str:
    if f.low == f.high:
        return ""
    return "[?]" if math.isnan(f.low) else _e(f"[{write(f.low)}, {write(f.high)}]")


def _scores(shown: Sequence[ModelLoss]) -> str:
    rows = []
    for group, by_name in shown[0].scores.items():
        for name, first in by_name.items():
            cells = [_change(m.scores[group][name]) for m in shown]
            reference = f"{100 * first.reference.value:.1f}"
            rows.append(f"<tr><th>{_e(group)} {_e(name)}<td>{first.reference.n}<td>{reference}{''.join(cells)}")
    heads = "".join(f"<th>{_e(m.info.name)}" for m in shown)
    return f"<table><thead><tr><th>percent<th>n<th>reference{heads}<tbody>{''.join(rows)}</table>"


def _change(s: ScoreComparison) -> str:
    d = s.difference
    sure = " class=worse" if d.high < 0 else " class=better" if d.low > 0 else ""
    return (
        f"<td{sure}>{100 * s.candidate.value:.1f} "
        f"<small>{100 * d.value:+.1f} {_interval(d, lambda value: f'{100 * value:+.1f}')}</small>"
    )


def _examples(measured: ModelLoss) -> Iterable[str]:
    def apart(a: ComparedAnswer) -> float:
        return max((*a.drift, 100.0 * a.unmatched), default=0.0)

    moved = sorted((a for a in measured.comparison.answers if apart(a) > 0), key=apart, reverse=True)
    if not moved:
        points = any(a.reference_points for a in measured.comparison.answers)
        yield f"<p>{'Nowhere: every point is where the reference has it.' if points else 'No answer has points.'}</p>"
        return
    yield "<p class=note>Rings are the reference's points, crosses the candidate's.</p><div class=examples>"
    for a in moved[:EXAMPLES]:
        picture = base64.b64encode(_drawn(a)).decode()
        yield (
            f"<figure><img alt='' src='data:image/jpeg;base64,{picture}'><figcaption><b>{_e(a.question.text)}</b><br>"
            f"<span class=ref>{_e(_short(a.reference_text))}</span><br>"
            f"<span class=cand>{_e(_short(a.text))}</span></figcaption></figure>"
        )
    yield "</div>"


def _drawn(a: ComparedAnswer) -> bytes:
    picture = Image.fromarray(load_image(a.question.image()))
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    for x, y in _pixels(a.reference_points, picture.size):
        for radius, colour in ((9, (255, 255, 255)), (8, _REFERENCE), (7, _REFERENCE)):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour)
    for x, y in _pixels(a.points, picture.size):
        for width, colour in ((5, (255, 255, 255)), (3, _CANDIDATE)):
            draw.line((x - 6, y - 6, x + 6, y + 6), fill=colour, width=width)
            draw.line((x - 6, y + 6, x + 6, y - 6), fill=colour, width=width)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


def _pixels(points: Sequence[Point], size: tuple[int, int]) -> list[tuple[float, float]]:
    return [point.pixel(*size) for point in points]


def _short(text: str) -> str:
    plain = " ".join(readable(text).split())
    plain = plain if len(plain) <= 120 else plain[:119] + "…"
    points = len(parse_points(text))
    return f"{plain} ({points} point{'s' * (points != 1)})" if points else plain


def _e(text: object) -> str:
    return html.escape(str(text))


_STYLE = """<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2126; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid #e4e7eb; vertical-align: top }
tbody th { text-align: left; font-weight: 500 } small { color: #5c6670 } .note { color: #5c6670; max-width: 46rem }
td.worse { background: #fde8ef } td.better { background: #e3f4ec }
.summary { font-size: 15px } .summary td { text-align: left; max-width: 19rem }
.summary thead th { text-align: left } .summary tbody th { min-width: 11rem }
svg { max-width: 100%; height: auto }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1rem }
figure { margin: 0 } figure img { max-width: 100%; border-radius: 4px } figcaption { font-size: 13px }
.ref { color: #00704b } .cand { color: #b3124d }
</style>"""
