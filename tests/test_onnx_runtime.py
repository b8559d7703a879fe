"""The ONNX Runtime engine: equal logits for any chunking, and clear errors."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import ARCHITECTURES, CASES, GOLDEN, bundle, case, expected, prompt, relative, runtime

import molmo_edge.runtimes.onnx as onnx_module
from molmo_edge.checkpoints.manifest import BundleError
from molmo_edge.export.graph_builder import FP32, Graph, Precision
from molmo_edge.export.graph_precisions import graph_precision
from molmo_edge.runtimes import EngineError, Unavailable, open_runtime
from molmo_edge.runtimes.onnx import OnnxRuntime

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("precision", ["fp32", "int8", "q8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_equals_uncached(architecture: str, precision: str) -> None:
    """One prefill, chunks of any size, and token by token give equal logits up to the order of float sums.

    This includes eight bits, where each row has its own scale.
    """
    engine = runtime(architecture, precision)
    embeddings = prompt(runtime(architecture), case(architecture, "wide_text"))[:80]
    whole = engine.forward(embeddings, engine.new_cache(80))
    for cuts in ([1], [30], [30, 31, 70], list(range(1, 80)), [79]):
        cache = engine.new_cache(200)
        for chunk in np.split(embeddings, cuts):
            logits = engine.forward(chunk, cache)
        assert cache.length == 80
        assert relative(logits, whole) < 2e-5


def test_a_long_prompt_is_cut_inside() -> None:
    engine, c = runtime("olmo"), case("olmo", "landscape")
    embeddings = prompt(engine, c)
    assert len(embeddings) > 512
    cache = engine.new_cache(len(embeddings))
    logits = engine.forward(embeddings, cache)
    assert cache.length == len(embeddings)
    assert relative(logits, expected("olmo")[0]["landscape.last_logits"]) < 1e-4


def test_copies_of_a_cache_are_independent() -> None:
    engine = runtime("molmoe")
    scene, a, b = (engine.embed(np.arange(*span)) for span in ((0, 40), (40, 55), (60, 80)))
    base = engine.new_cache(64)
    engine.forward(scene, base)
    first = engine.forward(a, base.copy())
    second = engine.forward(b, base.copy())
    assert base.length == 40
    np.testing.assert_array_equal(engine.forward(a, base.copy()), first)
    for tail, found in ((a, first), (b, second)):
        exact = engine.forward(np.concatenate([scene, tail]), engine.new_cache(64))
        assert relative(found, exact) < 2e-5


def test_logits_are_the_callers_own() -> None:
    engine = runtime("qwen")
    cache = engine.new_cache(2)
    first = engine.forward(engine.embed(np.array([3])), cache)
    kept = first.copy()
    engine.forward(engine.embed(np.array([4])), cache)
    np.testing.assert_array_equal(first, kept)


def test_a_cache_can_be_wound_back() -> None:
    engine = runtime("qwen")
    cache = engine.new_cache(8)
    engine.forward(engine.embed(np.arange(4)), cache)
    first = engine.forward(engine.embed(np.array([9])), cache)
    cache.length = 4
    np.testing.assert_array_equal(engine.forward(engine.embed(np.array([9])), cache), first)


def test_crops_do_not_see_each_other() -> None:
    engine, c = runtime("molmoe", "int8"), case("molmoe", "square")
    together = engine.encode_image(c.crops, c.masks)
    alone = np.concatenate([engine.encode_image(c.crops[k : k + 1], c.masks[k : k + 1]) for k in range(len(c.crops))])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6 * np.abs(alone).max())


@pytest.mark.parametrize("name", CASES)
def test_special_ids_reach_the_table_they_belong_to(name: str) -> None:
    """Qwen's special ids are after the embedding, in new_embedding; those of the others are inside it."""
    ids = case("qwen", name).ids
    assert ids.max() >= runtime("qwen").config.decoder.embedding_size
    assert runtime("qwen").embed(ids).shape == (len(ids), 32)


def test_what_does_not_fit_is_refused() -> None:
    engine = runtime("qwen")
    with pytest.raises(EngineError, match="a cache of 4097 positions was requested"):
        engine.new_cache(4097)
    cache = engine.new_cache(4)
    engine.forward(engine.embed(np.arange(3)), cache)
    with pytest.raises(EngineError, match="do not fit into the cache: 3 of 4"):
        engine.forward(engine.embed(np.arange(2)), cache)
    assert cache.length == 3
    with pytest.raises(EngineError, match="at least one embedding"):
        engine.forward(np.zeros((0, 32), np.float32), cache)
    with pytest.raises(EngineError, match=r"0\.\.527"):
        engine.embed(np.array([528]))
    with pytest.raises(EngineError, match=r"0\.\.527"):
        engine.embed(np.array([-1]))
    with pytest.raises(EngineError, match="vision_encoder failed"):
        engine.encode_crops(np.zeros((1, 3, 588), np.float32))


