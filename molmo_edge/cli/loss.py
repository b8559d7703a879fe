"""`molmo-edge loss`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molmo_edge.cli import options
from molmo_edge.cli.bars import bars
from molmo_edge.cli.open_model import find_model
from molmo_edge.cli.output import note, print_json, print_table, progress
from molmo_edge.cli.question_options import Asked, SkippedImages, named, of_kinds, open_suites
from molmo_edge.sdk.readable_text import counted

if TYPE_CHECKING:
    from molmo_edge.evaluation.loss import Loss, ModelLoss

_REPORT = "Write loss.json and report.html into this folder. It may exist."
_NOISE = (
    'How to vary the reference to measure noise: "threads" (one thread, pixels changed by a millionth), "bf16" '
    '(weights in bf16 on PyTorch) or "none".'
)


def loss(
    reference: Annotated[
        str, typer.Argument(help="The model to compare with: bundle, checkpoint or hub id.", show_default=False)
    ],
    candidates: Annotated[list[str], typer.Argument(help="The smaller models.", show_default=False)],
    *,
    suite: Asked.Suite = None,
    kinds: Asked.Kinds = None,
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
    """Measure what smaller models lose compared with a reference, on the same prompts.

    An image that cannot be read is reported and left out, and the exit status is 1.
    """
    import onnx  # noqa: F401 (report a missing package now rather than after hours of measuring)

    from molmo_edge.checkpoints.bundle import is_bundle
    from molmo_edge.errors import EngineError
    from molmo_edge.evaluation.loss import NOISES, ModelSpec, measure_loss
    from molmo_edge.evaluation.metrics import METRICS

    if noise not in NOISES:
        raise typer.BadParameter(f'"{noise}" is not known (known: {", ".join(NOISES)})', param_hint="--noise")
    if report is not None:
        from molmo_edge.evaluation.report import check_report, write_data, write_report

        check_report(report)
    names, questions = open_suites(suite, limit, data, quiet=quiet)
    questions = of_kinds(questions, kinds)

    def model(name: str) -> ModelSpec:
        directory = find_model(None if name == "nano" else name, revision=None, quiet=quiet)
        own = "auto" if is_bundle(directory) else precision  # --precision and --llama apply where they can
        own_llama = options.llama_options(llama) if any(directory.glob("*.gguf")) else None
        return ModelSpec(directory, own, device, threads, own_llama, named(name))

    models = [model(name) for name in (reference, *candidates)]
    if llama is not None and not any(m.engine_options for m in models):
        raise EngineError("--llama needs a model with a GGUF decoder: none of these has one")

    def on_measured(so_far: Loss) -> None:
        measured = so_far.candidates[-1] if so_far.candidates else so_far.noise
        if measured is not None:  # before the next model opens
            texts = (f"{METRICS[name].title} {METRICS[name].format(e.value)}" for name, e in measured.metrics.items())
            note(f"{measured.info.name}: {', '.join(texts)}", quiet=quiet)
        if report is not None:
            try:
                write_data(so_far, report)
            except OSError as error:  # the report is written again at the end: continue measuring
                note(f"{error.filename} could not be updated: {error.strerror}", quiet=quiet)

    skipped = SkippedImages()
    with bars(quiet=quiet) as on_model:
        found = measure_loss(
            models[0],
            models[1:],
            questions,
            suites=names,
            noise=noise,
            max_crops=max_crops,
            on_model=on_model,
            on_measured=on_measured,
            on_skipped=skipped,
        )
    if without_image := sum(question.words_alone for question in questions):
        note(f"left out {counted(without_image, 'question')} without an image", quiet=quiet)
    if json:
        print_json(found.to_dict())
    else:
        _print(found)
    if report is not None:  # after the tables, which must not be lost to a full disk
        with progress("writing the report", quiet=quiet):
            write_report(found, report)
        note(f"wrote {report / 'report.html'} and loss.json", quiet=quiet)
    skipped.finish()


def _print(found: Loss) -> None:
    from molmo_edge.evaluation.loss_tables import columns, metric_rows, needed_lines, score_rows, summary_rows

    print(
        f"{found.reference.name} ({found.engine}, {found.reference.bytes / 1e6:.1f} MB) on {', '.join(found.suites)}: "
        f"{counted(found.images, 'image')}, {counted(found.questions, 'question')}"
    )
    models = columns(found)
    heads = [_head(model, found) for model in models]
    for titles, rows, lines in (
        ([""], summary_rows(found), True),
        (["scores, %", "n", "reference"], score_rows(models), False),
        (["all metrics", "n"], metric_rows(models), False),
    ):
        if rows:
            print_table([*titles, *heads], [row.texts() for row in rows], lines=lines)
    print(
        "Brackets: 95 % confidence intervals. Scores: the candidate's and its change. "
        "Noise: the reference with slightly changed inputs or precision."
    )
    for line in needed_lines(found):
        print(line)


def _head(model: ModelLoss, found: Loss) -> str:
    if model is found.noise:
        return model.info.name.replace(" (", "\n(")
    return f"{model.info.name}\n{model.engine}\n{model.info.bytes / 1e6:.1f} MB"
