"""Answer a question about many images into a CSV table, with a progress bar; continue an interrupted run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from molmo_edge.cli.answer_table import AnswerTable, Run, open_table
from molmo_edge.cli.bars import bars
from molmo_edge.cli.open_model import open_molmo
from molmo_edge.cli.options import ModelOptions, OutputOptions, SamplingOptions, VideoOptions
from molmo_edge.cli.output import note, print_json
from molmo_edge.cli.pictures import PictureError, open_picture, report_problem
from molmo_edge.cli.saving import save_image
from molmo_edge.sdk.readable_text import counted

if TYPE_CHECKING:
    from molmo_edge.molmo import Molmo

# Options that are not in the table's `options`.
_SAME_ANSWERS = ("model", "revision", "device", "threads", "llama", "yes", "scene_cache", "scene_cache_size")


def answer_folder(
    pictures: Sequence[Path],
    saves: Sequence[Path | None],
    question: str,
    model: ModelOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
    video: VideoOptions,
) -> None:
    """Answer `question` about each image into the table `output.csv`; skip images that it has answers for.

    An image that cannot be read, or about which no answer can be given, is reported and has a row with the error; the
    exit status is 1 at the end. Raises OutputError if the table cannot be written.
    """
    from molmo_edge.sdk.engine import check_text

    assert output.csv is not None
    check_text(question)
    targets = dict(zip(pictures, saves, strict=True))  # each picture once
    run = Run(question, _name(model), _differing(model, sampling, video))
    table = open_table(output.csv, list(targets), run, saves=list(targets.values()))
    left = {picture: save for picture, save in targets.items() if picture not in table.done}
    tally = {"answered": 0, "failed": 0}
    try:
        _answer_left(left, question, model, sampling, output, video, table, tally)
    except KeyboardInterrupt:
        done = len(table.done) + tally["answered"]
        note(f"interrupted after {done} of {len(targets)}: run the command again to continue", quiet=output.quiet)
        raise
    before = f", {len(table.done)} done before" if table.done else ""
    failed = f", {tally['failed']} failed" if tally["failed"] else ""
    summary = f"{counted(len(targets), 'picture')}: {tally['answered']} answered{failed}{before}; wrote {output.csv}"
    note(summary, quiet=output.quiet)
    if failed:
        raise typer.Exit(1)


def _answer_left(
    left: dict[Path, Path | None],
    question: str,
    model: ModelOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
    video: VideoOptions,
    table: AnswerTable,
    tally: dict[str, int],
) -> None:
    from molmo_edge.frontend.image_files import ImageError
    from molmo_edge.frontend.video_files import VideoError

    opened: dict[Path, Any] = {}  # input of the model
    for picture in left:
        try:
            opened[picture] = open_picture(picture, video.keywords())
        except (ImageError, PictureError, VideoError) as error:
            table.add_failure(picture, report_problem(picture, error, json=output.json))
            tally["failed"] += 1
    if not opened:  # then no model is opened
        return
    with open_molmo(model, quiet=output.quiet) as molmo, bars(quiet=output.quiet) as bar:
        check_question(molmo, question, sampling.keywords())
        advance = bar("answering", len(left) + len(table.done), len(table.done) + tally["failed"])
        for picture, photo in opened.items():
            answered = _answer(molmo, picture, photo, left[picture], question, sampling, output, table)
            tally["answered" if answered else "failed"] += 1
            advance()


def _answer(
    molmo: Molmo,
    picture: Path,
    photo: Any,
    save: Path | None,
    question: str,
    sampling: SamplingOptions,
    output: OutputOptions,
    table: AnswerTable,
) -> bool:
    """Answer about one picture, and save and print the answer. Returns False if there is none."""
    from molmo_edge.frontend.image_files import ImageError
    from molmo_edge.frontend.video_files import VideoError
    from molmo_edge.frontend.visual_prompt import UnsupportedInputError
    from molmo_edge.runtimes.generate import GenerationError
    from molmo_edge.sdk.engine import QuestionError

    try:
        answer = molmo.ask(photo, question, **sampling.keywords())
    except (ImageError, VideoError, UnsupportedInputError, QuestionError, GenerationError) as error:
        table.add_failure(picture, report_problem(picture, error, json=output.json))
        return False
    if save is not None:
        save_image(answer.draw(), save)
    table.add(picture, answer, save)
    if output.json:
        print_json({"image": str(picture), **answer.to_dict(), "saved": None if save is None else str(save)})
    return True


def check_question(molmo: Molmo, question: str, sampled: Mapping[str, Any]) -> None:
    """Raise QuestionError for an invalid question or form of the answer. `sampled`: keywords of `Molmo.ask`."""
    from molmo_edge.sdk.answer_form import answer_form
    from molmo_edge.sdk.engine import check_text

    check_text(question)
    answer_form(molmo.engine, sampled.get("schema"), sampled.get("regex"), sampled.get("choices"))


def _name(model: ModelOptions) -> str:
    name = model.model or "nano"
    return name if model.revision is None else f"{name}@{model.revision}"


def _differing(*groups: ModelOptions | SamplingOptions | VideoOptions) -> str:
    """The options on which answers depend that differ from their defaults: "max_crops=4 seed=1"."""
    return " ".join(
        f"{field.name}={value}"
        for group in groups
        for field in dataclasses.fields(group)
        if (value := getattr(group, field.name)) != field.default and field.name not in _SAME_ANSWERS
    )
