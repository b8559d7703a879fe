"""`molmo-edge bench`"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molmo_edge.cli import options
from molmo_edge.cli.open_model import find_model
from molmo_edge.cli.output import note, print_json, progress
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.system.extras import MissingExtra, pip_command

if TYPE_CHECKING:
    import numpy as np

    from molmo_edge.molmo import Molmo
    from molmo_edge.runtimes import Runtime


@dataclass(frozen=True)
class Timing:
    """Median times of the measured answers, in milliseconds."""

    engine: str
    cold: float  # measured once: from opening the model to the first token of the first answer
    preprocess: float
    vision: float
    prefill: float  # processing of image and question tokens, to the first token
    first_token: float  # preprocess + vision + prefill
    decode: float  # per token after the first
    prompt_tokens: int  # image and question
    generated: int
    drafted: int  # of them: each saved a run of the decoder
    joules: float | None  # per answer, image included; None if the machine reports no energy
    tokens_per_joule: float | None
    energy_source: str | None  # "RAPL" or "INA3221"


@options.expand_options
def bench(
    image: Annotated[
        Path | None, typer.Argument(help="The photo. Default: a synthetic image of 640 x 480.", show_default=False)
    ] = None,
    *,
    model: options.ModelOptions,
    question: Annotated[str, typer.Option(help="The question to ask.")] = "Describe this image.",
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Maximum length of each answer in tokens.")] = 32,
    repeat: Annotated[
        int, typer.Option(min=1, help="Number of measured answers, after one for warm-up. Times are medians.")
    ] = 3,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Checkpoint for the PyTorch run. Default: the bundle's own weights."),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure the time of each stage, also on PyTorch if it is installed."""
    from molmo_edge.checkpoints.bundle import load_tokenizer
    from molmo_edge.frontend.crops import load_image
    from molmo_edge.molmo import Molmo
    from molmo_edge.runtimes import open_runtime
    from molmo_edge.sdk.image_tokens import image_tokens as chosen_tokens
    from molmo_edge.system.memory import give_back

    if checkpoint is not None and importlib.util.find_spec("torch") is None:  # before measuring anything
        raise MissingExtra(f"bench --checkpoint needs torch: {pip_command('torch')}")
    device, threads = model.device, model.threads
    rgb = _synthetic(640, 480) if image is None else load_image(image)
    directory = find_model(model.model, revision=model.revision, quiet=quiet, ask=not model.yes)
    tokenizer = load_tokenizer(directory)
    height, width = rgb.shape[:2]
    timings: list[Timing] = []

    def measure(engine: str, runtime: Runtime, load: float, draft: bool | None = None) -> None:
        with Molmo.from_parts(
            runtime,
            tokenizer,
            max_crops=model.max_crops,
            image_tokens=model.image_tokens,
            reuse_crops=model.reuse_crops,
            draft=draft,
        ) as molmo:
            timings.append(_measure(engine, molmo, rgb, question, load, max_new_tokens, repeat))
        give_back()

    def show() -> None:
        """Print the newest timing before the next engine opens; outside the spinner, which redirects stdout."""
        if not json:
            if len(timings) == 1:
                tokens = timings[0].prompt_tokens
                print(f"{directory.name}, image {width}x{height}, {tokens} tokens in; medians of {repeat} in ms")
                print(_row("", [title for title, _ in _COLUMNS.values()]))
            newest = timings[-1]
            print(_row(newest.engine, _cells(newest)), flush=True)
            if newest.drafted:
                print(f"{'':13}{newest.drafted} of the tokens were drafted, and saved as many runs", flush=True)
            if newest.joules is not None:
                per_joule = f"{newest.tokens_per_joule:.2f} tokens per joule"
                print(f"{'':13}{newest.joules:.2f} J per answer, {per_joule} ({newest.energy_source})", flush=True)

    with progress("measuring", quiet=quiet):
        started = time.perf_counter()
        # With --checkpoint, --precision applies to that checkpoint.
        precision = model.precision if checkpoint is None else "auto"
        runtime: Runtime = open_runtime(
            directory,
            device=device,
            precision=precision,
            threads=threads,
            engine_options=options.llama_options(model.llama),
            gaps=chosen_tokens(model.image_tokens) is not None,
            max_crops=model.max_crops,
            image_tokens=model.image_tokens,
        )
        measure(runtime.engine, runtime, time.perf_counter() - started, model.draft)
    show()
    note(f"measured {timings[0].engine}", quiet=quiet or not json)
    if not timings[0].engine.startswith("pytorch"):
        try:
            import torch  # noqa: F401  (not measured: the first engine was imported before its measurement, too)

            with progress("measuring PyTorch", quiet=quiet):
                started = time.perf_counter()
                runtime = _torch_runtime(directory, checkpoint, device, model.precision, threads)
                measure(runtime.engine, runtime, time.perf_counter() - started)
            show()
        except ImportError:
            note(f"PyTorch is not installed; install it to compare: {pip_command('torch')}")
        except MolmoEdgeError as error:  # the weights cannot be read from the bundle: no onnx package, or a GGUF
            if checkpoint is not None:
                raise
            note(f"PyTorch was skipped: {error}")
    if json:
        print_json({"model": str(directory), "image": [width, height], "timings": [asdict(t) for t in timings]})


