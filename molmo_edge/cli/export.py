"""`molmo-edge export`"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from molmo_edge.cli import options
from molmo_edge.cli.open_model import find_model
from molmo_edge.cli.output import console, note, print_json, progress
from molmo_edge.export.precisions import GGUF_PRECISIONS, ONNX_PRECISIONS, SAFETENSORS_PRECISIONS
from molmo_edge.export.targets import TARGETS
from molmo_edge.system.key_values import parse_key_values

_PRECISION = (
    f"Precision of the weights. onnx: {', '.join(f'{p.name} ({p.meaning})' for p in ONNX_PRECISIONS.values())}, "
    f"or by component, decoder=q4,...; gguf: the decoder in {', '.join(GGUF_PRECISIONS)}; "
    f"torch: {', '.join(SAFETENSORS_PRECISIONS)}. Default: that of --target, else "
    "fp32 (onnx), f16 (gguf) or bf16 (torch)."
)
_TARGET = f"Kind of machine for which to choose precisions and operators: {', '.join(TARGETS)}."
_CALIBRATE = (
    "Folder of calibration photos for quantizing the decoder: slower, but closer to fp32. Needs PyTorch. onnx: GPTQ "
    "for 4-bit weights, smoothing for int8; gguf: an importance matrix."
)
_ROTATE = (
    "Rotate the hidden channels before rounding, which spreads outliers: closer to fp32 at the same size and speed. "
    "Not for OLMo decoders."
)
TRAIN_SCALES = (
    "Train the scales of 4-bit weights against the float32 decoder, in this many passes over the photos of --calibrate "
    "(0: none)."
)
_MMPROJ = "gguf: also write vision and connector as a GGUF, for developers who use ggml."
_CACHE = (
    "onnx: int8 stores keys and values in eight bits, which takes a quarter of their memory and speeds up tokens, but "
    "slows down prompts. Needs --calibrate."
)
_DRAFTING = (
    "onnx: let the decoder verify the parts of a point that the grammar fixes in one run, with equal ids. Points take "
    "fewer runs; a run of one token takes a few percent longer."
)


class Engine(str, Enum):
    """The engines that --engine accepts."""

    onnx = "onnx"
    gguf = "gguf"
    torch = "torch"


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Checkpoint directory (in hub layout or the reference's), hub id, or bundle.", show_default=False
        ),
    ],
    *,
    out: Annotated[Path, typer.Option(help="Directory to create; it must not exist.", show_default=False)],
    engine: Annotated[
        Engine,
        typer.Option(
            help="onnx: a bundle for ONNX Runtime. gguf: a bundle whose decoder runs on llama.cpp. torch: safetensors."
        ),
    ] = Engine.onnx,
    precision: Annotated[str | None, typer.Option(help=_PRECISION, show_default=False)] = None,
    target: Annotated[str | None, typer.Option(help=_TARGET, show_default=False)] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Only standard ONNX operators: fp32, fp16 or int8.")] = False,
    block: Annotated[
        int | None, typer.Option(help="Number of 4-bit weights that share a scale: 32, 64 or 128.", show_default=False)
    ] = None,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="Asymmetric 4-bit quantization: a zero point for each block.")
    ] = False,
    calibrate: Annotated[Path | None, typer.Option(help=_CALIBRATE, show_default=False)] = None,
    rotate: Annotated[bool, typer.Option("--rotate", help=_ROTATE)] = False,
    mmproj: Annotated[bool, typer.Option("--mmproj", help=_MMPROJ)] = False,
    drafting: Annotated[bool, typer.Option("--drafting", help=_DRAFTING)] = False,
    train_scales: Annotated[int, typer.Option(min=0, metavar="PASSES", help=TRAIN_SCALES)] = 0,
    cache: Annotated[str | None, typer.Option(help=_CACHE, show_default=False)] = None,
    revision: options.Revision = None,
    name: Annotated[str | None, typer.Option(help="Name in the manifest. Default: that of --out.")] = None,
    check_image: Annotated[
        Path | None, typer.Option(help="Photo of the self-check, which is recorded in the bundle.")
    ] = None,
    check_question: Annotated[str, typer.Option(help="Question of the self-check.")] = "Describe this image.",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Convert a checkpoint to a bundle for ONNX Runtime or llama.cpp, or to safetensors."""
    if engine is Engine.torch:
        bundle_only = (name, check_image, target, block, calibrate, cache)
        if (
            plain
            or asymmetric
            or mmproj
            or rotate
            or drafting
            or train_scales
            or any(option is not None for option in bundle_only)
        ):
            raise typer.BadParameter(
                "--engine torch takes --precision, --revision and --out; the other options are for bundles"
            )
        from molmo_edge.export import check_checkpoint_options

        check_checkpoint_options(out, precision or "bf16")  # before 29 GB are downloaded
        directory = find_model(checkpoint, revision=revision, quiet=quiet, to_run=False)
        _safetensors(directory, out, precision or "bf16", json=json, quiet=quiet)
    else:
        from molmo_edge.export import CheckPhoto, ExportOptions, check_bundle_options, export_bundle

        by_component = None if precision is None else _by_component(precision)
        rounding = (block, asymmetric, calibrate)
        export_options = ExportOptions(
            by_component, engine.value, target, plain, *rounding, mmproj, rotate, drafting, train_scales, cache
        )
        check = None if check_image is None else CheckPhoto(check_image, check_question)
        check_bundle_options(out, check, export_options)
        directory = find_model(checkpoint, revision=revision, quiet=quiet, to_run=False)
        with progress(f"exporting {directory}", quiet=quiet):
            on_pass = report_pass(train_scales, quiet=quiet)
            manifest = export_bundle(directory, out, name=name, check=check, on_pass=on_pass, **vars(export_options))
        report_kept(manifest, quiet=quiet)
        _report(manifest, checkpoint, out, json=json, quiet=quiet)


