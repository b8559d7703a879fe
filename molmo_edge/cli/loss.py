"""`molmo-edge loss`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molmo_edge.cli import options
from molmo_edge.cli.open_model import find_model
from molmo_edge.cli.output import note, print_json, print_table, progress
from molmo_edge.cli.question_options import Asked, bars, interval, named, open_suites
from molmo_edge.sdk.readable_text import counted

if TYPE_CHECKING:
    from molmo_edge.evaluation.loss import Loss, ModelLoss

_REPORT = "A folder for loss.json and report.html; it may exist."
_NOISE = (
    'What the reference differs from itself by: "threads" (one thread, pixels moved by a millionth), "bf16" (its '
    'weights in bf16 on PyTorch) or "none".'
)


def loss(
    reference: Annotated[str, typer.Argument(help="Bundle, checkpoint or hub id: what is right.", show_default=False)],
    candidates: Annotated[list[str], typer.Argument(help="What is smaller.", show_default=False)],
    *,
    suite: Asked.Suite = None,
    limit: Asked.Limit = None,
    data: Asked.Data = None,
    report: Annotated[Path | None, typer.Option(help=_REPORT, show_default=False)] = None,
    noise: Annotated[str, typer.Option(help=_NOISE)] = "threads",
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    max_crops: options.MaxCrops = None,
    threads: options.Threads = None,
    llama: options.Llama = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure what smaller models lose, on the same prompts."""
    from molmo_edge.checkpoints.bundle import is_bundle
    from molmo_edge.errors import EngineError
    from molmo_edge.evaluation import require_onnx
    from molmo_edge.evaluation.loss import NOISES, ModelSpec, measure_loss
    from molmo_edge.evaluation.metrics import METRICS

    if noise not in NOISES:
        raise typer.BadParameter(f'"{noise}" is not known; known are {", ".join(NOISES)}', param_hint="--noise")
    require_onnx("a loss")
    from molmo_edge.evaluation.report import check_report, write_data, write_report

    if report is not None:
        check_report(report)
    names, questions = open_suites(suite, limit, data, quiet=quiet)

    def model(name: str) -> ModelSpec:
        directory = find_model(None if name == "nano" else name, revision=None, quiet=quiet)
        own = "auto" if is_bundle(directory) else precision  # a bundle has its own, and only some have a GGUF
        own_llama = options.llama_options(llama) if any(directory.glob("*.gguf")) else None
        return ModelSpec(directory, own, device, threads, own_llama, named(name))

    models = [model(name) for name in (reference, *candidates)]
    if llama is not None and not any(m.engine_options for m in models):
        raise EngineError("none of these has a GGUF, so llama.cpp's options are not for them")

    def keep(so_far: Loss) -> None:
        measured = so_far.candidates[-1] if so_far.candidates else so_far.noise
        if measured is not None:  # before the next model opens
            says = (f"{METRICS[name].title} {METRICS[name].format(f.value)}" for name, f in measured.metrics.items())
            note(f"{measured.info.name}: {', '.join(says)}", quiet=quiet)
        if report is not None:
            try:
                write_data(so_far, report)
            except OSError as error:  # it is written again at the end; hours of measuring go on
                note(f"{error.filename} is not up to date: {error.strerror}", quiet=quiet)

    with bars(quiet=quiet) as on_model:
        found = measure_loss(
            models[0],
            models[1:],
            questions,
            suites=names,
            noise=noise,
            max_crops=max_crops,
            on_model=on_model,
            on_measured=keep,
        )
    if left_out := len(questions) - found.questions:
        note(f"{left_out} questions in words alone were left out", quiet=quiet)
    if json:
        print_json(found.to_dict())
    else:
        _print(found)
    if report is not None:  # after the tables, which a full disk must not cost
        with progress("writing the report", quiet=quiet):
            write_report(found, report)
        note(f"wrote {report / 'report.html'} and loss.json", quiet=quiet)


def _print(found: Loss) -> None:
    from molmo_edge.evaluation.loss_tables import columns, summary

    print(
        f"{found.reference.name} ({found.engine}, {found.reference.bytes / 1e6:.1f} MB) on {', '.join(found.suites)}: "
        f"{counted(found.images, 'image')}, {counted(found.questions, 'question')}"
    )
    shown = columns(found)
    heads = [_head(measured, found) for measured in shown]
    tables: list[tuple[list[str], list[list[str]]]] = [
        (["", *heads], [[line.question, *line.cells] for line in summary(found)]),
        (["scores, %", "n", "reference", *heads], score_rows(shown)),
        (["all figures", "n", *heads], figure_rows(shown)),
    ]
    for i, (titles, rows) in enumerate(tables):
        if rows:
            print_table(titles, rows, lines=i == 0)
    print("Brackets: 95 % intervals. Scores: the candidate's and its change. Noise: the reference against itself.")


def _head(measured: ModelLoss, found: Loss) -> str:
    if measured is found.noise:
        return measured.info.name.replace(" (", "\n(")
    return f"{measured.info.name}\n{measured.engine}\n{measured.info.bytes / 1e6:.1f} MB"


def figure_rows(columns: list[ModelLoss]) -> list[list[str]]:
    """Title, n, and a cell for each of `columns`, with its own n where they differ."""
    from molmo_edge.evaluation.metrics import METRICS

    rows = []
    for name, kind in METRICS.items():
        given = [measured.metrics.get(name) for measured in columns]
        counts = {figure.n for figure in given if figure}
        if not counts:
            continue
        cells = []
        for f in given:
            own = f" n={f.n}" if f and len(counts) > 1 else ""
            cells.append("" if f is None else kind.format(f.value) + interval(f.low, f.high, kind.format) + own)
        rows.append([kind.title, str(counts.pop()) if len(counts) == 1 else "", *cells])
    return rows


def score_rows(columns: list[ModelLoss]) -> list[list[str]]:
    """Title, n, the reference's score, and a cell for each of `columns`."""

    def percent(value: float) -> str:
        return f"{100 * value:+.1f}"

    rows = []
    for group, by_name in columns[0].scores.items():
        for name, first in by_name.items():
            cells = []
            for measured in columns:
                s = measured.scores[group][name]
                change = f" {percent(s.difference.value)}{interval(s.difference.low, s.difference.high, percent)}"
                cells.append(f"{100 * s.candidate.value:.1f}" + (change if s.difference.value or "[" in change else ""))
            rows.append([f"{group} {name}", str(first.reference.n), f"{100 * first.reference.value:.1f}", *cells])
    return rows
