"""`molmo-edge chat`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo_edge.cli import options
from molmo_edge.cli.opening import open_molmo
from molmo_edge.cli.output import check_save, note, print_stream, progress, save_image
from molmo_edge.errors import MolmoEdgeError

if TYPE_CHECKING:
    from molmo_edge.answer import Answer
    from molmo_edge.molmo import Molmo, Scene

_HELP = "a question, or: /new forgets the conversation, /save FILE draws the last answer's points, /quit ends"


def chat(
    image: options.Image,
    *,
    model: options.Model = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    max_crops: options.MaxCrops = None,
    threads: options.Threads = None,
    llama: options.Llama = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = None,
    quiet: options.Quiet = False,
) -> None:
    """Ask a photo one question after the other; it is encoded once."""
    sampling: dict[str, Any] = {"temperature": temperature, "seed": seed}
    if max_new_tokens is not None:
        sampling["max_new_tokens"] = max_new_tokens
    molmo, photo = open_molmo(
        image,
        model=model,
        revision=revision,
        device=device,
        precision=precision,
        max_crops=max_crops,
        threads=threads,
        llama=llama,
        quiet=quiet,
    )
    with molmo:
        with progress("looking at the photo", quiet=quiet):
            scene = molmo.encode(photo)
        note(_HELP, quiet=quiet)
        _converse(molmo, scene, image, sampling)


def _converse(molmo: Molmo, scene: Scene, image: Path, sampling: dict[str, Any]) -> None:
    history: list[tuple[str, str]] = []
    last: Answer | None = None
    while (line := _read_line()) is not None:
        try:
            if line == "/quit":
                break
            if line == "/new":
                history.clear()
            elif line.startswith("/save "):
                _save(last, Path(line[len("/save ") :].strip()), image)
            elif line.startswith("/"):
                note(_HELP)
            elif line:
                last = print_stream(molmo.stream(scene, line, history=history, **sampling))
                history.append((line, last.text))
        except MolmoEdgeError as error:  # a bad question ends the question, not the conversation
            note(f"molmo-edge: {error}")


def _read_line() -> str | None:
    """The next line, None at the end. The prompt goes to stderr, where somebody is looking."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def _save(answer: Answer | None, path: Path, image: Path) -> None:
    if answer is None:
        note("nothing was asked yet")
        return
    check_save(path, image)
    save_image(answer.draw(), path)
    note(f"wrote {path}")
