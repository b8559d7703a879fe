"""Compare a GGUF bundle with llama.cpp alone on the same file: the overhead per token and prompt, and the memory.

    python benchmarks/llama.py --bundle DIR --photo PHOTO [--options repack=yes]

`speed`: our runtime and llama.cpp alone take turns in one process, with a context each: embeddings against ids as
input, same threads, same options. `asking`: the time to the first token of the first question about a photo, and of
later ones about the encoded scene. `memory`: the peak of a new process that answers one question, and the size of the
bundle's files.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge import Molmo
from molmo_edge.checkpoints.bundle import open_bundle
from molmo_edge.runtimes import LlamaOptions, open_runtime
from molmo_edge.runtimes.llama import LlamaRuntime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--photo", type=Path, required=True)
    parser.add_argument("--options", default="", help="as for --llama")
    parser.add_argument("--positions", type=int, default=740, help="length of the prompt; a photo of 640x480 takes 740")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=("speed", "asking", "memory"))
    args = parser.parse_args()
    parts = {"memory": memory, "speed": speed, "asking": asking}  # memory first, in a clean process
    for name, part in parts.items():
        if args.only in (None, name):
            print(json.dumps({name: part(args)}), flush=True)


def speed(args: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    runtime = open_runtime(args.bundle, engine_options=LlamaOptions.parse(args.options))
    assert isinstance(runtime, LlamaRuntime)
    model = runtime.model
    load = time.perf_counter() - began
    random = np.random.default_rng(0)
    ids = random.integers(0, runtime.config.decoder.vocab_size, args.positions + args.tokens)
    rows = runtime.embed(ids)
    n, room = args.positions, args.positions + args.tokens
    seconds: dict[str, list[tuple[float, list[float]]]] = {"ours": [], "llama.cpp": []}
    theirs = _Alone(model, room)
    for _ in range(args.runs + 1):  # the first warms up
        cache = runtime.new_cache(room)
        began = time.perf_counter()
        runtime.forward(rows[:n], cache)
        prefill, steps = time.perf_counter() - began, []
        for token in ids[n:]:
            began = time.perf_counter()
            runtime.forward(runtime.embed(np.array([token])), cache)  # as `generate` does
            steps.append(time.perf_counter() - began)
        seconds["ours"].append((prefill, steps))
        theirs.clear()
        prefill, steps = theirs.run(ids[:n]), []
        for token in ids[n:]:
            steps.append(theirs.run([token]))
        seconds["llama.cpp"].append((prefill, steps))
    found: dict[str, Any] = {"load s": round(load, 1)}
    for name, runs in seconds.items():
        prefill = statistics.median(prefill for prefill, _ in runs[1:])
        step = statistics.median(step for _, steps in runs[1:] for step in steps)
        found |= {f"{name} prefill tokens/s": round(n / prefill, 1), f"{name} ms per token": round(1e3 * step, 2)}
    ours, theirs_ = (
        [statistics.median(steps) for _, steps in runs[1:]] for runs in (seconds["ours"], seconds["llama.cpp"])
    )
    found["decode ratio"] = round(statistics.median(b / a for a, b in zip(ours, theirs_, strict=True)), 3)
    prefills = zip(seconds["ours"][1:], seconds["llama.cpp"][1:], strict=True)
    found["prefill ratio"] = round(statistics.median(b[0] / a[0] for a, b in prefills), 3)
    found["our ms per token"] = round(_overhead(runtime, rows[:n], ids[n:]), 3)
    return found


def _overhead(runtime: LlamaRuntime, prompt: np.ndarray, tokens: np.ndarray) -> float:
    """Return the milliseconds per token outside llama_decode: the embedding, the batch, the logits."""
    cache, model = runtime.new_cache(len(prompt) + len(tokens)), runtime.model
    runtime.forward(prompt, cache)
    inside, decode = [0.0], model.api.llama_decode

    def timed(context: Any, batch: Any) -> int:
        began = time.perf_counter()
        code = decode(context, batch)
        inside[0] += time.perf_counter() - began
        return code

    model.api.llama_decode = timed
    began = time.perf_counter()
    for token in tokens:
        runtime.forward(runtime.embed(np.array([token])), cache)
    spent = time.perf_counter() - began
    model.api.llama_decode = decode
    return 1e3 * (spent - inside[0]) / len(tokens)


class _Alone:
    """llama.cpp used as in its own examples: ids in, a pointer to the logits out."""

    def __init__(self, model: Any, room: int) -> None:
        self._api, self._context = model.api, model.new_context(room, min(model.at_once, room))

    def clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def run(self, ids: Any) -> float:
        began = time.perf_counter()
        for start in range(0, len(ids), 512):
            some = [int(i) for i in ids[start : start + 512]]
            tokens = (ctypes.c_int32 * len(some))(*some)
            if self._api.llama_decode(self._context, self._api.llama_batch_get_one(tokens, len(some))):
                raise SystemExit("llama.cpp failed")
        self._api.llama_get_logits_ith(self._context, -1)[0]
        return time.perf_counter() - began


def asking(args: argparse.Namespace) -> dict[str, Any]:
    firsts, laters = [], []
    with Molmo(args.bundle, engine_options=LlamaOptions.parse(args.options)) as molmo:
        molmo.ask(args.photo, "What is this?", max_new_tokens=1)  # waits for what loads in the background
        for _ in range(args.runs):
            began = time.perf_counter()
            scene = molmo.encode(args.photo)
            molmo.ask(scene, "Describe this image.", max_new_tokens=1)
            firsts.append(time.perf_counter() - began)
            for question in ("Point to the cup.", "How many people are there?", "What is written here?"):
                began = time.perf_counter()
                molmo.ask(scene, question, max_new_tokens=1)
                laters.append(time.perf_counter() - began)
    first, later = statistics.median(firsts), statistics.median(laters)
    return {"first s": round(first, 3), "later s": round(later, 3), "later of first": round(later / first, 4)}


def memory(args: argparse.Namespace) -> dict[str, Any]:
    program = f"""
import re
from molmo_edge import Molmo
from molmo_edge.runtimes import LlamaOptions
with Molmo({str(args.bundle)!r}, engine_options=LlamaOptions.parse({args.options!r})) as molmo:
    molmo.ask({str(args.photo)!r}, "Describe this image.", max_new_tokens=8)
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
    peak = int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)
    components = open_bundle(args.bundle, hashes=False).components
    size = sum(component.bytes for component in components.values())
    gguf = components["decoder"].bytes
    return {"peak GB": round(peak * 1024 / 1e9, 2), "bundle GB": round(size / 1e9, 2), "GGUF GB": round(gguf / 1e9, 2)}


if __name__ == "__main__":
    main()
