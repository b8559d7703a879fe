"""Arguments and options that several commands share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
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


def _one_of(kind: str) -> Callable[[str], str]:
    """A callback that accepts a known device, precision, ..."""

    def check(value: str) -> str:
        from molmo_edge.config import ALPHA, DEVICES, PRECISIONS, SAMPLINGS

        known = {"device": DEVICES, "precision": PRECISIONS, "alpha": ALPHA, "sampling": SAMPLINGS}[kind]
        if value not in known:
            raise typer.BadParameter(f'"{value}" is not a known {kind} (known: {", ".join(known)})')
        return value

    return check


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
    """Parse the value of --llama. Raises EngineError for an unknown option or value."""
    from molmo_edge.runtimes import LlamaOptions

    return None if text is None else LlamaOptions.parse(text)


def _size(text: str) -> str:
    from molmo_edge.system.boards import parse_bytes

    try:
        parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"must be a finite number, got {value:g}")
    return value


def _positive(value: float | None) -> float | None:
    if value is not None and not 0.0 < value < math.inf:
        raise typer.BadParameter(f"must be a positive number, got {value:g}")
    return value


def _json_schema(path: str) -> dict[str, Any]:
    try:
        schema = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{path} is not a JSON file that can be read: {error}") from None
    if not isinstance(schema, dict):
        raise typer.BadParameter(f"{path} is not a JSON schema, which is an object")
    return schema


def _some_share(value: float | None) -> float | None:
    return None if value is None else _share(value)


def _share(value: float) -> float:
    if not 0.0 < value <= 1.0:
        raise typer.BadParameter(f"must be greater than 0 and at most 1, got {value:g}")
    return value


# Each shared argument and option is declared once, as a type. Only help texts of options whose default is None name the
# default: typer shows the others.
_IMAGE = 'The photo, in any format that Pillow reads. Put "--" before a name that begins with a dash.'
_IMAGES = (
    'One or more photos or videos, a folder of photos, or a pattern ("photos/**/*.jpg"); "-" reads one photo from '
    'stdin. Put "--" before a name that begins with a dash.'
)
_CHAT_IMAGES = 'The photo, or several photos or a video for a Molmo2. Put "--" before a name that begins with a dash.'
_TOGETHER = "Ask once about all photos together (Molmo2 models), instead of once for each photo."
_MAX_FRAMES = "Maximum number of frames of a video. A frame takes about 90 positions. Default: the model's own."
_MAX_FPS = "Maximum number of frames per second of a video. Default: the model's own."
_SAMPLING = (
    'How frames of a video are selected: "reference", as by Ai2\'s processor, or "transformers", as by that of '
    "transformers, which leaves out the last frame."
)
_QUESTION = '"Where is the dog?" Put "--" before a question that begins with a dash: photo.jpg -- "-5 or 5 degrees?"'
_LABEL = 'What to look for: "the dog", "cups". Put "--" before a label that begins with a dash: photo.jpg -- "-5 sign"'
Image = Annotated[Path, typer.Argument(metavar="IMAGE", help=_IMAGE, show_default=False)]
Images = Annotated[list[Path], typer.Argument(metavar="IMAGE", help=_IMAGES, show_default=False)]
ChatImages = Annotated[list[Path], typer.Argument(metavar="IMAGE", help=_CHAT_IMAGES, show_default=False)]
Together = Annotated[bool, typer.Option("--together", help=_TOGETHER)]
MaxFrames = Annotated[int | None, typer.Option(min=1, help=_MAX_FRAMES)]
MaxFps = Annotated[float | None, typer.Option(help=_MAX_FPS, callback=_positive)]
VideoSampling = Annotated[str, typer.Option(help=_SAMPLING, callback=_one_of("sampling"))]
Question = Annotated[str, typer.Argument(metavar="QUESTION", help=_QUESTION, show_default=False)]
Label = Annotated[str, typer.Argument(metavar="LABEL", help=_LABEL, show_default=False)]

_MODEL = (
    'Bundle directory, checkpoint directory, hub id or short name ("molmo-edge list --all"). Default: the embedded '
    "nano model."
)
_DEVICE = (
    '"auto", "cpu" or "cuda". Checkpoints also run on "mps", ONNX bundles on "tensorrt" and "coreml", GGUF bundles on '
    '"mps" and "vulkan".'
)
_PRECISION = 'Precision of a checkpoint: "auto", "fp32", "bf16", "int8" or "nf4". That of a bundle is fixed.'
_MAX_CROPS = "Maximum number of crops. Fewer are faster but lose detail; more are slower. Default: the model's own."
_IMAGE_TOKENS = (
    "The share of an image's tokens that the decoder sees, such as 0.5. Faster, but answers get worse, points most. "
    "Not for GGUF bundles. Default: all tokens."
)
_REUSE_CROPS = (
    "Encode a photo of at most one crop (336 x 336 pixels in Molmo) once instead of twice: its crop has the pixels of "
    "its global view."
)
_ALPHA = 'Transparency: "drop" ignores it, as in the training of Molmo; "white" blends transparent pixels with white.'
_THREADS = "Number of CPU threads. Default: the physical cores, or the quota of the container."
_LLAMA = (
    "Options of llama.cpp for a GGUF bundle, separated by commas: gpu_layers=N, cache=f16|q8_0|..., "
    "flash_attention=yes|no, repack=yes|no. Default: chosen for the machine."
)
_DRAFT = (
    "Draft what the grammar of points fixes, and verify it in one run of the decoder. Default: for bundles exported "
    "with --drafting, where it changes no token. With --draft: for every model that can; rounding may change a token."
)
_SCENE_CACHE = (
    "A folder in which encoded photos are kept, so that a later command about the same photo does not encode it again. "
    "Default: none."
)
_SCENE_CACHE_SIZE = "Size of the folder, 2GB. Photos that were not asked about for longest are removed first."
Model = Annotated[str | None, typer.Option("--model", "-m", help=_MODEL)]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before a model is downloaded.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id. Default: the main branch.")]
Device = Annotated[str, typer.Option(help=_DEVICE, callback=_one_of("device"))]
Precision = Annotated[str, typer.Option(help=_PRECISION, callback=_one_of("precision"))]
MaxCrops = Annotated[int | None, typer.Option(min=0, help=_MAX_CROPS)]
ImageTokens = Annotated[float | None, typer.Option(help=_IMAGE_TOKENS, callback=_some_share)]
ReuseCrops = Annotated[bool, typer.Option("--reuse-crops", help=_REUSE_CROPS)]
Alpha = Annotated[str, typer.Option(help=_ALPHA, callback=_one_of("alpha"))]
Threads = Annotated[int | None, typer.Option(min=1, help=_THREADS, callback=_enough_cores)]
Llama = Annotated[str | None, typer.Option("--llama", help=_LLAMA, callback=_known_llama, show_default=False)]
Draft = Annotated[bool | None, typer.Option("--draft/--no-draft", help=_DRAFT, show_default=False)]

SceneCache = Annotated[Path | None, typer.Option("--scene-cache", metavar="DIR", help=_SCENE_CACHE, show_default=False)]
SceneCacheSize = Annotated[
    str, typer.Option("--scene-cache-size", metavar="SIZE", help=_SCENE_CACHE_SIZE, callback=_size)
]

MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Maximum length of an answer in tokens. Default: 384.")]
_TEMPERATURE = "Sampling temperature. 0 always takes the most likely token."
_TOP_K = "Sample only from the K most likely tokens; 0 for no limit."
_TOP_P = "Sample only from the most likely tokens whose probabilities add up to this value."
_SEED = "Random seed for reproducible sampling. Default: a different answer each time."
Temperature = Annotated[float, typer.Option(min=0.0, help=_TEMPERATURE, callback=_finite)]
TopK = Annotated[int, typer.Option(min=0, help=_TOP_K)]
TopP = Annotated[float, typer.Option(help=_TOP_P, callback=_share)]
Seed = Annotated[int | None, typer.Option(min=0, help=_SEED)]

_JSON_LINES = "Print one JSON object per image to stdout, each on its own line, and nothing else."
_SAVE = (
    "Save the photo with the points drawn on it, as .png, .jpg or .webp. With several photos: a folder. With "
    "--together or a video: a file for a sheet of all pictures, or a folder for one file each."
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout and nothing else.")]
JsonLines = Annotated[bool, typer.Option("--json", help=_JSON_LINES)]
Save = Annotated[Path | None, typer.Option(help=_SAVE)]
_SAVE_DIR = "Save each photo with its points drawn on it as DIR/NAME.annotated.png."
_CSV = (
    "Write a table with a row for each point to this file, instead of printing answers. Photos that it has answers for "
    "are skipped, so that an interrupted run can continue."
)
SaveDir = Annotated[Path | None, typer.Option(metavar="DIR", help=_SAVE_DIR, show_default=False)]
Csv = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help=_CSV, show_default=False)]
_SCHEMA = "Answer with JSON that matches the JSON schema in this file."
_REGEX = "Answer with a text that this pattern matches as a whole. The syntax is that of Rust's regex."
_CHOICES = "Answer with one of these texts, separated by commas."
JsonSchema = Annotated[
    Any, typer.Option("--schema", metavar="FILE", help=_SCHEMA, parser=lambda path: _json_schema(path))
]
Regex = Annotated[str | None, typer.Option("--regex", metavar="PATTERN", help=_REGEX)]
Choices = Annotated[str | None, typer.Option("--choices", metavar="A,B,...", help=_CHOICES)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors to stderr.")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model a command opens, and how."""

    model: Model = None
    revision: Revision = None
    device: Device = "auto"
    precision: Precision = "auto"
    max_crops: MaxCrops = None
    image_tokens: ImageTokens = None
    reuse_crops: ReuseCrops = False
    alpha: Alpha = "drop"
    threads: Threads = None
    llama: Llama = None
    draft: Draft = None
    yes: Yes = False


