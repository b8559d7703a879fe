"""The compiled attention of decoders against onnxruntime's GroupQueryAttention.

Up to 17 rows are float32 in both. With more rows the kernels round queries, keys, values and weights to bfloat16, so
they are compared with exact products of rounded numbers: a number halfway between two others may round either way.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from kernel_graphs import ATTENTION, MATMUL, MICROSOFT, matrices, needs_kernels
from onnx import TensorProto, helper, numpy_helper
from test_quantize import norm_error

import molmo_edge.cli.doctor  # noqa: F401 - before onnxruntime, whose usage reports it switches off
from molmo_edge.checkpoints.tensor_names import hub_shapes
from molmo_edge.export.decoder_graph import decoder
from molmo_edge.export.graph_builder import Graph
from molmo_edge.export.graph_precisions import graph_precision
from molmo_edge.presets import PRESETS
from molmo_edge.runtimes import kernels
from molmo_edge.runtimes.onnx import OnnxRuntime

CAPACITY = 512
SINGLE = 17  # positions up to which a run is float32
RUNS = (70, 1, 5, 18, 17, 300)  # positions of consecutive runs; a task has at most 256
SHAPES = {
    "plain": (4, 4, 32, False),
    "grouped": (6, 2, 48, False),
    "bias": (4, 2, 64, True),
    "wide": (2, 1, 144, False),
}


def attention_graph(
    path: Path, heads: int, kv_heads: int, width: int, bias: bool, *, half: bool = False, **changed: Any
) -> Path:
    """Attention, and beside it the four-bit product without which it stays with onnxruntime."""
    kind, number = (TensorProto.FLOAT16, np.float16) if half else (TensorProto.FLOAT, np.float32)
    angles = np.arange(CAPACITY)[:, None] * 10_000.0 ** -(np.arange(width // 2) / (width // 2))
    tables = {"cos": np.cos(angles).astype(number), "sin": np.sin(angles).astype(number)}
    weights = matrices(np.random.default_rng(1), 0, 16, 32, 32, False, "")
    buffer = [1, kv_heads, CAPACITY, width]
    inputs = {"q": heads * width, "k": kv_heads * width, "v": kv_heads * width}
    values = [helper.make_tensor_value_info(name, kind, [1, "n", size]) for name, size in inputs.items()]
    values += [helper.make_tensor_value_info(name, kind, buffer) for name in ("past_key", "past_value")]
    values += [helper.make_tensor_value_info(name, TensorProto.INT32, [1]) for name in ("last", "total")]
    values += [helper.make_tensor_value_info("bias", kind, [1, 1, "n", "total"])] if bias else []
    values += [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32])]
    options = {"scale": width**-0.5, "do_rotary": 1, "rotary_interleaved": 0, **({"causal": 0} if bias else {})}
    names = ["q", "k", "v", "past_key", "past_value", "last", "total", "cos", "sin", *(("", "bias") if bias else ())]
    nodes = [
        helper.make_node(
            "GroupQueryAttention", names, ["y", "present_key", "present_value"], domain=MICROSOFT, num_heads=heads,
            kv_num_heads=kv_heads, **{**options, **changed},
        ),
        helper.make_node("MatMulNBits", ["x", *weights], ["z"], domain=MICROSOFT, K=32, N=16, block_size=32, **MATMUL),
    ]  # fmt: skip
    outputs = [helper.make_tensor_value_info("y", kind, None)]
    outputs += [helper.make_tensor_value_info(name, kind, buffer) for name in ("present_key", "present_value")]
    outputs += [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    tensors = [numpy_helper.from_array(array, name) for name, array in (tables | weights).items()]
    graph = helper.make_graph(nodes, "graph", values, outputs, tensors)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    return path


RUN = """
import sys
from pathlib import Path
import numpy as np
import onnxruntime
from molmo_edge.runtimes.onnx_sessions import load_session
folder, name, lengths = Path(sys.argv[1]), sys.argv[2], [int(n) for n in sys.argv[3].split(",")]
for path in sorted(folder.glob("*.onnx")):
    session, given = load_session(path, 2), np.load(path.with_suffix(".npz"))
    shape = session.get_inputs()[3].shape
    for bound in (True, False):  # whether the cache is written in place
        cache, found, start = [np.full(shape, np.nan, np.float32) for _ in range(2)], [], 0
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in cache]
        for n in lengths:
            rows, total = slice(start, start + n), start + n
            feeds = {part: given[part][None, rows] for part in "qkv"} | {"x": given["x"][rows]}
            feeds |= {"last": np.array([total - 1], np.int32), "total": np.array([total], np.int32)}
            if "bias" in given:
                feeds["bias"] = np.ascontiguousarray(given["bias"][None, None, rows, :total])
            binding = session.io_binding()
            for key, array in feeds.items():
                binding.bind_cpu_input(key, array)
            for part, value in zip(("key", "value"), values):
                binding.bind_ortvalue_input(f"past_{part}", value)
                if bound:
                    binding.bind_ortvalue_output(f"present_{part}", value)
            for part in ("y", "z") if bound else ("y", "present_key", "present_value", "z"):
                binding.bind_output(part)
            session.run_with_iobinding(binding)
            outputs = binding.copy_outputs_to_cpu()
            found.append(next(o for o in outputs if o.ndim == 3)[0])
            if not bound:
                values = [onnxruntime.OrtValue.ortvalue_from_numpy(o) for o in outputs if o.ndim == 4]
            start = total
        written = np.stack([value.numpy()[0, :, :start] for value in values])
        np.savez(folder / f"{path.stem}.{name}.{bound}.npz", y=np.concatenate(found), cache=written)
