"""Time to the first token about a photo: asked for the first time, again, from a saved scene, and in a conversation.

`python benchmarks/sessions.py [--model DIR] [--photo FILE] [--runs 5] [--threads 2]` prints the best of the runs,
because other programs only add time, and, last, one line of JSON with all runs. The saved scene is loaded in a new
process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from molmo_edge import Molmo

QUESTION = "How many cups are there?"
TURNS = 10
CHILD = """
import json, sys, time
from molmo_edge import Molmo
molmo = Molmo(sys.argv[1] or None, threads=int(sys.argv[3]) or None)
list(molmo.stream(sys.argv[5], "What is this?", max_new_tokens=2))  # loads the model
times = []
for _ in range(int(sys.argv[4])):
    began = time.perf_counter()
    scene = molmo.load_scene(sys.argv[2])
    stream = molmo.stream(scene, "How many cups are there?")
    next(stream)
    times.append(time.perf_counter() - began)
print(json.dumps({"times": times, "ids": stream.answer.token_ids}))
"""


def first_token(molmo: Molmo, image: Any) -> tuple[float, tuple[int, ...]]:
    began = time.perf_counter()
    stream = molmo.stream(image, QUESTION)
    next(stream)
    return time.perf_counter() - began, stream.answer.token_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=None, help="default: nano")
    parser.add_argument("--photo", default=str(Path(__file__).parent.parent / "examples" / "coffee.jpg"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="0: the default of the engine")
    args = parser.parse_args()
    molmo = Molmo(args.model, threads=args.threads or None)
    first_token(molmo, args.photo)  # loads the model
    scene = molmo.encode(args.photo)
    seconds: dict[str, list[float]] = {"first": [], "again": []}
    ids = set()
    for _ in range(args.runs):
        for name, image in (("first", args.photo), ("again", scene)):
            spent, said = first_token(molmo, image)
            seconds[name].append(spent)
            ids.add(said)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "scene"
        scene.save(path)
        size = path.stat().st_size
        command = [sys.executable, "-c", CHILD, args.model or "", str(path), str(args.threads), str(args.runs)]
        done = subprocess.run([*command, args.photo], capture_output=True, text=True, check=True)
        loaded = json.loads(done.stdout)
        seconds["saved"] = loaded["times"]
        ids.add(tuple(loaded["ids"]))
    turns: list[list[float]] = [[] for _ in range(TURNS)]
    for _ in range(args.runs):
        chat = molmo.chat(scene)
        for each in turns:
            answer = chat.ask(QUESTION, max_new_tokens=8)
            each.append(answer.usage.seconds.prefill / answer.usage.tokens.prefilled)
    best = {name: min(times) for name, times in seconds.items()}
    own = [min(each) for each in turns]
    print(f"{'first token':24} {'ms':>8} {'times sooner':>13}")
    for name, label in (("first", "asked first"), ("again", "asked again"), ("saved", "saved scene, loaded")):
        print(f"{label:24} {1000 * best[name]:8.1f} {best['first'] / best[name]:13.1f}")
    print(f"the answers are {'equal' if len(ids) == 1 else 'DIFFERENT'}; the saved scene has {size / 1e6:.1f} MB")
    print(f"prefill of a token in a turn: {1000 * own[0]:.3f} ms in the first, {1000 * own[-1]:.3f} ms in the tenth")
    print(f"the tenth turn costs {own[-1] / own[0]:.2f} times the first, for each of its own tokens")
    print(json.dumps({"seconds": seconds, "turns": turns, "equal": len(ids) == 1, "bytes": size}))


if __name__ == "__main__":
    main()