@dataclass(frozen=True)
class CachedModelOptions(ModelOptions):
    """Which model a command opens, how, and where it keeps encoded images."""

    scene_cache: SceneCache = None
    scene_cache_size: SceneCacheSize = "2GB"


@dataclass(frozen=True)
class SamplingOptions:
    """How the tokens of an answer are chosen."""

    max_new_tokens: MaxNewTokens = None
    temperature: Temperature = 0.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    seed: Seed = None

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of `Molmo.ask`, without those that the user left to their defaults there."""
        given = dataclasses.asdict(self)
        if self.max_new_tokens is None:
            del given["max_new_tokens"]
        return given

    @property
    def warning(self) -> str | None:
        """A warning about options that have no effect."""
        if self.temperature == 0.0 and (self.top_k or self.top_p < 1.0):
            return "--top-k and --top-p have no effect at --temperature 0, which always takes the most likely token"
        return None


@dataclass(frozen=True)
class FormOptions(SamplingOptions):
    """How the tokens of an answer are chosen, and what form it has."""

    schema: JsonSchema = None
    regex: Regex = None
    choices: Choices = None

    def keywords(self) -> dict[str, Any]:
        """As in SamplingOptions. Raises BadParameter for several forms."""
        given = super().keywords()
        forms = [f"--{name}" for name in ("schema", "regex", "choices") if given[name] is not None]
        if len(forms) > 1:
            raise typer.BadParameter(f"{' and '.join(forms)} cannot be used together: an answer has one form")
        if self.choices is not None:
            given["choices"] = [choice.strip() for choice in self.choices.split(",")]
        return given


@dataclass(frozen=True)
class VideoOptions:
    """Which frames of a video the model sees."""

    max_frames: MaxFrames = None
    max_fps: MaxFps = None
    video_sampling: VideoSampling = "reference"

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of `Video`."""
        return {"sampling": self.video_sampling, "max_frames": self.max_frames, "max_fps": self.max_fps}


@dataclass(frozen=True)
class TogetherOption:
    """Whether several images belong to one question."""

    together: Together = False


@dataclass(frozen=True)
class OutputOptions:
    """Where answers about images go."""

    json: JsonLines = False
    save: Save = None
    save_dir: SaveDir = None
    csv: Csv = None
    quiet: Quiet = False


class ImagesAndText(TyperCommand):
    """A command that takes images and one text.

    Given a single argument that names an image, it reports that the text is missing; typer would report the image.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse like TyperCommand, but report a missing text if the only argument is an image. Raises BadParameter."""
        given = list(args)  # the parser empties `args`
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            missing = getattr(error, "param", None)
            images, text = (p for p in self.params if p.param_type_name == "argument")
            if missing is images and error.param_hint is None:
                # The parser assigns the last argument to the text and those before it to the images.
                only = self.make_parser(ctx).parse_args(given)[0].get(text.name)
                if isinstance(only, str) and names_image(Path(only)):
                    error.param = cast(Any, text)
            raise


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Make `command` usable by typer: each field of a parameter that is a dataclass becomes an option."""
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

    # typer reads both.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
