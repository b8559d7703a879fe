"""What ask, point, count and caption have in common: open, answer, print, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from molmo_edge.cli.output import (
    OutputError,
    check_save,
    note,
    note_usage,
    print_json,
    print_stream,
    progress,
    save_image,
)


def answer_command(
    image: Path,
    question: str,
    *,
    model: str | None,
    device: str,
    max_crops: int | None,
    threads: int | None,
    max_new_tokens: int | None,
    temperature: float,
    seed: int | None,
    json: bool,
    save: Path | None,
    quiet: bool,
) -> None:
    """Open the model, ask it, print, save. Modules that bring numpy are imported here, not to show a --help."""
    try:
        check_save(save, image)
    except OutputError as error:
        raise typer.BadParameter(str(error)) from None
    sampling: dict[str, Any] = {"temperature": temperature, "seed": seed}
    if max_new_tokens is not None:
        sampling["max_new_tokens"] = max_new_tokens
    with progress("opening the model", quiet=quiet):
        from molmo_edge.loading import load_image
        from molmo_edge.molmo import Molmo

        photo = image if image.is_file() else load_image(image)  # what is no file is found out before a model opens
        molmo = Molmo(model, device=device, max_crops=max_crops, threads=threads)
    with molmo:
        with progress("looking at the photo", quiet=quiet):
            stream = molmo.stream(photo, question, **sampling)
        answer = stream.answer if json else print_stream(stream)
        if save is not None:
            save_image(answer.draw(), save)
            note(f"wrote {save}" + ("" if answer.points else " (there are no points to draw)"), quiet=quiet)
        if json:
            print_json({"image": str(image), **answer.to_dict(), "saved": None if save is None else str(save)})
        note_usage(answer, quiet=quiet)
