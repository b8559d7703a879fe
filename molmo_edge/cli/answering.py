"""What ask, point, count and caption have in common: open, answer, print, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from molmo_edge.cli.opening import open_molmo
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
    revision: str | None,
    device: str,
    precision: str,
    max_crops: int | None,
    threads: int | None,
    llama: str | None,
    max_new_tokens: int | None,
    temperature: float,
    seed: int | None,
    json: bool,
    save: Path | None,
    quiet: bool,
) -> None:
    """Open the model, ask it, print, save."""
    try:
        check_save(save, image)
    except OutputError as error:
        raise typer.BadParameter(str(error)) from None
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
            stream = molmo.stream(photo, question, **sampling)
        answer = stream.answer if json else print_stream(stream)
        if save is not None:
            save_image(answer.draw(), save)
            note(f"wrote {save}" + ("" if answer.points else " (there are no points to draw)"), quiet=quiet)
        if json:
            print_json({"image": str(image), **answer.to_dict(), "saved": None if save is None else str(save)})
        note_usage(answer, quiet=quiet)
