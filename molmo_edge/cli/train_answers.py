"""`molmo-edge train answers`: a data set whose answers a teacher writes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from molmo_edge.cli.open_model import find_model
from molmo_edge.cli.output import note
from molmo_edge.cli.train_sets import DataOptions
from molmo_edge.sdk.readable_text import counted

_EVERY = 100  # pictures between two messages


def answers(
    *,
    teacher: Annotated[str, typer.Option(help="Model that answers: bundle, checkpoint or hub id.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Folder of the data sets with the questions.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the answers; an existing one is continued.", show_default=False)],
    sets: Annotated[
        str | None, typer.Option(help="Data sets, separated by commas. Default: those of the mixture in --data.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures of each data set.")] = 1000,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy; above, answers are sampled.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the most likely tokens of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the questions and of sampling.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longer answers are left out.")] = 448,
    device: Annotated[str, typer.Option(help='"auto", "cpu" or "cuda".')] = "auto",
) -> None:
    """Let a teacher answer the questions of data sets; `distill --answers` trains a student on its answers."""
    from molmo_edge.checkpoints.identity import model_identity
    from molmo_edge.molmo import Molmo
    from molmo_edge.training.recipe import recipe_for
    from molmo_edge.training.teacher_answers import AnswerSettings, write_answers

    chosen = DataOptions(sets=sets)
    opened = chosen.open(chosen.choose(recipe_for("multitask")), data)
    directory = find_model(teacher, revision=None, quiet=False)
    settings = AnswerSettings(max_new_tokens, temperature, top_p, seed)

    def progress(done: int) -> None:
        if done % _EVERY == 0:
            note(f"{counted(done, 'picture')} done")

    model = Molmo(directory, device=device)
    found = write_answers(
        model, model_identity(directory), opened.sets, out, pictures=pictures, settings=settings, progress=progress
    )
    rest = f"; {found.left_out} left out (too long, or not usable)" if found.left_out else ""
    note(f"wrote {counted(found.answers, 'answer')} to {out}, which had {found.known} of these before{rest}")