def test_damaged_bundles_are_refused_by_name(tmp_path: Path) -> None:
    for damage, message in ((b"", "bytes"), (None, "cannot be read")):
        copy = tmp_path / str(damage)
        shutil.copytree(bundle("qwen"), copy)
        if damage is None:
            (copy / "decoder.onnx").unlink()
        else:
            (copy / "decoder.onnx").write_bytes(damage)
        with pytest.raises(BundleError, match=f"decoder.onnx.*{message}"):
            open_runtime(copy)
    copy = tmp_path / "flipped"
    shutil.copytree(bundle("qwen"), copy)
    content = bytearray((copy / "decoder.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "decoder.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="sha256"):
        open_runtime(copy)


def test_a_file_that_is_no_graph_is_one_line(tmp_path: Path) -> None:
    files = {name: bundle("qwen") / f"{name}.onnx" for name in ("vision_encoder", "connector", "embed_tokens")}
    (tmp_path / "decoder.onnx").write_bytes(b"not a graph")
    engine = OnnxRuntime(runtime("qwen").config, {**files, "decoder": tmp_path / "decoder.onnx"})
    with pytest.raises(EngineError, match=r"onnxruntime cannot load .*decoder\.onnx") as error:
        engine.new_cache(4)
    assert "\n" not in str(error.value)
    assert engine.embed(np.array([1])).shape == (1, 32)  # the others work


@pytest.mark.parametrize("device", ["tpu", "cuda"])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(Unavailable):
        open_runtime(bundle("qwen"), device=device)


def test_open_runtime_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="neither a bundle"):
        open_runtime(tmp_path)
    with pytest.raises(EngineError, match="threads must be a positive integer"):
        open_runtime(bundle("qwen"), threads=0)


@pytest.mark.parametrize("engine_name", ["onnx", "torch"])
def test_closed_means_closed(engine_name: str) -> None:
    if engine_name == "torch":
        pytest.importorskip("torch")
    engine = open_runtime(bundle("qwen") if engine_name == "onnx" else GOLDEN / "qwen", threads=1)
    row, cache = engine.embed(np.array([1])), engine.new_cache(4)
    engine.close()
    engine.close()
    for use in (
        lambda: engine.embed(np.array([1])),
        lambda: engine.encode_image(np.zeros((1, 576, 588), np.float32), np.ones((1, 576), np.float32)),
        lambda: engine.new_cache(4),
    ):
        with pytest.raises(EngineError, match="this runtime was closed"):
            use()
    if engine_name == "torch":  # on onnxruntime a cache keeps its session
        with pytest.raises(EngineError, match="this runtime was closed"):
            engine.forward(row, cache)


def test_a_closed_torch_runtime_frees_the_model() -> None:
    pytest.importorskip("torch")
    engine = open_runtime(GOLDEN / "qwen", threads=1)
    model = weakref.ref(engine.model)  # type: ignore[attr-defined]
    engine.close()
    gc.collect()
    assert model() is None


def test_closing_stops_loads_that_have_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a program that failed early would wait at its exit for gigabytes it no longer needs."""
    begun, go_on = [], threading.Event()

    def load(path: Path, *_: object, **__: object) -> object:
        begun.append(path.stem)
        assert go_on.wait(30)
        return object()

    monkeypatch.setattr(onnx_module, "load_session", load)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    files = {path.stem: path for path in bundle("qwen").glob("*.onnx")}
    engine = OnnxRuntime(runtime("qwen").config, files)
    largest = max(files, key=lambda name: files[name].stat().st_size)
    failures: list[str] = []

    def wait() -> None:
        try:
            engine.embed(np.array([1]))
        except EngineError as error:
            failures.append(str(error))

    asked, result = threading.Event(), Future.result

    def ask_for_result(load: Future[Any], timeout: float | None = None) -> Any:
        asked.set()
        return result(load, timeout)

    monkeypatch.setattr(Future, "result", ask_for_result)
    waiting = threading.Thread(target=wait)
    waiting.start()
    assert asked.wait(30), failures
    engine.close()
    waiting.join(30)
    assert failures == ["this runtime was closed"]
    go_on.set()
    for thread in threading.enumerate():
        if thread.name.startswith("molmo-edge-load"):
            thread.join(30)
    assert begun == [largest]


_MEMORY = """
import sys
from pathlib import Path
import numpy as np
from molmo_edge.runtimes.onnx_sessions import load_session

def memory():  # MB of anonymous memory
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) // 1024

x = np.random.default_rng(1).normal(size=(1, 4096)).astype(np.float32)
before = memory()
session = load_session(Path(sys.argv[1]), 1, mapped=sys.argv[2] == "True")
np.save(sys.argv[3], session.run(None, {"x": x})[0])
print(memory() - before)
"""


@pytest.mark.parametrize("precision", [FP32, graph_precision("int8"), graph_precision("q8")])
def test_mapped_weights_stay_in_their_file(precision: Precision, tmp_path: Path) -> None:
    """The trial run of a large export depends on this."""
    if not Path("/proc/self/status").exists():
        pytest.skip("resident memory by kind is read from /proc")
    weight = np.random.default_rng(0).normal(size=(4096, 4096)).astype(np.float32)  # 64 MB, 16 in eight bits
    graph = Graph("one matrix", tmp_path / "graph.onnx.data")
    graph.input("x", np.float32, ["m", 4096])
    y = precision.linear(graph, "x", "matrix", weight, None)
    graph.output(graph.node("Identity", y, name="y"), np.float32, ["m", 4096])
    graph.save(tmp_path / "graph.onnx")
    taken, found = {}, {}
    for mapped in (True, False):  # each in a new process: this one could reuse freed memory
        y_file = tmp_path / f"{mapped}.npy"
        command = [sys.executable, "-c", _MEMORY, str(tmp_path / "graph.onnx"), str(mapped), str(y_file)]
        taken[mapped] = int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
        found[mapped] = np.load(y_file)
    size = (tmp_path / "graph.onnx.data").stat().st_size >> 20
    assert taken[False] - taken[True] > size / 2  # both include the session itself
    assert relative(found[True], found[False]) < 0.02  # q8 multiplies unpacked weights in float
