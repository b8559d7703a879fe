"""The whole recipe within a number of hours: the length of each stage follows from the speed of this machine.

A few steps of a stage are timed once, and the resulting number of steps is stored in the run, so that a run that was
interrupted keeps the schedule of its learning rates.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from molmo_edge.export.bundle import CheckPhoto, export_bundle
from molmo_edge.training.recipe import Recipe
from recipes.nano import score_answers, stages, student

SHARES = {"sight": 0.35, "answers": 0.5, "student": 0.15}  # of the hours
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
        model = run(sources, replace(recipe, steps=steps))
    bundle = sources.run / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)  # of an earlier run of this command
    export_bundle(model, bundle, student.PRECISION, name="nano", check=CheckPhoto(check, CHECK))
    cases = score_answers.photo_cases(sources.photos)
    cases += score_answers.drawn_cases(sources.sprites, 100) if sources.sprites else []
    scores = json.dumps(score_answers.score(bundle, cases), indent=1)
    (sources.run / "scores.json").write_text(scores + "\n", encoding="utf-8")
    return bundle


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
