"""The whole recipe within a number of hours: the length of each stage follows from the speed of this machine.

A few steps of a stage are timed once, and the resulting number of steps is stored in the run, so that a run that was
interrupted keeps the schedule of its learning rates.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from molmo_edge.data.drawn.sprites import load_assets
from molmo_edge.export.bundle import CheckPhoto, export_bundle
from molmo_edge.frontend.image_files import load_image
from molmo_edge.system.files import atomic_write
from molmo_edge.training.recipe import Recipe
from recipes.nano import score_answers, stages, student
from recipes.nano.head import PICTURES

SHARES = {"sight": 0.35, "answers": 0.5, "student": 0.1}  # of the hours
HEAD = 0.05  # share of the stage "head", most of which computes pictures
PROBE = 12  # steps, or pictures, that are timed; the first one is not counted
CHECK = "Point to the cup."


def train_within(sources: stages.Sources, hours: float, workers: int | None, check: Path) -> Path:
    """Run all stages, export the bundle RUN/bundle, and write RUN/scores.json; returns the bundle.

    check: a photo that is recorded in the bundle, for `molmo-edge verify`. Hours are those of training alone.
    """
    bundle, scores = sources.run / "bundle", sources.run / "scores.json"
    if scores.exists():  # it is written last
        print(f"{scores} exists: the run is complete")
        return bundle
    load_image(check)  # what cannot be read is reported now rather than after hours
    if sources.sprites is not None:
        load_assets(sources.sprites)
    stages.start(sources)
    runs = {"sight": stages.sight, "answers": stages.answers, "student": stages.student}
    for stage, share in SHARES.items():
        run = runs[stage]
        recipe = stages.recipe_of(stage, workers=workers)
        steps = steps_within(sources.run / stage, share * hours, recipe, lambda r, d, run=run: run(sources, r, d))
        run(sources, replace(recipe, steps=steps))
    model = stages.head(sources, pictures_within(sources, HEAD * hours))
    shutil.rmtree(bundle, ignore_errors=True)  # of a run that was interrupted while it was scored
    export_bundle(model, bundle, student.PRECISION, name="nano", check=CheckPhoto(check, CHECK))
    cases = score_answers.photo_cases(sources.photos)
    cases += score_answers.drawn_cases(sources.sprites, 100) if sources.sprites else []
    write_json(scores, score_answers.score(bundle, cases))
    return bundle


def pictures_within(sources: stages.Sources, hours: float) -> int:
    """The number of pictures of the stage "head" that can be computed in `hours`: stored, or else timed."""
    plan = sources.run / "head" / "pictures.json"
    if (known := planned(plan, "pictures", hours)) is not None:
        return known
    probe = sources.run / "head-probe"
    shutil.rmtree(probe, ignore_errors=True)  # of an interrupted probe, whose pictures would take no time
    seconds = statistics.mean(stages.head_pictures(sources, PROBE, probe).seconds[1:])
    shutil.rmtree(probe)
    pictures = min(PICTURES, max(PROBE, round(hours * 3600 / seconds)))
    write_json(plan, {"pictures": pictures, "hours": hours, "seconds_per_picture": seconds})
    return pictures


def steps_within(directory: Path, hours: float, recipe: Recipe, train: Callable[[Recipe, Path], object]) -> int:
    """The number of steps of a stage that fit into `hours`: stored in `directory`, or else timed with `train`."""
    plan = directory / "steps.json"
    if (known := planned(plan, "steps", hours)) is not None:
        return known
    probe = directory.with_name(f"{directory.name}-probe")
    shutil.rmtree(probe, ignore_errors=True)
    train(replace(recipe, steps=PROBE, validation_batches=1), probe)
    lines = [json.loads(line) for line in (probe / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = next(line["seconds_per_step"] for line in reversed(lines) if "seconds_per_step" in line)
    shutil.rmtree(probe)
    steps = max(1, round(hours * 3600 / seconds))
    write_json(plan, {"steps": steps, "hours": hours, "seconds_per_step": seconds})
    return steps


def planned(plan: Path, unit: str, hours: float) -> int | None:
    """The length of a stage, in `unit`, that an earlier run of the command stored in `plan`."""
    if not plan.exists():
        return None
    known = json.loads(plan.read_text(encoding="utf-8"))
    if known["hours"] != hours:
        print(f"{plan}: the stage keeps its length of {known[unit]} {unit}, planned for {known['hours']:.3g} hours")
    return int(known[unit])


def write_json(file: Path, content: object) -> None:
    """Write a file that is complete if it exists."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
