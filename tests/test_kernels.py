"""The compiled kernels against onnxruntime's own operators, and the change of a graph that uses them.

Both round inputs to int8 in the same blocks, so a product differs by the order of float32 sums alone: 1e-6. The inputs
of an expert's second product come from such sums, and a value halfway between two integers may round either way: 1e-3
of the norm, a tenth of what the rounding itself costs.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from kernel_graphs import KERNELS, MICROSOFT, dense, experts, molmo_edge_kernels, needs_kernels
from test_quantize import norm_error

import molmo_edge.cli.doctor  # noqa: F401 - before onnxruntime, whose usage reports it switches off
from molmo_edge.runtimes import kernels
from molmo_edge.runtimes.onnx_sessions import load_session

# isort: split
import onnxruntime


def probabilities(rows: int, n: int) -> np.ndarray:
    logits = np.random.default_rng(3).normal(size=(rows, n))
    found: np.ndarray = (np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)).astype(np.float32)
    return found


def both(path: Path, monkeypatch: pytest.MonkeyPatch, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of a graph with the kernels and without, loaded as a bundle's."""
    found = []
    for switch in ("1", "0"):
        monkeypatch.setenv(kernels.SWITCH, switch)
        session = load_session(path, 2)
        found.append(session.run(None, inputs)[0])
    return found


RUN_ALL = """
import json, sys
from pathlib import Path
import numpy as np
from molmo_edge.runtimes.onnx_sessions import load_session
folder, found = Path(sys.argv[1]), {}
for path in sorted(folder.glob("*.onnx")):
    session = load_session(path, 2)
    inputs = np.load(path.with_suffix(".npz"))
    outputs = [session.run(None, {v.name: inputs[v.name][:n] for v in session.get_inputs()})[0] for n in (1, 2, 5, 70)]
    np.save(folder / f"{path.stem}.{sys.argv[2]}.npy", np.concatenate(outputs))
"""


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    x = np.random.default_rng(0).standard_normal((70, 384), np.float32)
    x[3] = 0
    x[:, 7] *= 20  # an outlier
    for block, asymmetric in ((32, False), (32, True), (64, False), (64, True), (128, False), (128, True)):
        name = f"{block}{'z' if asymmetric else ''}"
        dense(folder / f"dense{name}.onnx", 384, 272, block, asymmetric)
        np.savez(folder / f"dense{name}.npz", x=x)
        experts(folder / f"experts{name}.onnx", 256, 128, 6, 2, block, asymmetric)
        np.savez(folder / f"experts{name}.npz", x=x[:, :256], p=probabilities(70, 6))
    dense(folder / "narrow.onnx", 96, 16, 32, True)
    np.savez(folder / "narrow.npz", x=x[:, :96])
    run_all(folder, "onnxruntime", {kernels.SWITCH: "0"})
    return folder


def run_all(folder: Path, name: str, environment: dict[str, str]) -> None:
    """In a process of its own: a kernel is chosen once in a process."""
    command = [sys.executable, "-c", RUN_ALL, str(folder), name]
    subprocess.run(command, check=True, env={**os.environ, **environment}, timeout=120)


@needs_kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_computes_what_onnxruntime_computes(graphs: Path, kernel: str) -> None:
    run_all(graphs, kernel, {kernels.FORCE: kernel, kernels.SWITCH: "1"})
    for path in sorted(graphs.glob("*.onnx")):
        theirs = np.load(graphs / f"{path.stem}.onnxruntime.npy")
        ours = np.load(graphs / f"{path.stem}.{kernel}.npy")
        assert ours.shape == theirs.shape
        assert norm_error(ours, theirs) < (1e-3 if path.stem.startswith("experts") else 2e-6), path.stem


@needs_kernels
@pytest.mark.skipif("avx2" not in KERNELS, reason="no kernel is used on this processor")
def test_a_large_graph_uses_the_kernels(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path, x = graphs / "dense32.onnx", np.load(graphs / "dense32.npz")["x"]
    made: list[Any] = []
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda graph, *a, **k: made.append(graph) or real(graph, *a, **k)
    )
    ours, theirs = both(path, monkeypatch, {"x": x})
    assert [type(graph) for graph in made] == [bytes, str]
    assert norm_error(ours, theirs) < 2e-6
    path.with_suffix(".onnx.data").rename(tmp_path / "away")  # without the file beside it, it is a small graph
    with pytest.raises(Exception, match=r"dense32\.onnx"):
        both(path, monkeypatch, {"x": x})
    assert isinstance(made[-1], str)
    (tmp_path / "away").rename(path.with_suffix(".onnx.data"))
    assert capfd.readouterr() == ("", "")


