"""`molmo-edge quantize`"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molmo_edge.cli import options
from molmo_edge.cli.ablate import print_parts
from molmo_edge.cli.bars import bars
from molmo_edge.cli.export import TRAIN_SCALES, report_kept, report_pass
from molmo_edge.cli.open_model import find_model
from molmo_edge.cli.output import note, print_json
from molmo_edge.cli.question_options import Asked, SkippedImages, named, of_kinds, open_suites, parse_precisions
from molmo_edge.export.precisions import QUANTIZED

if TYPE_CHECKING:
    from molmo_edge.evaluation.precision_search import SearchResult
    from molmo_edge.evaluation.stats import Estimate

_LIMIT = "Maximum number of images. Every part and precision is measured on each of them."
_ROTATE = "Rotate the hidden channels before rounding (see export --rotate)."
_CALIBRATE = "Folder of calibration photos for quantizing the decoder (see export --calibrate)."


def quantize(
    source: Annotated[str, typer.Argument(help="Bundle, checkpoint, hub id or nano.", show_default=False)],
    *,
    out: Annotated[Path, typer.Option(help="Bundle directory to create; it must not exist.", show_default=False)],
    max_mb: Annotated[
        float | None, typer.Option(help="Minimize the loss within this size of the graphs in MB.", show_default=False)
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Minimize the size within this mean KL divergence (nats per token).", show_default=False),
    ] = None,
    precisions: Annotated[str, typer.Option(help="Precisions to choose from, separated by commas.")] = ",".join(
        QUANTIZED
    ),
    suite: Asked.Suite = None,
    kinds: Asked.Kinds = None,
    limit: Annotated[int, typer.Option(min=1, help=_LIMIT)] = 12,
    data: Asked.Data = None,
    calibrate: Annotated[Path | None, typer.Option(help=_CALIBRATE, show_default=False)] = None,
    rotate: Annotated[bool, typer.Option("--rotate", help=_ROTATE)] = False,
    train_scales: Annotated[int, typer.Option(min=0, metavar="PASSES", help=TRAIN_SCALES)] = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Choose the precision of each part by its measured loss, and write the bundle.

    An image that cannot be read is reported and left out, and the exit status is 1.
    """
    if (max_mb is None) == (max_kl is None):
        raise typer.BadParameter("give one of --max-mb and --max-kl")
    words = parse_precisions(precisions)
    if train_scales and "q4" not in words:
        message = f"it applies to q4, but --precisions is {precisions}: add q4 to them, or leave --train-scales out"
        raise typer.BadParameter(message, param_hint="--train-scales")
    import onnx  # noqa: F401 (a missing package is reported before hours of measuring)

    from molmo_edge.checkpoints.bundle import open_bundle
    from molmo_edge.checkpoints.manifest import graph_names
    from molmo_edge.evaluation.ablation import Bench, ablate
    from molmo_edge.evaluation.precision_search import search
    from molmo_edge.export import ExportOptions, check_bundle_options, export_bundle
    from molmo_edge.export.options import check_options

    precision = None if calibrate is None else {"decoder": "q4"}
    check_bundle_options(
        out, None, ExportOptions(precision, calibrate=calibrate, rotate=rotate, train_scales=train_scales)
    )
    directory = find_model(None if source == "nano" else source, revision=None, quiet=quiet, to_run=False)
    _, questions = open_suites(suite, limit, data, quiet=quiet)
    questions = of_kinds(questions, kinds)
    with bars(quiet=quiet) as bar:

        def on_part(what: str) -> Callable[[], None]:
            return bar(what, len(questions))

        advance = bar(f"{named(source)} in float32", len(questions))
        skipped = SkippedImages()
        with Bench(directory, questions, rotate=rotate, on_answer=advance, on_skipped=skipped) as bench:
            if bench.config.point_head and not bench.points:
                note("no answer points by grounding tokens: the point head stays float32")
            parts = [bench.noise(on_part("noise")), *ablate(bench, words, on_part=on_part)]
            size = None if max_mb is None else int(max_mb * 1e6)
            found = search(bench, parts[1:], max_bytes=size, max_kl=max_kl, on_try=on_part)
            if not json and not quiet:
                print_parts(parts, bench.description)
            note(f"writing {out}", quiet=quiet)
            chosen = found.choice.to_precision()
            plan = check_options(ExportOptions(chosen))
            photos = calibrate if plan.uses_calibration else None
            passes = train_scales if "q4" in plan.decoder_formats.values() else 0
            if train_scales and not passes:
                note("no part of the decoder is chosen in q4: its scales are not trained")
            manifest = export_bundle(
                directory,
                out,
                chosen,
                calibrate=photos,
                rotate=rotate,
                train_scales=passes,
                name=out.name,
                on_pass=report_pass(passes, quiet=quiet),
            )
            report_kept(manifest, quiet=quiet)
            written = open_bundle(out)
            figures = bench.measure({name: written.path(name) for name in graph_names(bench.config)}, on_part(out.name))
    if json:
        measured = {name: figure.to_dict() for name, figure in figures.items()}
        data_ = {"out": str(out), "parts": [part.to_dict() for part in parts], "found": found.to_dict()}
        print_json({**data_, "written": measured})
    else:
        _print(found, figures)
    note(f"wrote {out}", quiet=quiet)
    skipped.finish()


def _print(found: SearchResult, figures: Mapping[str, Estimate]) -> None:
    kl, same = figures["kl_mean"], figures["same_top"]
    for part, precision in found.choice.precisions.items():
        print(f"{part:15} {precision}")
    print(
        f"{found.bytes / 1e6:.2f} MB; measured: KL {kl.format(lambda v: f'{v:.2g}')} "
        f"nats per token, same most likely token {100 * same.value:.1f} % (predicted KL: {found.choice.predicted:.2g})"
    )
