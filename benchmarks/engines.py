"""Compare a decoder on ONNX Runtime and on llama.cpp: prefill of embeddings, and decoding.

    molmo-edge export CKPT --target cpu-x86 --out ONNX
    molmo-edge export CKPT --engine gguf --precision q4_k_m --out GGUF
    python benchmarks/engines.py --onnx ONNX --gguf GGUF

llama.cpp runs with our options and with its own defaults (repacked weights, flash attention). All three are loaded
into one process and take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from molmo_edge.runtimes import LlamaOptions, open_runtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--positions", type=int, default=740, help="length of the prompt; a photo of 640x480 takes 740")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    engines = {
        "onnxruntime": open_runtime(args.onnx, threads=args.threads),
        "llama.cpp": open_runtime(args.gguf, threads=args.threads),
        "llama.cpp, its defaults": open_runtime(
            args.gguf, threads=args.threads, engine_options=LlamaOptions(repack=True, flash_attention=True)
        ),
    }
    width = engines["onnxruntime"].config.decoder.d_model
    random = np.random.default_rng(0)
    rows = (0.02 * random.normal(size=(args.positions + args.tokens, width))).astype(np.float32)
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for _ in range(args.runs + 1):  # the first warms up
        for name, engine in engines.items():
            cache = engine.new_cache(len(rows))
            began = time.perf_counter()
            engine.forward(rows[: args.positions], cache)
            prefilled = time.perf_counter()
            for row in rows[args.positions :]:
                engine.forward(row[None], cache)
            figures[name].append((prefilled - began, time.perf_counter() - prefilled))
    for name, seconds in figures.items():
        prefill, decode = (statistics.median(column) for column in zip(*seconds[1:], strict=True))
        speeds = {"prefill tokens/s": args.positions / prefill, "decode tokens/s": args.tokens / decode}
        print(json.dumps({"engine": name} | {name: round(speed, 1) for name, speed in speeds.items()}))


if __name__ == "__main__":
    main()