"""


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, n = tmp_path_factory.mktemp("attention"), sum(RUNS)
    rng = np.random.default_rng(0)
    for name, (heads, kv_heads, width, bias) in SHAPES.items():
        attention_graph(folder / f"{name}.onnx", heads, kv_heads, width, bias)
        sizes = {"q": heads * width, "k": kv_heads * width, "v": kv_heads * width, "x": 32}
        arrays = {part: rng.standard_normal((n, size), np.float32) for part, size in sizes.items()}
        arrays["q"] *= 3  # so that some weights are large
        if bias:  # the first 40 positions attend to each other, as image tokens do
            visible = np.tri(n, dtype=bool)
            visible[:40, :40] = True
            arrays["bias"] = np.where(visible, 0, -np.inf).astype(np.float32)
        np.savez(folder / f"{name}.npz", **arrays)
    run(folder, "onnxruntime", RUNS, {kernels.SWITCH: "0"})
    return folder


def run(folder: Path, name: str, lengths: tuple[int, ...], environment: dict[str, str]) -> None:
    """In a process of its own: a kernel is chosen once in a process."""
    command = [sys.executable, "-c", RUN, str(folder), name, ",".join(map(str, lengths))]
    subprocess.run(command, check=True, env={**os.environ, **environment}, timeout=120)


def load(folder: Path, shape: str, name: str, bound: bool) -> dict[str, np.ndarray]:
    with np.load(folder / f"{shape}.{name}.{bound}.npz") as found:
        return dict(found)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """x in float32, rounded to bfloat16 (ties to even), as float64."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).astype(np.float64)