def report_pass(passes: int, *, quiet: bool) -> Callable[[int, float], None]:
    """A function of the number of a pass of --train-scales and its KL divergence, which prints them."""

    def report(number: int, divergence: float) -> None:
        what = "scales before training" if number == 0 else f"training scales, pass {number} of {passes}"
        note(f"{what}: KL {divergence:.3g} per token on held-out prompts", quiet=quiet)

    return report


def report_kept(manifest: dict[str, Any], *, quiet: bool) -> None:
    """Print which pass of --train-scales was kept, if there was a training."""
    if (training := manifest["components"]["decoder"].get("trained_scales")) is not None:
        kept = training["kept_pass"]
        note(
            f"kept the scales of pass {kept}" if kept else "no pass was better: the scales did not change", quiet=quiet
        )


def _report(manifest: dict[str, Any], checkpoint: str, out: Path, *, json: bool, quiet: bool) -> None:
    if json:
        print_json({"out": str(out), "manifest": manifest})
    for component in manifest["components"].values():
        detail = ""
        if kept := component.get("kept_in_fp32"):
            detail = f"  {len(kept)} matrices stay float32: their values exceed float16's range"
        note(f"{component['bytes'] / 1e6:9.2f} MB  {component['file']}{detail}", quiet=quiet)
    note(f"wrote {out}", quiet=quiet)
    # The manifest's relative errors are of activations on synthetic inputs: they do not measure its answers.
    if any({"relative_error", "weight_errors"} & component.keys() for component in manifest["components"].values()):
        note(f"to measure the loss from quantization: molmo-edge loss {checkpoint} {out}", quiet=quiet)


def _safetensors(checkpoint: Path, out: Path, precision: str, *, json: bool, quiet: bool) -> None:
    from molmo_edge.export import export_checkpoint

    with _bar(f"converting {checkpoint.name}", quiet=quiet) as on_progress:
        files = export_checkpoint(checkpoint, out, precision, on_progress=on_progress)
    sizes = {path.name: path.stat().st_size for path in files}
    if json:
        print_json({"out": str(out), "precision": precision, "files": sizes})
    for file, size in sizes.items():
        note(f"{size / 1e6:9.2f} MB  {file}", quiet=quiet)
    note(f"wrote {out}", quiet=quiet)


@contextmanager
def _bar(text: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr if it is a terminal. Yields a function of the part done and the total."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), disable=quiet or not sys.stderr.isatty()) as bars:
        task = bars.add_task(text)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _by_component(precision: str) -> str | dict[str, str]:
    if "=" not in precision:
        return precision
    try:
        return parse_key_values(precision)
    except ValueError as error:
        raise typer.BadParameter(
            f"{error} is not of the form decoder=int8,connector=fp32", param_hint="--precision"
        ) from None