def _torch_runtime(bundle: Path, checkpoint: Path | None, device: str, precision: str, threads: int | None) -> Runtime:
    from molmo_edge.runtimes.torch import TorchRuntime

    if checkpoint is not None:
        return TorchRuntime(checkpoint, device=device, precision=precision, threads=threads)
    from molmo_edge.export import load_bundle_weights

    return TorchRuntime.from_model(load_bundle_weights(bundle, precision="auto"), threads=threads)


def _measure(
    engine: str, molmo: Molmo, rgb: np.ndarray, question: str, load: float, max_new_tokens: int, repeat: int
) -> Timing:
    from molmo_edge.system.energy import EnergyMeter

    first = molmo.ask(rgb, question, max_new_tokens=max_new_tokens)
    with EnergyMeter() as meter:
        answers = [molmo.ask(rgb, question, max_new_tokens=max_new_tokens) for _ in range(repeat)]

    def median(values: list[float]) -> float:
        return round(1e3 * statistics.median(values), 2)

    spent = [answer.usage.seconds for answer in answers]
    tokens = answers[0].usage.tokens
    return Timing(
        engine=engine,
        # Includes the first answer: an engine may return from opening before its graphs are loaded.
        cold=round(1e3 * (load + first.usage.seconds.total - first.usage.seconds.decode), 2),
        preprocess=median([s.preprocess for s in spent]),
        vision=median([s.vision for s in spent]),
        prefill=median([s.prefill for s in spent]),
        first_token=median([s.preprocess + s.vision + s.prefill for s in spent]),
        decode=median([s.decode / max(1, a.usage.tokens.generated - 1) for s, a in zip(spent, answers, strict=True)]),
        prompt_tokens=tokens.image + tokens.prompt,
        generated=tokens.generated,
        drafted=answers[-1].usage.tokens.drafted,
        joules=meter.joules and round(meter.joules / repeat, 3),
        tokens_per_joule=meter.joules and round(sum(a.usage.tokens.generated for a in answers) / meter.joules, 4),
        energy_source=meter.source,
    )


def _synthetic(width: int, height: int) -> np.ndarray:
    """A deterministic test image, uint8 [height, width, 3]: smooth colours with some detail."""
    import numpy as np

    y, x = np.mgrid[:height, :width]
    bands = np.stack([x * 255 // width, y * 255 // height, (x // 16 + y // 16) % 2 * 200], axis=-1)
    return bands.astype(np.uint8)


# Title and width of each column, by field of Timing.
_COLUMNS = {
    "cold": ("cold start", 11),
    "preprocess": ("preprocessing", 14),
    "vision": ("vision", 9),
    "prefill": ("prefill", 9),
    "first_token": ("first token", 12),
    "decode": ("per token", 10),
    "generated": ("tokens", 7),
}


def _row(engine: str, cells: Sequence[str]) -> str:
    return f"{engine:13}" + "".join(f"{cell:>{w}}" for cell, (_, w) in zip(cells, _COLUMNS.values(), strict=True))


def _cells(timing: Timing) -> list[str]:
    values: list[Any] = [getattr(timing, field) for field in _COLUMNS]
    return [f"{value:.1f}" if isinstance(value, float) else str(value) for value in values]
