"""The body of ask, point, count and caption: open the images and the model, then answer, print and save."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from molmo_edge.cli.answer_folder import answer_folder, check_question
from molmo_edge.cli.answer_table import check_table
from molmo_edge.cli.open_model import open_molmo
from molmo_edge.cli.options import ModelOptions, OutputOptions, SamplingOptions, VideoOptions
from molmo_edge.cli.output import (
    OutputError,
    note,
    note_usage,
    print_json,
    print_stream,
    progress,
)
from molmo_edge.cli.pictures import PictureError, find_pictures, is_video, open_picture, report_problem
from molmo_edge.cli.saving import check_save_together, save_answer, save_paths
from molmo_edge.errors import MolmoEdgeError

if TYPE_CHECKING:
    from molmo_edge.sdk.streaming import Stream


def answer_command(
    images: Sequence[Path],
    question: str,
    model: ModelOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
    video: VideoOptions,
    *,
    together: bool = False,
) -> None:
    """Answer `question` about each image or video, or about all of them `together`; print each answer as it comes.

    With several images, an unreadable image is reported in its place, and the exit status is 1 at the end.
    A single image that cannot be read is an error, and so is one of several that belong together.
    """
    quiet, sampled = output.quiet, sampling.keywords()
    pictures, several = find_pictures(images)
    groups = [pictures] if together else [[picture] for picture in pictures]
    several = several and not together
    try:
        saves = _save_paths(output, pictures, several=several, together=together)
    except OutputError as error:
        raise typer.BadParameter(str(error)) from None
    if (warning := sampling.warning) is not None:
        note(warning, quiet=quiet)
    if output.csv is not None:
        answer_folder(pictures, saves, question, model, sampling, output, video)
        return
    with progress("opening the photo", quiet=quiet):
        from molmo_edge.frontend.image_files import ImageError
        from molmo_edge.frontend.video_files import VideoError

        opened: list[Any] = []  # input of the model, or the error that prevents it
        for picture in pictures:
            try:
                opened.append(open_picture(picture, video.keywords()))
            except (ImageError, PictureError, VideoError) as error:
                if not several:
                    raise
                opened.append(error)
    if all(isinstance(photo, MolmoEdgeError) for photo in opened):  # then no model is opened
        for picture, problem in zip(pictures, opened, strict=True):
            report_problem(picture, problem, json=output.json)
        raise typer.Exit(1)
    from molmo_edge.frontend.visual_prompt import UnsupportedInputError
    from molmo_edge.runtimes.generate import GenerationError
    from molmo_edge.sdk.engine import QuestionError

    skipped = (ImageError, PictureError, VideoError, UnsupportedInputError, QuestionError, GenerationError)
    asked = [opened] if together and len(opened) > 1 else opened

    failed = False
    with open_molmo(model, quiet=quiet) as molmo:
        check_question(molmo, question, sampled)  # once for all images
        for number, (group, photo, path) in enumerate(zip(groups, asked, saves, strict=True)):
            picture = group[0]
            try:
                if isinstance(photo, MolmoEdgeError):
                    raise photo
                with progress(f"encoding {picture.name}" if several else f"encoding the {_kind(group)}", quiet=quiet):
                    stream = molmo.stream(photo, question, **sampled)
                if several and not output.json:
                    print(f"{picture}:", flush=True)
                _answer(group, stream, json=output.json, save=path, quiet=quiet, first=number == 0)
            except skipped as error:
                if not several:
                    raise
                failed = True
                report_problem(picture, error, json=output.json)
    if failed:
        raise typer.Exit(1)


def _save_paths(output: OutputOptions, pictures: Sequence[Path], *, several: bool, together: bool) -> list[Path | None]:
    """The file or folder for the drawn pictures of each question. Raises OutputError for what cannot be written."""
    if output.csv is not None:
        if together:
            raise OutputError("--csv has the answers about each picture: it cannot be used with --together")
        check_table(output.csv, pictures)
    if output.save_dir is not None:
        if output.save is not None:
            raise OutputError("--save and --save-dir name two places: use one of them")
        drawn = save_paths(output.save_dir, pictures, option="--save-dir")
        return [output.save_dir] if together else drawn
    if several:
        return save_paths(output.save, pictures)
    check_save_together(output.save, pictures)
    return [output.save]


def _kind(group: Sequence[Path]) -> str:
    return "photos" if len(group) > 1 else "video" if is_video(group[0]) else "photo"


def _answer(group: Sequence[Path], stream: Stream, *, json: bool, save: Path | None, quiet: bool, first: bool) -> None:
    """Print and save one answer about the pictures in `group`, and print what it took."""
    answer = stream.answer if json else print_stream(stream)
    if save is not None:
        for path in save_answer(answer, save, group):
            note(f"wrote {path}" + ("" if answer.points else " (without points: the answer has none)"), quiet=quiet)
    if json:
        images = {"images": [str(picture) for picture in group]} if len(group) > 1 else {}
        times = {} if answer.times is None else {"times": [round(time, 3) for time in answer.times]}
        saved = None if save is None else str(save)
        print_json({"image": str(group[0]), **images, **times, **answer.to_dict(), "saved": saved})
    if not first:  # the loading time belongs to the first answer
        spent = dataclasses.replace(answer.usage.seconds, load=0.0)
        answer = dataclasses.replace(answer, usage=dataclasses.replace(answer.usage, seconds=spent))
    note_usage(answer, quiet=quiet)
