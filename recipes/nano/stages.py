"""The stages of the recipe. Each continues where it was stopped, and writes below the directory of the run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.nano.errors import NotTrainedError

if TYPE_CHECKING:
    from molmo_edge.training.recipe import Recipe
    from recipes.nano.head import Pictures


@dataclass(frozen=True)
class Sources:
    """Where a run and what it is made from are. `python -m recipes.nano --help` describes the files."""

    run: Path
    photos: tuple[Path, ...]
    vit: Path | None = None
    lm: Path | None = None
    detector: Path | None = None
    sprites: Path | None = None

    @property
    def start(self) -> Path:
        """The checkpoint that training starts from."""
        return self.run / "start"


def recipe_of(stage: str, steps: int | None = None, workers: int | None = None) -> Recipe:
    """The recipe of "sight", "answers" or "student" on this machine."""
    from recipes.nano import answers, sight, student

    recipes = {"sight": sight.RECIPE, "answers": answers.RECIPE, "student": student.RECIPE}
    recipe = recipes[stage]
    changed = {name: value for name, value in (("steps", steps), ("workers", workers)) if value is not None}
    return replace(recipe, precision=sight.precision(), **changed)  # type: ignore[arg-type]


def start(sources: Sources) -> None:
    """Put the starting checkpoint together, unless it exists."""
    from recipes.nano.photos import read
    from recipes.nano.start import make_start

    if (sources.start / "config.json").exists():
        return
    assert sources.vit is not None
    assert sources.lm is not None
    assert sources.detector is not None
    photos = read(list(sources.photos), "train")
    make_start(sources.vit, sources.lm, sources.detector, photos[:: max(1, len(photos) // 64)], sources.start)


def sight(sources: Sources, recipe: Recipe, directory: Path | None = None) -> Path:
    """Train the connector on heat maps, in `directory`, by default RUN/sight; returns the checkpoint."""
    from recipes.nano import sight as stage

    return stage.train(sources.start, sources.photos, directory or sources.run / "sight", recipe)


def answers(sources: Sources, recipe: Recipe, directory: Path | None = None, *, digits: bool = False) -> Path:
    """Train the model that "sight" ends with to answer, in `directory`, by default RUN/answers; returns the checkpoint.

    digits: write coordinates as text, in RUN/answers-digits, instead of pointing by grounding tokens.
    """
    from molmo_edge.training.run_checkpoints import CHECKPOINTS
    from recipes.nano import answers as stage
    from recipes.nano import asked_pictures, pointing

    before = sources.run / "sight"
    directory = directory or sources.run / ("answers-digits" if digits else "answers")
    data, validation = asked_pictures.asked_pictures(sources.photos, sources.sprites)
    first, heat_maps = before / "model", before / pointing.HEAT_MAPS
    if digits:
        recipe = stage.in_digits(recipe)
        data, validation = (replace(one, empty_tags=False) for one in (data, validation))
    else:
        first = directory / "start"
        if not any((directory / CHECKPOINTS).glob("step-*")):  # "sight" may have been trained further
            some = data.photos[:: max(1, len(data.photos) // 64)]
            pointing.add_point_head(before / "model", heat_maps, some, first)
    return stage.train(first, heat_maps, data, validation, directory, recipe)


def student(sources: Sources, recipe: Recipe, directory: Path | None = None) -> Path:
    """Distill the model that "answers" ends with, in `directory`, by default RUN/student; returns the checkpoint."""
    from recipes.nano import student as stage
    from recipes.nano.asked_pictures import asked_pictures

    teacher = sources.run / "answers" / "model"
    data, validation = asked_pictures(sources.photos, sources.sprites)
    return stage.train(teacher, data, validation, directory or sources.run / "student", recipe)


def head(sources: Sources, pictures: int | None = None) -> Path:
    """Add votes to the model that the last of "answers" and "student" ended with; returns the checkpoint.

    pictures: how many the votes are fitted on.
    """
    from recipes.nano import head as stage
    from recipes.nano.detector import score_layers

    assert sources.detector is not None
    before, run = before_head(sources), sources.run / "head"
    files = head_pictures(sources, pictures or stage.PICTURES, run).files
    return stage.add_votes(before, score_layers(sources.detector), files, run, stage.Fit())


def head_pictures(sources: Sources, pictures: int, directory: Path) -> Pictures:
    """Compute pictures for "head" in `directory`."""
    from recipes.nano import head as stage
    from recipes.nano import sight
    from recipes.nano.asked_pictures import asked_pictures

    data, _ = asked_pictures(sources.photos, sources.sprites)
    return stage.read_pictures(before_head(sources), data, directory, pictures, sight.precision())


def before_head(sources: Sources) -> Path:
    """The checkpoint that "head" begins with. Raises NotTrainedError if there is none."""
    for stage in ("student", "answers"):
        if (model := sources.run / stage / "model").exists():
            return model
    raise NotTrainedError(f'{sources.run} has no model of the stages "answers" or "student": run one of them first')
