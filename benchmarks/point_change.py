"""The change of the points' F1 between models, on as many drawn scenes as an interval takes.

    python benchmarks/point_change.py REFERENCE CANDIDATE... --out FILE [--first 0] [--end 2600] [--threads 1]

Each model is asked to point at every name in a scene. The answers' F1 is appended to FILE scene by scene, so that a
run can be interrupted and continued; the table is that of all scenes in FILE. Files of several processes, with scenes
of their own (--first, --end), can be joined with `cat`. The scenes are drawn from the sprites of the package, and are
not those of the suite nano-val. `molmo-edge loss` measures more about fewer questions: it keeps the logits of
each answer, which would be 60 GB here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from molmo_edge import Molmo
from molmo_edge.evaluation.annotated_pictures import drawn_pictures, embedded_sprites
from molmo_edge.evaluation.pointing import score_points
from molmo_edge.evaluation.stats import mean

SEED = 2027


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="the reference, then the candidates")
    parser.add_argument("--out", type=Path, required=True, help="one line of JSON per question; may exist")
    parser.add_argument("--first", type=int, default=0, help="the first scene, if FILE has none yet")
    parser.add_argument("--end", type=int, default=2600, help="the scene after the last")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    names = [path.name for path in args.models]
    first = 1 + max((row["scene"] for row in _read(args.out, names)), default=args.first - 1)
    ask(args.models, args.out, first, args.end, args.threads)
    report(_read(args.out, names), names)


def _read(file: Path, names: list[str]) -> list[dict]:
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if rows and list(rows[0]["f1"]) != names:
        raise SystemExit(f"{file} has answers of {', '.join(rows[0]['f1'])}: choose another --out")
    return rows


def ask(models: list[Path], out: Path, first: int, end: int, threads: int | None) -> None:
    """Append a line for each question about the scenes `first` to `end - 1`; the lines of one scene at once."""
    opened = {path.name: Molmo(path, threads=threads) for path in models} if first < end else {}
    assets = embedded_sprites()
    for scene in range(first, end):
        (picture,) = drawn_pictures(assets, 1, "sprites", SEED, first=scene)
        labels = dict(picture.labels())
        f1: dict[str, dict[str, float]] = {label: {} for label in labels}
        for name, molmo in opened.items():
            encoded = molmo.encode(picture.rgb())
            for label, boxes in labels.items():
                f1[label][name] = score_points(molmo.point(encoded, label).points, boxes).f1
        lines = [json.dumps({"scene": scene, "label": label, "f1": scores}) for label, scores in f1.items()]
        with out.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))


def report(rows: list[dict], names: list[str]) -> None:
    scenes = [row["scene"] for row in rows]
    print(f"{len(rows)} questions about {len(set(scenes))} scenes; F1 in percent, intervals of 95 % resampled by scene")
    for name in names:
        found = mean([100 * row["f1"][name] for row in rows], scenes)
        change = mean([100 * (row["f1"][name] - row["f1"][names[0]]) for row in rows], scenes)
        changed = sum(row["f1"][name] != row["f1"][names[0]] for row in rows) / max(1, len(rows))
        print(
            f"{name}: {found.format('{:.2f}'.format)}, change {change.format('{:+.2f}'.format)}, "
            f"{100 * changed:.1f} % of the answers have another F1, "
            f"{change.samples_for(0.5)} questions for half a point on each side"
        )


if __name__ == "__main__":
    main()
