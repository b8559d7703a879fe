"""Arguments and options that several commands share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _known_device(device: str) -> str:
    from molmo_edge.runtimes import DEVICES  # it brings numpy, which no --help should wait for

    if device not in DEVICES:
        raise typer.BadParameter(f'"{device}" is not known; known are {", ".join(DEVICES)}')
    return device


def _known_precision(precision: str) -> str:
    from molmo_edge.config import PRECISIONS

    if precision not in PRECISIONS:
        raise typer.BadParameter(f'"{precision}" is not known; known are {", ".join(PRECISIONS)}')
    return precision


def _known_llama(text: str | None) -> str | None:
    if text is not None:
        from molmo_edge.runtimes import EngineError
        from molmo_edge.runtimes.llama_options import LlamaOptions

        try:
            LlamaOptions.parse(text)
        except EngineError as error:
            raise typer.BadParameter(str(error)) from None
    return text


_IMAGE = 'The photo: any file that Pillow reads. After "--" its name may begin with a dash.'
_QUESTION = '"Where is the dog?" After "--" it may begin with a dash: photo.jpg -- "-5 or 5 degrees?"'
_LABEL = 'What to look for: "the dog", "cups". After "--" it may begin with a dash: photo.jpg -- "-5 sign"'
Image = Annotated[Path, typer.Argument(help=_IMAGE, show_default=False)]
Question = Annotated[str, typer.Argument(help=_QUESTION, show_default=False)]
Label = Annotated[str, typer.Argument(help=_LABEL, show_default=False)]
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
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Without it: the physical cores.")]
_LLAMA = "Of a GGUF: gpu_layers=N, cache=f16|q8_0|..., flash_attention=yes|no, repack=yes|no, with commas between."
Llama = Annotated[str | None, typer.Option("--llama", help=_LLAMA, callback=_known_llama, show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")]
Save = Annotated[Path | None, typer.Option(help="Write the photo with the points drawn in: .png, .jpg or .webp.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Cut the answer off after this many tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: the likeliest answer, the same each time.")]
Seed = Annotated[int | None, typer.Option(min=0, help="With a temperature: repeats the same draw.")]
