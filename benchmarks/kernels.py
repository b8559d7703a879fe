"""Compare the compiled kernels (folder kernels/) with onnxruntime's own operators, alternating in one run.

    python benchmarks/kernels.py products                    # each kernel of this processor on the shapes of two models
    python benchmarks/kernels.py decoder --preset molmoe-1b  # a decoder with the first layers of a model
    python benchmarks/kernels.py bundle BUNDLE               # the decoder of a bundle
    python benchmarks/kernels.py vision BUNDLE               # its vision tower

`products` times one thread in its processor time, so that other programs distort it less, and prints the error against
the product of the restored weights in float32. `decoder` and `bundle` time a prompt and tokens on all threads. Weights
and inputs are random. `vision` times crops one by one and all in one run, by the clock and in processor time, and with
--checkpoint prints the errors of the features against the same weights in float32 (PyTorch). Prints tables and, last,
one line of JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import molmo_edge_kernels
import numpy as np
from onnx import TensorProto, helper, numpy_helper

import molmo_edge  # noqa: F401 - switches off the usage reports of onnxruntime, so it comes first

# isort: split
import onnxruntime

from molmo_edge.checkpoints.bundle import open_bundle
from molmo_edge.checkpoints.tensor_names import hub_shapes
from molmo_edge.config import MolmoConfig
from molmo_edge.export.component_errors import sample_crops
from molmo_edge.export.decoder_graph import decoder
from molmo_edge.export.graph_builder import Graph
from molmo_edge.export.graph_precisions import graph_precision
from molmo_edge.export.int4_graph import Int4
from molmo_edge.presets import PRESETS
from molmo_edge.quantize.rounding import Blocks, pack_nibbles
from molmo_edge.runtimes.kernels import SWITCH
from molmo_edge.runtimes.onnx import OnnxRuntime
from molmo_edge.runtimes.onnx_sessions import load_session

_MICROSOFT = "com.microsoft"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    products = commands.add_parser("products")
    products.add_argument("--repeat", type=int, default=3)
    for name in ("decoder", "bundle"):
        command = commands.add_parser(name)
        if name == "decoder":
            command.add_argument("--preset", choices=sorted(PRESETS), default="molmoe-1b")
            command.add_argument("--layers", type=int, default=2)
        else:
            command.add_argument("bundle", type=Path)
        command.add_argument("--positions", type=int, default=740)
        command.add_argument("--tokens", type=int, default=16)
        command.add_argument("--threads", type=int, default=2)
        command.add_argument("--repeat", type=int, default=3)
    vision = commands.add_parser("vision")
    vision.add_argument("bundle", type=Path)
    vision.add_argument("--checkpoint", type=Path, help="the checkpoint that the bundle was exported from")
    vision.add_argument("--crops", type=int, choices=range(1, 5), default=4)
    vision.add_argument("--threads", type=int, default=2)
    vision.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    if args.command == "vision":
        _vision(args)
        return
    if args.command == "products":
        found = [*_dense(args.repeat), *_experts(args.repeat)]
        print(json.dumps(found))
        return
    if args.command == "bundle":
        bundle = open_bundle(args.bundle, hashes=False)
        _compare(bundle.config, bundle.path("decoder"), args)
        return
    full = PRESETS[args.preset]
    config = dataclasses.replace(full, decoder=dataclasses.replace(full.decoder, n_layers=args.layers))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "decoder.onnx")
        graph = Graph("decoder", path.with_name("decoder.onnx.data"))
        decoder(graph, config, _Random(config), graph_precision("mixed", int4=Int4(round=_random)))
        graph.save(path)
        _compare(config, path, args)


@functools.lru_cache(4)
def _codes(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 16, shape, np.uint8)


def _random(_name: str, weight: np.ndarray, block: int, asymmetric: bool) -> Blocks:
    """Random codes instead of a rounded weight: a model of full width takes seconds instead of minutes."""
    groups = (weight.shape[0], weight.shape[1] // block)
    scale = np.full(groups, 0.004, np.float32)
    return Blocks(_codes(weight.shape), scale, np.full(groups, 7, np.uint8) if asymmetric else None)


class _Random:
    """Random weights of a model, one array for each shape."""

    def __init__(self, config: MolmoConfig) -> None:
        self._shapes = hub_shapes(config)

    @functools.lru_cache(8)  # noqa: B019 - lives as long as the program
    def _array(self, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return 0.02 * np.random.default_rng(1).standard_normal(shape, np.float32)

    def get(self, name: str) -> np.ndarray:
        return self._array(tuple(self._shapes[name]))


def _compare(config: MolmoConfig, path: Path, args: argparse.Namespace) -> None:
    rows = 0.02 * np.random.default_rng(0).standard_normal((args.positions + args.tokens, config.decoder.d_model))
    rows = rows.astype(np.float32)
    image = np.zeros(args.positions, bool)
    image[2:-20] = config.decoder.bidirectional_images  # a photo, before the question
    runtimes = {}
    for name, switch in (("onnxruntime", "0"), (molmo_edge_kernels.kernel(), "1")):
        os.environ[SWITCH] = switch
        runtimes[name] = OnnxRuntime(config, {"decoder": path}, threads=args.threads)
        runtimes[name].new_cache(8)  # waits until it is loaded
    times: dict[str, dict[str, list[float]]] = {name: {"prompt": [], "token": []} for name in runtimes}
    logits: dict[str, np.ndarray] = {}
    for _ in range(args.repeat):
        for name, runtime in runtimes.items():
            cache = runtime.new_cache(len(rows))
            began = time.perf_counter()
            logits[name] = runtime.prefill_image(rows[: args.positions], image, cache)
            times[name]["prompt"].append(time.perf_counter() - began)
            for row in rows[args.positions :]:
                began = time.perf_counter()
                runtime.forward(row[None], cache)
                times[name]["token"].append(time.perf_counter() - began)
    old, new = times.values()
    result: dict[str, Any] = {"difference": _relative(*reversed(logits.values()))}
    for what in ("prompt", "token"):
        before, after = statistics.median(old[what]), statistics.median(new[what])
        result[what] = {"onnxruntime_s": before, "kernels_s": after, "ratio": before / after}
        print(
            f"{what:8} onnxruntime {before:.4f} s, {list(times)[1]} {after:.4f} s: {before / after:.2f} times as fast"
        )
    print(f"relative difference of the logits: {result['difference']:.1e}")
    print(json.dumps(result))


def _vision(args: argparse.Namespace) -> None:
    bundle = open_bundle(args.bundle, hashes=False)
    config, path = bundle.config, bundle.path("vision_encoder")
    drawn = sample_crops(config)[0]
    crops = np.concatenate([drawn, drawn[:, ::-1]])[: args.crops]
    ours = molmo_edge_kernels.kernel()
    sessions = {}
    for name, switch in (("onnxruntime", "0"), (ours, "1")):
        os.environ[SWITCH] = switch
        sessions[name] = load_session(path, args.threads)
        print(f"{name} is loaded", flush=True)

    def one_by_one(session: Any) -> np.ndarray:
        return np.concatenate([session.run(None, {"crops": crop[None]})[0] for crop in crops])

    def together(session: Any) -> np.ndarray:
        found: np.ndarray = session.run(None, {"crops": crops})[0]
        return found

    spent: dict[str, dict[str, list[float]]] = {}
    features: dict[str, np.ndarray] = {}
    for _ in range(args.repeat):
        for how in (one_by_one, together):
            for name, session in sessions.items():
                began, own = time.perf_counter(), time.process_time()
                features[name] = how(session)
                rows = spent.setdefault(f"{name} {how.__name__}", {"wall": [], "processor": []})
                rows["wall"].append((time.perf_counter() - began) / len(crops))
                rows["processor"].append((time.process_time() - own) / len(crops))
    best = {name: {kind: min(values) for kind, values in rows.items()} for name, rows in spent.items()}
    for name, rows in best.items():
        print(f"{name:28} {rows['wall']:.3f} s per crop, {rows['processor']:.3f} s of the processor")
    old, new = best["onnxruntime one_by_one"], best[f"{ours} one_by_one"]
    result: dict[str, Any] = {"seconds": best, "ratio": {kind: old[kind] / new[kind] for kind in old}}
    print(f"{result['ratio']['wall']:.2f} times as fast, {result['ratio']['processor']:.2f} in processor time")
    result["difference"] = _relative(features[ours], features["onnxruntime"])
    print(f"relative difference of the features: {result['difference']:.4f}")
    if args.checkpoint is not None:
        result["error"] = _vision_errors(args.checkpoint, crops, features)
    print(json.dumps(result))


def _vision_errors(checkpoint: Path, crops: np.ndarray, features: dict[str, np.ndarray]) -> dict[str, float]:
    import torch

    from molmo_edge.checkpoints.hub_config import read_config
    from molmo_edge.checkpoints.weight_files import open_tensors
    from molmo_edge.modeling.weights import load_part

    model = load_part(read_config(checkpoint), open_tensors(checkpoint), "vision")
    with torch.inference_mode():
        exact = np.concatenate([model(torch.from_numpy(crop[None])).numpy() for crop in crops])
    errors = {name: _relative(found, exact) for name, found in features.items()}
    for name, error in errors.items():
        print(f"{name}: relative error of the features against float32 {error:.5f}")
    return errors


def _relative(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def _session(node: Any, inputs: dict[str, tuple[int, ...]], weights: dict[str, np.ndarray]) -> Any:
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    result = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph([node], "one", infos, result, tensors)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(_MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _race(
    title: str, operations: float, exact: np.ndarray, contestants: dict[str, Callable[[], np.ndarray]], repeat: int
) -> dict[str, Any]:
    best, outputs = dict.fromkeys(contestants, float("inf")), {}
    for _ in range(repeat):
        for name, run in contestants.items():
            began = time.thread_time()
            outputs[name] = run()
            best[name] = min(best[name], time.thread_time() - began)
    print(title)
    for name, seconds in best.items():
        speed = f"{operations / seconds / 1e9:6.0f} Gop/s, {best['onnxruntime'] / seconds:5.2f} times onnxruntime"
        print(f"  {name:12} {1e3 * seconds:9.2f} ms {speed}, relative error {_relative(outputs[name], exact):.5f}")
    errors = {name: _relative(output, exact) for name, output in outputs.items()}
    return {"what": title, "seconds": best, "error": errors}


def _kernels(rows: int) -> list[str]:
    """Those to time. Only the kernels with AVX-512 have a fast path for single rows; the plain one is a reference."""
    return [name for name in molmo_edge_kernels.supported() if name != "plain" and (rows > 2 or name in _FAST)]


_FAST = tuple(molmo_edge_kernels.FASTER)


def _dense(repeat: int) -> list[dict[str, Any]]:
    """The feed-forward layer of Molmo2-4B: blocks of 32."""
    results = []
    for rows, inner, columns in ((790, 2560, 9728), (1, 2560, 9728), (1, 9728, 2560)):
        x = np.random.default_rng(2).standard_normal((rows, inner), np.float32)
        blocks = _random("", np.empty((columns, inner), np.float32), 32, False)
        codes, scale = pack_nibbles(blocks.codes), blocks.scale
        node = helper.make_node(
            "MatMulNBits", ["x", "c", "s"], ["y"], domain=_MICROSOFT, K=inner, N=columns, bits=4, block_size=32,
            accuracy_level=4,
        )  # fmt: skip
        session = _session(node, {"x": (1, rows, inner)}, {"c": codes.reshape(columns, -1, 16), "s": scale})

        def ours(name: str, x: Any = x, codes: Any = codes, scale: Any = scale) -> np.ndarray:
            out = np.empty((len(x), len(codes)), np.float32)
            _call("molmo_multiply", name, x, len(x), codes, scale, None, len(codes), x.shape[1], 32, out)
            return out

        contestants: dict[str, Callable[[], np.ndarray]] = {
            "onnxruntime": lambda session=session, x=x: session.run(None, {"x": x[None]})[0][0],
            **{name: functools.partial(ours, name) for name in _kernels(rows)},
        }
        title = f"MatMulNBits, {rows} rows x {inner} x {columns}, blocks of 32"
        exact = x @ blocks.restored().T
        results.append(
            _race(title, 2.0 * rows * inner * columns, exact, contestants, repeat if rows > 1 else 5 * repeat)
        )
    return results


def _experts(repeat: int) -> list[dict[str, Any]]:
    """A layer of MolmoE-1B: 64 experts of which each row takes 8, blocks of 128."""
    d, f, n, k, block = 2048, 1024, 64, 8, 128
    first = _random("", np.empty((n * 2 * f, d), np.float32), block, False)
    second = _random("", np.empty((n * d, f), np.float32), block, False)
    codes = pack_nibbles(first.codes).reshape(n, 2 * f, -1), pack_nibbles(second.codes).reshape(n, d, -1)
    scales = first.scale.astype(np.float16).reshape(n, 2 * f, -1), second.scale.astype(np.float16).reshape(n, d, -1)
    weights = {"c1": codes[0], "s1": scales[0], "c2": codes[1], "s2": scales[1]}
    inputs = ["x", "p", "c1", "s1", "", "c2", "s2", "", "", "", "", "", "", "", "p"]
    node = helper.make_node(
        "QMoE", inputs, ["y"], domain=_MICROSOFT, k=k, activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0,
        activation_beta=0.0, expert_weight_bits=4, block_size=block, normalize_routing_weights=0, accuracy_level=4,
    )  # fmt: skip
    gates, downs = first.restored().reshape(n, 2 * f, d), second.restored().reshape(n, d, f)
    results = []
    for rows in (512, 1):  # a prompt runs in chunks of 512
        random = np.random.default_rng(3)
        x = random.standard_normal((rows, d), np.float32)
        p = np.exp(random.standard_normal((rows, n), np.float32))
        p /= p.sum(axis=-1, keepdims=True)
        top, exact = np.argsort(-p, axis=-1)[:, :k], np.zeros((rows, d), np.float32)
        for e in range(n):
            at, _ = np.nonzero(top == e)
            both = x[at] @ gates[e].T
            gate = both[:, ::2]
            exact[at] += p[at, e, None] * ((gate / (1 + np.exp(-gate)) * both[:, 1::2]) @ downs[e].T)
        session = _session(node, {"x": (1, rows, d), "p": (rows, n)}, weights)

        def ours(name: str, x: Any = x, p: Any = p) -> np.ndarray:
            out = np.empty_like(x)
            matrices = (codes[0], scales[0], None, codes[1], scales[1], None)
            _call("molmo_experts", name, x, len(x), p, p, n, k, *matrices, d, f, block, out)
            return out

        contestants: dict[str, Callable[[], np.ndarray]] = {
            "onnxruntime": lambda session=session, x=x, p=p: session.run(None, {"x": x[None], "p": p})[0][0],
            **{name: functools.partial(ours, name) for name in _kernels(rows)},
        }
        title = f"QMoE, {rows} rows, {k} of {n} experts of {d} x {f}, blocks of {block}"
        results.append(_race(title, 6.0 * rows * k * d * f, exact, contestants, repeat if rows > 1 else 5 * repeat))
    return results


def _call(function: str, kernel: str, *arguments: Any) -> None:
    """Call a function of the library with arrays, None and integers."""
    kinds = {int: ctypes.c_int64, type(None): ctypes.c_void_p}
    given = [kinds[type(a)](a) if type(a) in kinds else ctypes.c_void_p(a.ctypes.data) for a in arguments]
    if getattr(molmo_edge_kernels.load(), function)(kernel.encode(), *given):
        raise SystemExit(f"this processor does not have the kernel {kernel}")


if __name__ == "__main__":
    main()
