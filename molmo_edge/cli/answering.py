"""What ask, point, count and caption have in common: open, answer one image after the other, print, save."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from molmo_edge.cli.open_model import open_molmo
from molmo_edge.cli.options import Opening, Sampling
from molmo_edge.cli.output import (
    OutputError,
    check_save,
    note,
    note_usage,
    print_json,
    print_stream,
    progress,
    save_image,
    save_paths,
)
from molmo_edge.cli.pictures import PictureError, find_pictures, open_picture
from molmo_edge.cli.streams import complain
from molmo_edge.errors import MolmoEdgeError

if TYPE_CHECKING:
    from molmo_edge.sdk.streaming import Stream


def answer_command(
    images: Sequence[Path],
    question: str,
    opening: Opening,
    sampling: Sampling,
    *,
    json: bool,
    save: Path | None,
    quiet: bool,
) -> None:
    """One answer for each image, printed as it comes.

    Of several images one that cannot be read is reported at its place, and the exit status is 1 at the end. One image
    that cannot be read is an error.
    """
    pictures, several = find_pictures(images)
    try:
        if several:
            saves = save_paths(save, pictures)
        else:
            check_save(save, pictures[0])
            saves = [save]
    except OutputError as error:
        raise typer.BadParameter(str(error)) from None
    if (advice := sampling.without_effect) is not None:
        note(advice, quiet=quiet)
    with progress("opening the photo", quiet=quiet):
        from molmo_edge.frontend.image_files import ImageError

        opened: list[Any] = []  # what to give to the model, or why it cannot be had
        for picture in pictures:
            try:
                opened.append(open_picture(picture))
            except (ImageError, PictureError) as error:
                if not several:
                    raise
                opened.append(error)
    if all(isinstance(photo, MolmoEdgeError) for photo in opened):  # no model is opened for nothing
        for picture, problem in zip(pictures, opened, strict=True):
            _report(picture, problem, json=json)
        raise typer.Exit(1)
    from molmo_edge.runtimes.generate import GenerationError
    from molmo_edge.sdk.engine import QuestionError, check_text

    failed = False
    with open_molmo(opening, quiet=quiet) as molmo:
        check_text(question)  # once: it is not the pictures' fault
        for number, (picture, photo, path) in enumerate(zip(pictures, opened, saves, strict=True)):
            try:
                if isinstance(photo, MolmoEdgeError):
                    raise photo
                with progress(f"looking at {picture.name}" if several else "looking at the photo", quiet=quiet):
                    stream = molmo.stream(photo, question, **sampling.keywords())
                if several and not json:
                    print(f"{picture}:", flush=True)
                _answer(picture, stream, json=json, save=path, quiet=quiet, first=number == 0)
            except (ImageError, PictureError, QuestionError, GenerationError) as error:
                if not several:
                    raise
                failed = True
                _report(picture, error, json=json)
    if failed:
        raise typer.Exit(1)


def _report(picture: Path, error: MolmoEdgeError, *, json: bool) -> None:
    """An image that cannot be read, at its place among several."""
    says = " ".join(str(error).split())
    if json:
        print_json({"image": str(picture), "error": says})
    complain(says if str(picture) in says else f"{picture}: {says}")


def _answer(picture: Path, stream: Stream, *, json: bool, save: Path | None, quiet: bool, first: bool) -> None:
    """Print, save, and say what it took."""
    answer = stream.answer if json else print_stream(stream)
    if save is not None:
        save_image(answer.draw(), save)
        note(f"wrote {save}" + ("" if answer.points else " (there are no points to draw)"), quiet=quiet)
    if json:
        print_json({"image": str(picture), **answer.to_dict(), "saved": None if save is None else str(save)})
    if not first:  # the model was open already
        spent = dataclasses.replace(answer.usage.seconds, load=0.0)
        answer = dataclasses.replace(answer, usage=dataclasses.replace(answer.usage, seconds=spent))
    note_usage(answer, quiet=quiet)