def rounded_attention(path: Path, heads: int, kv_heads: int, width: int, cache: np.ndarray, rows: slice) -> np.ndarray:
    """The product of these rows in bfloat16 with sums in float64, from the keys and values in `cache`."""
    given, total = np.load(path.with_suffix(".npz")), rows.stop
    tables = {t.name: numpy_helper.to_array(t, str(path.parent)) for t in onnx.load(path).graph.initializer}
    cos, sin = (tables[name][None, rows] for name in ("cos", "sin"))
    q = given["q"][rows].reshape(-1, heads, width).transpose(1, 0, 2)
    a, b = np.split(q, 2, axis=-1)
    q = bfloat16(np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1))
    keys, values = (np.repeat(bfloat16(part[:, :total]), heads // kv_heads, axis=0) for part in cache)
    scores = q @ keys.transpose(0, 2, 1) * width**-0.5
    bias = np.where(np.tri(total, dtype=bool), 0, -np.inf) if "bias" not in given else given["bias"][:total, :total]
    scores += bias[None, rows]
    weights = bfloat16(np.exp(scores - scores.max(axis=-1, keepdims=True)))
    out = weights @ values / weights.sum(axis=-1, keepdims=True)
    return out.transpose(1, 0, 2).reshape(-1, heads * width)


@needs_kernels
@pytest.mark.parametrize("kernel", ATTENTION)
def test_attention_computes_what_onnxruntime_computes(graphs: Path, kernel: str) -> None:
    environment = {kernels.FORCE: kernel, kernels.SWITCH: "1"}
    run(graphs, kernel, RUNS, environment)
    ends = np.cumsum(RUNS)
    for shape, (heads, kv_heads, width, _) in SHAPES.items():
        theirs = load(graphs, shape, "onnxruntime", bound=True)
        for bound in (True, False):
            ours = load(graphs, shape, kernel, bound)
            assert norm_error(ours["cache"], theirs["cache"]) < 1e-6, shape
            assert np.isfinite(ours["cache"]).all()
            for n, end in zip(RUNS, ends, strict=True):
                rows = slice(end - n, end)
                if n <= SINGLE:
                    assert norm_error(ours["y"][rows], theirs["y"][rows]) < 1e-6, (shape, n)
                    continue
                rounded = rounded_attention(graphs / f"{shape}.onnx", heads, kv_heads, width, theirs["cache"], rows)
                assert norm_error(ours["y"][rows], rounded) < 3e-4, (shape, n)
                assert 5e-4 < norm_error(ours["y"][rows], theirs["y"][rows]) < 1e-2, (shape, n)  # what rounding costs


@needs_kernels
@pytest.mark.parametrize("kernel", ATTENTION)
def test_a_token_has_the_same_result_alone_and_beside_others(graphs: Path, kernel: str) -> None:
    environment = {kernels.FORCE: kernel, kernels.SWITCH: "1"}
    run(graphs, "together", (70, 10, SINGLE), environment)
    run(graphs, "alone", (70, *[1] * (10 + SINGLE)), environment)
    for shape in SHAPES:
        together, alone = (load(graphs, shape, name, bound=True) for name in ("together", "alone"))
        assert np.array_equal(together["y"], alone["y"]), shape
        assert np.array_equal(together["cache"], alone["cache"]), shape


@needs_kernels
@pytest.mark.parametrize("kernel", ATTENTION)
def test_a_number_that_is_none_is_not_hidden(tmp_path: Path, kernel: str) -> None:
    rng = np.random.default_rng(0)
    attention_graph(tmp_path / "nan.onnx", 2, 2, 32, bias=False)
    arrays = {
        part: rng.standard_normal((41, size), np.float32) for part, size in {"q": 64, "k": 64, "v": 64, "x": 32}.items()
    }
    arrays["k"][25, 3] = np.nan  # in the first of two heads
    np.savez(tmp_path / "nan.npz", **arrays)
    run(tmp_path, kernel, (40, 1), {kernels.FORCE: kernel, kernels.SWITCH: "1"})
    with np.load(tmp_path / f"nan.{kernel}.True.npz") as found:
        y = found["y"]
    assert np.isnan(y[25:, :32]).all()
    assert np.isfinite(y[:25]).all()
    assert np.isfinite(y[:, 32:]).all()


def test_only_attention_that_the_kernels_compute_moves(tmp_path: Path) -> None:
    def moves(operators: tuple[str, ...] = kernels.OPERATORS, **changed: Any) -> bool:
        options = {"heads": 4, "kv_heads": 2, "width": 32, "bias": False, **changed}
        changed_graph = kernels.moved(attention_graph(tmp_path / "g.onnx", **options).read_bytes(), operators)
        if changed_graph is None:
            return False
        nodes = {node.op_type: node.domain for node in onnx.load_from_string(changed_graph.model).graph.node}
        return nodes["GroupQueryAttention"] == kernels.DOMAIN

    assert moves()
    assert moves(bias=True)
    assert not moves(("MatMulNBits", "QMoE"))
    assert not moves(("GroupQueryAttention",))  # beside products in float32
    assert not moves(half=True)
    assert not moves(causal=0)
    assert not moves(bias=True, causal=1)
    assert not moves(scale=0.0)
    assert not moves(rotary_interleaved=1)
    assert not moves(do_rotary=0)
    assert not moves(softcap=30.0)
    assert not moves(local_window_size=64)
    assert not moves(width=24)
    assert not moves(smooth_softmax=1)
    assert not moves(qk_output=1)
    assert not moves(k_quant_type="PER_CHANNEL", v_quant_type="PER_CHANNEL", kv_cache_bit_width=8)


DECODERS = {
    "molmoe-1b": {
        "n_layers": 2,
        "d_model": 256,
        "n_heads": 4,
        "n_kv_heads": 4,
        "ffn_dim": 128,
        "n_experts": 8,
        "top_k": 2,
    },
    "molmo2-4b": {
        "n_layers": 2,
        "d_model": 256,
        "n_heads": 4,
        "n_kv_heads": 2,
        "ffn_dim": 512,
        "head_dim_override": 80,
    },
}


@needs_kernels
@pytest.mark.skipif(not ATTENTION, reason="no kernel of this processor computes attention")
@pytest.mark.parametrize(
    ("preset", "precision", "moved_nodes"),
    [
        ("molmoe-1b", "mixed", {"GroupQueryAttention": 2, "QMoE": 2, "QuantizedLinear": 4}),
        ("molmo2-4b", "mixed", {"GroupQueryAttention": 2, "MatMulNBits": 4, "QuantizedLinear": 4}),
        ("molmo2-4b", "q4", {"GroupQueryAttention": 2, "MatMulNBits": 8}),
        ("molmo2-4b", "int8", {"QuantizedLinear": 8}),
    ],
)
def test_a_decoder_on_the_kernels(
    preset: str, precision: str, moved_nodes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = PRESETS[preset]
    small = {"vocab_size": 256, "embedding_size": 256, "additional_vocab_size": 0, "max_position_embeddings": 256}
    config = dataclasses.replace(full, decoder=dataclasses.replace(full.decoder, **small, **DECODERS[preset]))
    rng = np.random.default_rng(5)
    tensors = {
        name: (np.ones(shape) if len(shape) == 1 else rng.normal(0, shape[-1] ** -0.5, shape)).astype(np.float32)
        for name, shape in hub_shapes(config).items()
    }
    path = tmp_path / "decoder.onnx"
    graph = Graph("decoder", path.with_name("decoder.onnx.data"))
    decoder(graph, config, tensors, graph_precision(precision))
    graph.save(path)
    rows = rng.standard_normal((90, config.decoder.d_model), np.float32)
    image = np.zeros(60, bool)
    image[4:50] = config.decoder.bidirectional_images
    positions = np.r_[0:30, 40:100]  # as if ten image tokens were left out
    found: dict[str, dict[str, np.ndarray]] = {}
    for switch in ("0", "1"):
        monkeypatch.setenv(kernels.SWITCH, switch)
        runtime = OnnxRuntime(config, {"decoder": path}, threads=2, gaps=True)
        for name, where in (("plain", None), ("gaps", positions)):
            cache = runtime.new_cache(len(rows), where)
            logits = [runtime.prefill_image(rows[:60], image, cache)]
            logits += [runtime.forward(rows[60:61], cache), runtime.forward(rows[61:65], cache)]
            logits += [runtime.forward(rows[65:90], cache)]
            found.setdefault(name, {})[switch] = np.stack([part.ravel() for part in logits])
        runtime.close()
    moved = kernels.moved(path.read_bytes())
    assert moved is not None
    nodes = [node.op_type for node in onnx.load_from_string(moved.model).graph.node if node.domain == kernels.DOMAIN]
    assert {kind: nodes.count(kind) for kind in nodes if kind != "QuantizeRows"} == moved_nodes
    for name, logits in found.items():
        # Where bfloat16 moves an input of the next layer over a halfway point, its rounding to int8 changes.
        assert norm_error(logits["1"], logits["0"]) < 2e-2, name
        # Eight-bit layers alone can compute the same numbers as ONNX Runtime's.
        assert "GroupQueryAttention" not in moved_nodes or not np.array_equal(logits["1"], logits["0"]), "not used"
    assert norm_error(found["gaps"]["1"], found["plain"]["1"]) > 0.1
