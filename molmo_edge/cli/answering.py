"""The body of ask, point, count and caption: open the images and the model, then answer, print and save."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from molmo_edge.cli.open_model import open_molmo
from molmo_edge.cli.options import ModelOptions, OutputOptions, SamplingOptions
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
from molmo_edge.cli.streams import print_error
from molmo_edge.errors import MolmoEdgeError

if TYPE_CHECKING:
    from molmo_edge.sdk.streaming import Stream


def answer_command(
    images: Sequence[Path],
    question: str,
    model: ModelOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
) -> None:
    """Answer `question` about each image and print each answer as it is generated.

    With several images, an unreadable image is reported in its place, and the exit status is 1 at the end.
    A single image that cannot be read is an error.
    """
    quiet = output.quiet
    pictures, several = find_pictures(images)
    try:
        if several:
            saves = save_paths(output.save, pictures)
        else:
            check_save(output.save, pictures[0])
            saves = [output.save]
    except OutputError as error:
        raise typer.BadParameter(str(error)) from None
    if (warning := sampling.warning) is not None:
        note(warning, quiet=quiet)
    with progress("opening the photo", quiet=quiet):
        from molmo_edge.frontend.image_files import ImageError

        opened: list[Any] = []  # input of the model, or the error that prevents it
        for picture in pictures:
            try:
                opened.append(open_picture(picture))
            except (ImageError, PictureError) as error:
                if not several:
                    raise
                opened.append(error)
    if all(isinstance(photo, MolmoEdgeError) for photo in opened):  # then no model is opened
        for picture, problem in zip(pictures, opened, strict=True):
            _report(picture, problem, json=output.json)
        raise typer.Exit(1)
    from molmo_edge.runtimes.generate import GenerationError
    from molmo_edge.sdk.engine import QuestionError, check_text

    failed = False
    with open_molmo(model, quiet=quiet) as molmo:
        check_text(question)  # once for all images
        for number, (picture, photo, path) in enumerate(zip(pictures, opened, saves, strict=True)):
            try:
                if isinstance(photo, MolmoEdgeError):
                    raise photo
                with progress(f"encoding {picture.name}" if several else "encoding the photo", quiet=quiet):
                    stream = molmo.stream(photo, question, **sampling.keywords())
                if several and not output.json:
                    print(f"{picture}:", flush=True)
                _answer(picture, stream, json=output.json, save=path, quiet=quiet, first=number == 0)
            except (ImageError, PictureError, QuestionError, GenerationError) as error:
                if not several:
                    raise
                failed = True
                _report(picture, error, json=output.json)
    if failed:
        raise typer.Exit(1)


def _report(picture: Path, error: MolmoEdgeError, *, json: bool) -> None:
    """Print why there is no answer for one of several images."""
    text = " ".join(str(error).split())
    if json:
        print_json({"image": str(picture), "error": text})
    print_error(text if str(picture) in text else f"{picture}: {text}")


def _answer(picture: Path, stream: Stream, *, json: bool, save: Path | None, quiet: bool, first: bool) -> None:
    """Print and save one answer, and print what it took."""
    answer = stream.answer if json else print_stream(stream)
    if save is not None:
        save_image(answer.draw(), save)
        note(f"wrote {save}" + ("" if answer.points else " (without points: the answer has none)"), quiet=quiet)
    if json:
        print_json({"image": str(picture), **answer.to_dict(), "saved": None if save is None else str(save)})
    if not first:  # the loading time belongs to the first answer
        spent = dataclasses.replace(answer.usage.seconds, load=0.0)
        answer = dataclasses.replace(answer, usage=dataclasses.replace(answer.usage, seconds=spent))
    note_usage(answer, quiet=quiet)
