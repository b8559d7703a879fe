"""The whole recipe within a number of hours: the length of each stage follows from the speed of this machine.

A few steps of a stage are timed once, and the resulting number of steps is stored in the run, so that a run that was
interrupted keeps the schedule of its learning rates.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from molmo_edge.export.bundle import CheckPhoto, export_bundle
from molmo_edge.training.recipe import Recipe
from recipes.nano import score_answers, stages, student
from recipes.nano.head import PICTURES

SHARES = {"sight": 0.35, "answers": 0.5, "student": 0.1}  # of the hours
HEAD = 0.05  # share of the stage "head", most of which computes pictures
PROBE = 12  # steps that are timed; the first one is not counted
CHECK = "Point to the cup."


def train_within(sources: stages.Sources, hours: float, workers: int | None, check: Path) -> Path:
    """Run all stages, export the bundle RUN/bundle, and write RUN/scores.json; returns the bundle.

    check: a photo that is recorded in the bundle, for `molmo-edge verify`. Hours are those of training alone.
    """
    stages.start(sources)
    runs = {"sight": stages.sight, "answers": stages.answers, "student": stages.student}
    for stage, share in SHARES.items():
        run = runs[stage]
        recipe = stages.recipe_of(stage, workers=workers)
        steps = steps_within(sources.run / stage, share * hours, recipe, lambda r, d, run=run: run(sources, r, d))
        run(sources, replace(recipe, steps=steps))
    model = stages.head(sources, pictures_within(sources, HEAD * hours))
    bundle = sources.run / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)  # of an earlier run of this command
    export_bundle(model, bundle, student.PRECISION, name="nano", check=CheckPhoto(check, CHECK))
    cases = score_answers.photo_cases(sources.photos)
    cases += score_answers.drawn_cases(sources.sprites, 100) if sources.sprites else []
    scores = json.dumps(score_answers.score(bundle, cases), indent=1)
    (sources.run / "scores.json").write_text(scores + "\n", encoding="utf-8")
    return bundle


def pictures_within(sources: stages.Sources, hours: float) -> int:
    """The number of pictures of the stage "head" that can be computed in `hours`: stored, or else timed."""
    stored = sources.run / "head" / "pictures.json"
    if not stored.exists():
        probe = sources.run / "head-probe"
        shutil.rmtree(probe, ignore_errors=True)  # of an interrupted probe, whose pictures would take no time
        began = time.monotonic()
        stages.head_pictures(sources, PROBE, probe)
        pictures = min(PICTURES, max(PROBE, round(hours * 3600 * PROBE / (time.monotonic() - began))))
        shutil.rmtree(probe)
        stored.parent.mkdir(parents=True, exist_ok=True)
        stored.write_text(json.dumps(pictures) + "\n", encoding="utf-8")
    return int(json.loads(stored.read_text(encoding="utf-8")))


def steps_within(directory: Path, hours: float, recipe: Recipe, train: Callable[[Recipe, Path], object]) -> int:
    """The number of steps of a stage that fit into `hours`: stored in `directory`, or else timed with `train`."""
    stored = directory / "steps.json"
    if stored.exists():
        known = json.loads(stored.read_text(encoding="utf-8"))
        if known["hours"] != hours:
            planned = f"planned for {known['hours']:.3g} hours"
            print(f"{stored}: the stage keeps its length of {known['steps']} steps, {planned}")
        return int(known["steps"])
    probe = directory.with_name(f"{directory.name}-probe")
    shutil.rmtree(probe, ignore_errors=True)
    train(replace(recipe, steps=PROBE, validate_every=PROBE + 1, save_every=PROBE + 1), probe)
    lines = [json.loads(line) for line in (probe / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = next(line["seconds_per_step"] for line in reversed(lines) if "seconds_per_step" in line)
    shutil.rmtree(probe)
    steps = max(1, round(hours * 3600 / seconds))
    directory.mkdir(parents=True, exist_ok=True)
    stored.write_text(
        json.dumps({"steps": steps, "hours": hours, "seconds_per_step": seconds}) + "\n", encoding="utf-8"
    )
    return steps
