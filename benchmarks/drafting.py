"""Points with and without drafting: equal ids, runs of the decoder that are saved, milliseconds per point.

`python benchmarks/drafting.py MODEL... [--photo FILE...] [--seeds 3] [--threads 2]`

Each MODEL is a bundle or a checkpoint that writes coordinates as text; nano points by grounding tokens, which cannot be
drafted. An ONNX bundle has to be exported with `--drafting`. Every question is asked greedily and with some
seeds at temperature 1, each time with and without drafting in turn. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge import Molmo
from molmo_edge.frontend.prompts import count_question, point_question
from molmo_edge.runtimes.protocol import DRAFT_ROWS

EXAMPLES = Path(__file__).parent.parent / "examples"
LABELS = ("cups", "cats", "eyes", "people")


def answers(path: str, photos: list[Path], seeds: int, threads: int) -> dict[str, Any]:
    """Ask all questions with and without drafting."""
    molmos = {draft: Molmo(path, draft=draft, threads=threads) for draft in (False, True)}
    found: dict[str, Any] = {"model": path, "engine": molmos[True].engine.runtime.engine, "answers": 0, "equal": 0}
    found |= {"points": 0, "tokens": 0, "drafted": 0}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for photo in photos:
        scenes = {draft: molmo.encode(photo) for draft, molmo in molmos.items()}
        for question in (ask(label) for label in LABELS for ask in (point_question, count_question)):
            for seed in range(-1, seeds):
                options = {"temperature": 0.0} if seed < 0 else {"temperature": 1.0, "seed": seed}
                said = {d: m.ask(scenes[d], question, **options) for d, m in molmos.items()}  # type: ignore[arg-type]
                found["answers"] += 1
                found["equal"] += said[False].token_ids == said[True].token_ids
                if said[False].token_ids != said[True].token_ids or not said[True].points:
                    continue
                found["points"] += len(said[True].points)
                found["tokens"] += len(said[True].token_ids)
                found["drafted"] += said[True].usage.tokens.drafted
                for draft, answer in said.items():
                    seconds[draft].append(answer.usage.seconds.decode / len(answer.points))
    if not seconds[True]:
        raise SystemExit(f"{path}: no answer has points and equal ids, so that there is nothing to compare")
    found["ms per point"] = {str(draft): 1e3 * statistics.median(spent) for draft, spent in seconds.items()}
    ratios = [with_ / without for without, with_ in zip(seconds[False], seconds[True], strict=True)]
    found["ratio"] = statistics.median(ratios)
    found |= runs(molmos[True], photos[0])
    for molmo in molmos.values():
        molmo.close()
    return found


def runs(molmo: Molmo, photo: Path, repeat: int = 15) -> dict[str, Any]:
    """The time of a run of n positions over that of a single one, and how far their logits differ."""
    engine, counts = molmo.engine, (1, 2, 4, 8, DRAFT_ROWS)
    runtime: Any = engine.runtime
    text = (
        ' User: Point to the cups. Assistant: <points x1="12.3" y1="4.5" x2="45.6" y2="78.9" alt="cups">cups</points>'
    )
    rows = runtime.embed(np.array(engine.tokenizer.encode(text)))[:DRAFT_ROWS]
    cache = molmo.encode(photo).cache
    assert cache is not None
    start, cache = cache.length, cache.copy()
    single = np.stack([runtime.forward(row[None], cache) for row in rows])
    cache.length = start
    each = runtime.forward_each(rows, cache)
    spent: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(repeat):
        for count in counts:
            cache.length = start
            began = time.perf_counter()
            runtime.forward_each(rows[:count], cache)
            spent[count].append(time.perf_counter() - began)
    base = statistics.median(spent[1])
    times = {count: round(statistics.median(values) / base, 2) for count, values in spent.items()}
    return {"run times": times, "largest difference": float(np.abs(each - single).max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--photo", nargs="+", type=Path, default=[EXAMPLES / "coffee.jpg", EXAMPLES / "cat.jpg"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    results = []
    for path in args.models:
        found = answers(path, args.photo, args.seeds, args.threads)
        results.append(found)
        without, with_ = found["ms per point"]["False"], found["ms per point"]["True"]
        runs_left = found["tokens"] - found["drafted"]
        print(f"{Path(path).name} on {found['engine']}")
        print(f"  {found['equal']} of {found['answers']} answers have equal ids")
        print(f"  {found['points']} points: {found['tokens']} runs without drafting, {runs_left} with")
        print(
            f"  medians: {without:.1f} ms per point without, {with_:.1f} with; ratio of an answer {found['ratio']:.2f}"
        )
        print(f"  a run of n positions takes, in single ones: {found['run times']}")
        print(f"  largest difference of a logit: {found['largest difference']:.3g}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