@needs_kernels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("block", [32, 64, 128])
def test_the_largest_codes_and_rows_do_not_overflow(kernel: str, block: int) -> None:
    assert molmo_edge_kernels is not None
    inner, columns, rows = 384, 16, 7
    for codes, zero, weight in ((0xFF, 0x00, 15), (0x00, 0xFF, -15), (0xFF, None, 7), (0x00, None, -8)):
        for sign in (1, -1):
            x = np.full((rows, inner), sign, np.float32)  # rounded to 127 or -127
            packed, scales = (
                np.full((columns, inner // 2), codes, np.uint8),
                np.ones((columns, inner // block), np.float32),
            )
            zeros = None if zero is None else np.full((columns, -(-inner // block // 2)), zero, np.uint8)
            for n in (1, 2, rows):
                out = np.empty((n, columns), np.float32)
                pointers = [a if a is None else ctypes.c_void_p(a.ctypes.data) for a in (x, packed, scales, zeros, out)]
                x_at, codes_at, scales_at, zeros_at, out_at = pointers
                sizes = [ctypes.c_int64(size) for size in (n, columns, inner, block)]
                failed = molmo_edge_kernels.load().molmo_multiply(
                    kernel.encode(), x_at, sizes[0], codes_at, scales_at, zeros_at, *sizes[1:], out_at
                )
                assert not failed
                np.testing.assert_allclose(out, sign * weight * inner, rtol=1e-6)


def test_only_nodes_that_the_kernels_compute_move(tmp_path: Path) -> None:
    def domains(path: Path) -> list[str] | None:
        changed = kernels.moved(path.read_bytes())
        if changed is None:
            return None
        before, after = onnx.load(path, load_external_data=False), onnx.load_from_string(changed.model)
        assert {o.domain: o.version for o in after.opset_import} == {"": 20, MICROSOFT: 1, kernels.DOMAIN: 1}
        found = [node.domain for node in after.graph.node]
        for node in after.graph.node:
            node.domain = MICROSOFT
        assert after.graph == before.graph
        return found

    file = tmp_path / "g.onnx"
    assert domains(dense(file, 96, 16, 32, True)) == [kernels.DOMAIN]
    assert domains(experts(file, 256, 128, 6, 2, 128, True)) == [kernels.DOMAIN]
    assert domains(dense(file, 96, 16, 32, False, accuracy_level=0)) is None
    assert domains(dense(file, 96, 16, 32, False, bits=8)) is None
    assert domains(dense(file, 96, 24, 32, False)) is None  # columns
    assert domains(dense(file, 96, 16, 16, False)) is None  # block
    assert domains(experts(file, 64, 32, 2, 1, 32, False, normalize_routing_weights=1)) is None
    assert domains(experts(file, 64, 32, 2, 1, 32, False, activation_alpha=1.5)) is None
    assert domains(experts(file, 64, 32, 2, 1, 32, False, activation_type="silu")) is None


def test_without_the_package_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "molmo_edge_kernels", None)  # import raises ModuleNotFoundError
    assert kernels.installed() is None
    options = onnxruntime.SessionOptions()
    assert kernels.use_kernels(dense(tmp_path / "g.onnx", 96, 16, 32, False), options) is None


@needs_kernels
def test_doctor_names_the_kernel(tmp_path: Path) -> None:
    for switch, used in (
        ("1", ("yes", "no: ONNX Runtime's own")),
        ("0", ("no: switched off by MOLMO_EDGE_KERNELS=0",)),
    ):
        environment = {**os.environ, kernels.SWITCH: switch, "MOLMO_EDGE_CACHE": str(tmp_path)}
        command = [sys.executable, "-m", "molmo_edge.cli", "doctor", "--json"]
        shown = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
        facts = json.loads(shown.stdout)["kernels"]
        assert facts["kernel"] in KERNELS
        assert facts["used"].startswith(used)
