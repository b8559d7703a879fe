"""Profile a bundle by operator, and compare the time per token with the memory bandwidth.

    python benchmarks/profile_bundle.py BUNDLE

Every token reads the decoder's weights once, and of the experts only the chosen ones: bytes per token divided by the
memory's bandwidth is a lower bound of its time. The bandwidth of a virtual machine changes within seconds, so it is
measured before and after each token, and the larger value counts. Prints tables and, last, one line of JSON.

The profiles are those of ONNX Runtime's own operators; the tokens are run as `Molmo` runs them, with the compiled
kernels if they are installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import molmo_edge  # noqa: F401 - switches off the usage reports of onnxruntime, so it comes first

# isort: split
import onnxruntime

from molmo_edge.checkpoints.bundle import Bundle, open_bundle
from molmo_edge.runtimes.onnx import OnnxRuntime
from molmo_edge.runtimes.onnx_cache import OnnxCache
from molmo_edge.runtimes.onnx_sessions import is_large, session_options

_EXPERTS = ".experts."
_PAUSE = 0.02  # seconds after which ONNX Runtime's threads no longer spin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--positions", type=int, default=740, help="length of the prompt; a photo of 640x480 takes 740")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens-only", action="store_true", help="only tokens and the bandwidth, as JSON")
    args = parser.parse_args()
    bundle = open_bundle(args.bundle, hashes=False)
    found: dict[str, Any] = _tokens(bundle, args.threads, args.positions, args.tokens)
    if not args.tokens_only:
        found["crop"] = _vision(bundle, args.threads)
        found["prefill"], found["decode"] = _decoder(bundle, args.threads, args.positions, args.tokens)
        for title, part in (("a crop", "crop"), ("a prompt", "prefill"), ("tokens", "decode")):
            print(f"{title}: " + ", ".join(f"{name} {share:.0%}" for name, share in list(found[part].items())[:8]))
        print(
            f"a token reads {found['bytes_per_token'] / 1e6:.0f} MB; it took {1e3 * found['s_per_token']:.1f} ms,",
            end=" ",
        )
        print(f"{found['share_of_bandwidth']:.0%} of the speed of the memory, {found['bandwidth_gb_s']:.1f} GB/s")
    print(json.dumps(found))


def _tokens(bundle: Bundle, threads: int, positions: int, tokens: int) -> dict[str, Any]:
    """Time tokens and the memory in turn; all are medians. The first of two tokens wakes the threads, untimed."""
    d = bundle.config.decoder
    size = positions + 2 * tokens
    rows = (0.02 * np.random.default_rng(0).normal(size=(size, d.d_model))).astype(np.float32)
    runtime = OnnxRuntime(bundle.config, {"decoder": bundle.path("decoder")}, threads=threads)
    cache = runtime.new_cache(size)
    runtime.prefill_image(rows[:positions], np.zeros(positions, bool), cache)
    arrays = [np.ones(1 << 25, np.float32) for _ in range(threads)]  # 134 MB each, more than the caches
    seconds, bandwidths = [], [_bandwidth(arrays)]
    for start in range(positions, size, 2):
        runtime.forward(rows[start : start + 1], cache)
        began = time.perf_counter()
        runtime.forward(rows[start + 1 : start + 2], cache)
        seconds.append(time.perf_counter() - began)
        bandwidths.append(_bandwidth(arrays))
    runtime.close()
    read = _bytes_per_token(bundle, positions)
    shares = [read / max(around) / spent for spent, around in zip(seconds, pairwise(bandwidths), strict=True)]
    return {
        "bandwidth_gb_s": statistics.median(bandwidths) / 1e9,
        "bytes_per_token": read,
        "s_per_token": statistics.median(seconds),
        "share_of_bandwidth": statistics.median(shares),
    }


def _bandwidth(arrays: Sequence[np.ndarray]) -> float:
    """Return bytes per second at which as many threads as arrays sum them, the best of three."""
    time.sleep(_PAUSE)
    best = 0.0
    for _ in range(3):
        workers = [threading.Thread(target=array.sum) for array in arrays]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, sum(array.nbytes for array in arrays) / (time.perf_counter() - began))
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


def _decoder(bundle: Bundle, threads: int, positions: int, tokens: int) -> tuple[dict[str, float], dict[str, float]]:
    d = bundle.config.decoder
    rows = (0.02 * np.random.default_rng(0).normal(size=(positions + tokens, d.d_model))).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        session = _session(bundle, "decoder", threads, folder)
        cache = OnnxCache.empty(session, positions + tokens, d.embedding_size, "cpu")
        cache.append(rows[:positions])
        for row in rows[positions:]:
            cache.append(row[None])
        events = _events(session)
    each = len(events) // (1 + tokens)  # each run has the same nodes in the same order
    return _shares(events[:each]), _shares(events[each:])


if __name__ == "__main__":
    main()
