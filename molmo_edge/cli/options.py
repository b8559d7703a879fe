"""Arguments and options that several commands share, each written once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_type_hints

import typer
from typer.core import TyperCommand

from molmo_edge.cli.pictures import names_image

if TYPE_CHECKING:
    from molmo_edge.runtimes import LlamaOptions


def _known_device(device: str) -> str:
    from molmo_edge.config import DEVICES

    if device not in DEVICES:
        raise typer.BadParameter(f'"{device}" is not known; known are {", ".join(DEVICES)}')
    return device


def _known_precision(precision: str) -> str:
    from molmo_edge.config import PRECISIONS

    if precision not in PRECISIONS:
        raise typer.BadParameter(f'"{precision}" is not known; known are {", ".join(PRECISIONS)}')
    return precision


def _enough_cores(threads: int | None) -> int | None:
    if threads is not None:
        from molmo_edge.errors import EngineError
        from molmo_edge.system.cores import choose_threads

        try:
            choose_threads(threads)
        except EngineError as error:
            raise typer.BadParameter(str(error)) from None
    return threads


def _known_llama(text: str | None) -> str | None:
    from molmo_edge.errors import EngineError

    try:
        llama_options(text)
    except EngineError as error:
        raise typer.BadParameter(str(error)) from None
    return text


def llama_options(text: str | None) -> LlamaOptions | None:
    """The value of --llama as `engine_options`. Raises EngineError for an option that llama.cpp does not have."""
    from molmo_edge.runtimes import LlamaOptions

    return None if text is None else LlamaOptions.parse(text)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"it must be a finite number, it is {value:g}")
    return value


def _share(value: float) -> float:
    if not 0.0 < value <= 1.0:
        raise typer.BadParameter(f"it must be above 0 and at most 1, it is {value:g}")
    return value


_IMAGE = 'The photo: any file that Pillow reads. After "--" its name may begin with a dash.'
_QUESTION = '"Where is the dog?" After "--" it may begin with a dash: photo.jpg -- "-5 or 5 degrees?"'
_LABEL = 'What to look for: "the dog", "cups". After "--" it may begin with a dash: photo.jpg -- "-5 sign"'
_IMAGES = 'A photo, several, or a folder of them; "-" reads one from stdin. After "--" its name may begin with a dash.'
Image = Annotated[Path, typer.Argument(metavar="IMAGE", help=_IMAGE, show_default=False)]
Images = Annotated[list[Path], typer.Argument(metavar="IMAGE", help=_IMAGES, show_default=False)]
Question = Annotated[str, typer.Argument(metavar="QUESTION", help=_QUESTION, show_default=False)]
Label = Annotated[str, typer.Argument(metavar="LABEL", help=_LABEL, show_default=False)]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Bundle or checkpoint directory, or hub id. Without it: the embedded nano."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id. Without it: the main branch.")]
_DEVICE = '"auto", "cpu", "cuda"; a checkpoint "mps"; a bundle "tensorrt", "coreml"; a GGUF also "mps", "vulkan".'
Device = Annotated[str, typer.Option(help=_DEVICE, callback=_known_device)]
Precision = Annotated[
    str, typer.Option(help='Of a checkpoint: "auto", "fp32", "bf16", "int8" or "nf4".', callback=_known_precision)
]
MaxCrops = Annotated[int | None, typer.Option(min=0, help="Most crops; fewer are faster and see less.")]
_THREADS = "CPU threads. Without it: the physical cores, or a container's quota."
Threads = Annotated[int | None, typer.Option(min=1, help=_THREADS, callback=_enough_cores)]
_LLAMA = "Of a GGUF: gpu_layers=N, cache=f16|q8_0|..., flash_attention=yes|no, repack=yes|no, with commas between."
Llama = Annotated[str | None, typer.Option("--llama", help=_LLAMA, callback=_known_llama, show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")]
JsonLines = Annotated[
    bool, typer.Option("--json", help="JSON on stdout, one object a line for each image, and nothing else there.")
]
_SAVE = "Write the photo with the points drawn in: .png, .jpg or .webp. For several images: a folder."
Save = Annotated[Path | None, typer.Option(help=_SAVE)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Cut the answer off after this many tokens.")]
_TEMPERATURE = "0: the likeliest answer, the same each time."
Temperature = Annotated[float, typer.Option(min=0.0, help=_TEMPERATURE, callback=_finite)]
Seed = Annotated[int | None, typer.Option(min=0, help="With a temperature: repeats the same draw.")]
TopK = Annotated[int, typer.Option(min=0, help="With a temperature: only the likeliest K tokens; 0: all.")]
_TOP_P = "With a temperature: only the likeliest tokens that together have this probability."
TopP = Annotated[float, typer.Option(help=_TOP_P, callback=_share)]


@dataclass(frozen=True)
class Opening:
    """How a model is opened."""

    model: Model = None
    revision: Revision = None
    device: Device = "auto"
    precision: Precision = "auto"
    max_crops: MaxCrops = None
    threads: Threads = None
    llama: Llama = None


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen."""

    max_new_tokens: MaxNewTokens = None
    temperature: Temperature = 0.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    seed: Seed = None

    def keywords(self) -> dict[str, Any]:
        """As `Molmo.ask` takes them; what the user left open is left out."""
        given = dataclasses.asdict(self)
        if self.max_new_tokens is None:
            del given["max_new_tokens"]
        return given

    @property
    def without_effect(self) -> str | None:
        """What a user who restricts a greedy answer should know."""
        if self.temperature == 0.0 and (self.top_k or self.top_p < 1.0):
            return "--top-k and --top-p change nothing at --temperature 0, which takes the likeliest token"
        return None


class ImagesAndText(TyperCommand):
    """A command of images and one text: of a single argument that names an image the text is missing, not the image."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)  # the parser takes them out
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            missing = getattr(error, "param", None)
            images, text = (p for p in self.params if p.param_type_name == "argument")
            if missing is images and error.param_hint is None:
                # The parser gives the last argument to the text, and images what is before it.
                only = self.make_parser(ctx).parse_args(given)[0].get(text.name)
                if isinstance(only, str) and names_image(Path(only)):
                    error.param = cast(Any, text)
            raise


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """`command` for typer: each field of a dataclass among its parameters becomes an option of its own."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if not dataclasses.is_dataclass(kind):
            parameters.append(parameter.replace(annotation=kind))
            continue
        groups[parameter.name] = kind
        own = get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=own[field.name]
                )
            )

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in dataclasses.fields(kind)})
        command(**given)

    # Both are what typer reads.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
