"""Measure the effect of `max_crops` on the time to the first token, pointing and counting.

    python -m benchmarks.crops --photos PHOTOS --limit 60            # the embedded nano
    python -m benchmarks.crops --model BUNDLE --image photo.jpg      # only times, for any bundle

PHOTOS is a directory in the format of `molmo_edge.data.annotated_photos`; every row uses the same photos, those of the
`val` split. Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from molmo_edge import Molmo
from molmo_edge.evaluation.annotated_pictures import Picture, photo_pictures
from molmo_edge.frontend.crops import load_image
from recipes.nano.score_answers import evaluate, picture_case

QUESTION = "Describe this image."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a bundle; default: the embedded nano")
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--limit", type=int, default=60, help="maximum number of photos, sampled evenly")
    parser.add_argument("--image", type=Path, help="time only this image")
    parser.add_argument("--crops", type=int, nargs="+", default=[0, 2, 4, 6, 9, 12])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    cases: list[Picture] = []
    if args.photos:
        photos = list(photo_pictures(args.photos))
        cases = photos[:: max(1, len(photos) // args.limit)][: args.limit]
    images = [load_image(args.image)] if args.image else [case.rgb() for case in cases]
    if not images:
        parser.error("name --photos or --image")
    rows = []
    print(f"{'max_crops':>9} {'crops':>6} {'vision s':>9} {'prefill s':>10} {'first token':>12}  F1     exact counts")
    for most in args.crops:
        with Molmo(args.model, max_crops=most, threads=args.threads) as molmo:
            row = {"max_crops": most, **_times(molmo, images)}
            if cases:
                asked = [picture_case(case, 2) for case in cases]
                row |= _scores(evaluate(molmo, asked, lambda line: print(f"\r{line}", end="", file=sys.stderr)))
        rows.append(row)
        scores = f"{row['f1']:.3f}  {row['exact_counts']:.3f}  n={row['n']}" if cases else ""
        print(
            f"\r{most:>9} {row['crops']:6.1f} {row['vision']:9.3f} {row['prefill']:10.3f} {row['first_token']:12.3f}  "
            f"{scores}"
        )
    base = rows[-1]["first_token"]
    print(json.dumps({"rows": rows, "ratio": {r["max_crops"]: round(base / r["first_token"], 2) for r in rows}}))


def _times(molmo: Molmo, images: list[Any]) -> dict[str, float]:
    """Return medians over the images, after a warm-up."""
    molmo.ask(images[0], QUESTION, max_new_tokens=1)
    usages = [molmo.ask(image, QUESTION, max_new_tokens=1).usage for image in images[:20]]
    seconds = [usage.seconds for usage in usages]
    return {
        "crops": statistics.mean(usage.crops for usage in usages),
        "vision": statistics.median(s.vision for s in seconds),
        "prefill": statistics.median(s.prefill for s in seconds),
        "first_token": statistics.median(s.preprocess + s.vision + s.prefill for s in seconds),
    }


def _scores(report: dict[str, Any]) -> dict[str, float]:
    """Average over all questions of all photo sources."""
    pointing = [group["f1"] for group in report["pointing"].values()]
    counting = [group["exact"] for group in report["counting"].values()]
    n = sum(group["n"] for group in pointing)
    return {
        "n": n,
        "f1": sum(group["value"] * group["n"] for group in pointing) / n,
        "exact_counts": sum(group["value"] * group["n"] for group in counting) / n,
    }


if __name__ == "__main__":
    main()
