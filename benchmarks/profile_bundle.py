"""Profile a bundle by operator, and compare the time per token with the memory bandwidth.

    python benchmarks/profile_bundle.py BUNDLE

Every token reads the decoder's weights once, and of the experts only the chosen ones: bytes per token divided by this
machine's bandwidth, measured here, is a lower bound. Prints tables and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import molmo_edge  # noqa: F401 - switches off the usage reports of onnxruntime, so it comes first

# isort: split
import onnxruntime

from molmo_edge.checkpoints.bundle import Bundle, open_bundle
from molmo_edge.runtimes.onnx_cache import OnnxCache
from molmo_edge.runtimes.onnx_sessions import is_large, session_options

_EXPERTS = ".experts."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--positions", type=int, default=740, help="length of the prompt; a photo of 640x480 takes 740")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--floor", action="store_true", help="only the bandwidth and the bytes per token, as JSON")
    args = parser.parse_args()
    bundle = open_bundle(args.bundle, hashes=False)
    bandwidth = _bandwidth(args.threads)
    if args.floor:
        read = _bytes_per_token(bundle, args.positions)
        print(json.dumps({"bandwidth_gb_s": bandwidth / 1e9, "bytes_per_token": read}))
        return
    vision = _vision(bundle, args.threads)
    prefill, decode, seconds = _decoder(bundle, args.threads, args.positions, args.tokens)
    read = _bytes_per_token(bundle, args.positions)
    for title, shares in (("a crop", vision), ("a prompt", prefill), ("tokens", decode)):
        print(f"{title}: " + ", ".join(f"{name} {share:.0%}" for name, share in list(shares.items())[:8]))
    floor = read / bandwidth
    print(f"a token reads {read / 1e6:.0f} MB: {1e3 * floor:.1f} ms at {bandwidth / 1e9:.1f} GB/s; it took", end=" ")
    print(f"{1e3 * seconds:.1f} ms, {floor / seconds:.0%} of that speed")
    print(
        json.dumps(
            {
                "bandwidth_gb_s": bandwidth / 1e9,
                "bytes_per_token": read,
                "s_per_token": seconds,
                "share_of_bandwidth": floor / seconds,
                "crop": vision,
                "prefill": prefill,
                "decode": decode,
            }
        )
    )


def _bandwidth(threads: int) -> float:
    """Return bytes per second that `threads` read in parallel, best of several: sums of arrays larger than caches."""
    parts = [np.ones(1 << 26, np.float32) for _ in range(threads)]  # 268 MB each
    best = 0.0
    for _ in range(6):
        workers = [threading.Thread(target=part.sum) for part in parts]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - began))
    return best


def _bytes_per_token(bundle: Bundle, positions: int) -> float:
    """Return the bytes that one token reads: weights, and keys and values of earlier positions."""
    d = bundle.config.decoder
    graph = onnx.load(bundle.path("decoder"), load_external_data=False).graph
    total = 0.0
    for tensor in graph.initializer:
        if tensor.name.startswith("rope."):
            continue
        size = float(np.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
        total += size * (d.top_k / d.n_experts if _EXPERTS in tensor.name else 1)
    return total + 2 * 4 * d.n_layers * d.n_kv_heads * d.head_dim * positions


def _session(bundle: Bundle, component: str, threads: int, folder: str) -> Any:
    """Open a session as the runtime does, with profiling."""
    spin = component == "decoder" and is_large(bundle.path(component))
    options = session_options(threads, spin=spin)
    options.enable_profiling, options.profile_file_prefix = True, f"{folder}/{component}"
    return onnxruntime.InferenceSession(str(bundle.path(component)), options, providers=["CPUExecutionProvider"])


def _shares(events: list[dict[str, Any]]) -> dict[str, float]:
    """Return the share of the total time by operator."""
    spent: Counter[str] = Counter()
    for event in events:
        spent[event["args"]["op_name"]] += event["dur"]
    return {name: round(micros / spent.total(), 3) for name, micros in spent.most_common()}


def _events(session: Any) -> list[dict[str, Any]]:
    profile = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return [event for event in profile if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]


def _vision(bundle: Bundle, threads: int) -> dict[str, float]:
    i = bundle.config.image
    crop = np.random.default_rng(0).normal(size=(1, i.patches**2, 3 * i.patch_size**2)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        session = _session(bundle, "vision_encoder", threads, folder)
        for _ in range(3):
            session.run(None, {"crops": crop})
        return _shares(_events(session))


def _decoder(
    bundle: Bundle, threads: int, positions: int, tokens: int
) -> tuple[dict[str, float], dict[str, float], float]:
    d = bundle.config.decoder
    rows = (0.02 * np.random.default_rng(0).normal(size=(positions + tokens, d.d_model))).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        session = _session(bundle, "decoder", threads, folder)
        cache = OnnxCache.empty(session, positions + tokens, d.embedding_size, "cpu")
        cache.append(rows[:positions])
        steps = []
        for row in rows[positions:]:
            began = time.perf_counter()
            cache.append(row[None])
            steps.append(time.perf_counter() - began)
        events = _events(session)
    each = len(events) // (1 + tokens)  # each run has the same nodes in the same order
    return _shares(events[:each]), _shares(events[each:]), statistics.median(steps)


if __name__ == "__main__":
    main()
