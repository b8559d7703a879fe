"""Memory that a bundle's mapped weights do not fit into: what is mapped, what is refused, and what is released."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exported import gguf_bundle
from kernel_graphs import experts_node, save
from once import once

from molmo_edge import Molmo
from molmo_edge.checkpoints.bundle import Bundle, open_bundle
from molmo_edge.errors import EngineError
from molmo_edge.export import export_bundle
from molmo_edge.presets import PRESETS
from molmo_edge.runtimes import kernels
from molmo_edge.runtimes.bundle_room import memory_is_scarce
from molmo_edge.runtimes.choose_engine import check_model_room
from molmo_edge.runtimes.memory_plan import CHUNK, SCARCE_CHUNK, bundle_weights, bundle_weights_of, predict
from molmo_edge.runtimes.onnx import OnnxRuntime
from molmo_edge.runtimes.onnx_sessions import load_session
from molmo_edge.system.memory import RoomError, forget_mapped


def test_the_mapped_bytes_are_those_of_the_nodes_that_the_kernels_compute(tmp_path: Path) -> None:
    def mapped_bytes(**changed: Any) -> int:
        """Of four experts, 256 wide, and a router, which no kernel computes."""
        node, weights = experts_node(256, 128, 4, 2, 128, False, **changed)
        router = onnx.helper.make_node("MatMul", ["x", "router"], ["p"])
        weights["router"] = np.zeros((256, 4), np.float32)
        return kernels.mapped_bytes(save(tmp_path / "experts.onnx", [router, node], {"x": 256}, weights))

    assert mapped_bytes() == 4 * (256 * 256 // 2 + 256 * 128 // 2 + 2 * (256 * 2 + 256 * 1))
    assert mapped_bytes(accuracy_level=0) == 0
    (tmp_path / "damaged.onnx").write_bytes(b"\xff\xff")
    assert kernels.mapped_bytes(tmp_path / "damaged.onnx") == 0


@pytest.mark.parametrize(("model", "precision"), [("molmoe-1b", "mixed"), ("molmo2-4b", "mixed"), ("molmo2-4b", "q4")])
def test_the_kernels_move_weights_from_resident_to_mapped(model: str, precision: str) -> None:
    without = bundle_weights_of(PRESETS[model], precision)
    with_kernels = bundle_weights_of(PRESETS[model], precision, kernels=True)
    assert not without.mapped
    assert with_kernels.stored == without.stored
    moved = without.resident - with_kernels.resident
    assert moved == pytest.approx(1.12 * sum(with_kernels.mapped.values()), rel=1e-6)
    plan = predict(PRESETS[model], with_kernels)
    assert plan.needed == plan.peak - sum(with_kernels.mapped.values())
    assert plan.loading < plan.peak


def test_a_precision_of_eight_bits_is_planned_alike() -> None:
    config = PRESETS["molmoe-1b"]
    assert bundle_weights_of(config, "q8", kernels=True) == bundle_weights_of(config, "q8")
    assert bundle_weights_of(config, "q4_k_m", kernels=True) == bundle_weights_of(config, "q4_k_m")


@pytest.fixture(scope="module")
def large_bundle(golden: Path) -> Path:
    """A bundle in four bits whose weights lie beside its graphs, as those of a large model."""

    def write(out: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("molmo_edge.export.component_graphs.SIDECAR_ABOVE", 0)
            patch.setattr("molmo_edge.export.graph_builder.INLINE_BELOW", 512)
            export_bundle(golden / "molmoe", out, "q4", measure=False)

    return once("large-q4", write)


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that read four-bit weights from the mapped file."""
    monkeypatch.setattr("molmo_edge.runtimes.bundle_room.map_weights", lambda: True)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Fake a number of free bytes of memory."""
    return lambda count: monkeypatch.setattr("molmo_edge.system.memory.meminfo", lambda: {"MemAvailable": count})


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether memory was scarce, for each OnnxRuntime that is opened."""
    found: list[bool] = []

    def watch(*arguments: Any, **options: Any) -> OnnxRuntime:
        found.append(options.get("scarce", False))
        return OnnxRuntime(*arguments, **options)

    for module in ("onnx", "llama"):
        monkeypatch.setattr(f"molmo_edge.runtimes.{module}.OnnxRuntime", watch)
    return found


@pytest.mark.usefixtures("mapped")
def test_what_the_kernels_read_is_not_refused(
    large_bundle: Path, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped pages need not fit: a model is refused for what has to be in memory."""
    bundle = open_bundle(large_bundle)
    without, weights = bundle_weights(bundle), bundle_weights(bundle, kernels=True)
    assert weights.resident < without.resident
    free(weights.resident + weights.largest)
    check_model_room(large_bundle, device="cpu")
    free(weights.resident + weights.largest - 1)
    with pytest.raises(RoomError, match=r"needs at least .* are free"):
        check_model_room(large_bundle, device="cpu")
    free(weights.resident + weights.largest)
    monkeypatch.setattr("molmo_edge.runtimes.bundle_room.map_weights", lambda: False)
    with pytest.raises(RoomError, match=r"needs at least .* are free"):
        check_model_room(large_bundle, device="cpu")


@pytest.mark.usefixtures("mapped")
def test_an_old_onnxruntime_maps_nothing(
    cli: Any, large_bundle: Path, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the plan nor when the bundle is opened."""

    def mapped_parts() -> list[str]:
        (found,) = json.loads(cli("plan", large_bundle, "--memory", "4GB", "--json")[1])["plans"]
        return [part for part in found["parts"] if part.startswith("mapped")]

    assert mapped_parts() == ["mapped file: decoder"]
    monkeypatch.setattr("onnxruntime.__version__", "1.21.1")
    assert not mapped_parts()
    weights = bundle_weights(open_bundle(large_bundle), kernels=True)
    free(weights.resident + weights.largest)
    with pytest.raises(RoomError):
        check_model_room(large_bundle, device="cpu")


def test_a_small_bundle_does_not_load_the_kernels(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def installed() -> None:
        raise AssertionError("the kernels were loaded")

    monkeypatch.setattr("molmo_edge.runtimes.kernels.installed", installed)
    with Molmo(tiny_bundle, threads=1) as molmo:
        assert molmo.engine.runtime.embed(np.array([1])).shape == (1, molmo.config.decoder.d_model)


@pytest.mark.usefixtures("mapped")
def test_a_large_graph_is_weighed_once(large_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weighed: list[Path] = []

    def watch(path: Path) -> int:
        weighed.append(path)
        return kernels.mapped_bytes(path)

    monkeypatch.setattr("molmo_edge.runtimes.memory_plan.mapped_bytes", watch)
    with Molmo(large_bundle, threads=1, device="cpu") as molmo:
        assert molmo.config.decoder.d_model
    assert len(weighed) == 1


@pytest.mark.usefixtures("mapped")
def test_memory_is_scarce_for_the_callers_crops(
    large_bundle: Path, free: Callable[[int], None], opened: list[bool]
) -> None:
    bundle = open_bundle(large_bundle)
    weights = bundle_weights(bundle, kernels=True)
    small, usual = (predict(bundle.config, weights, max_crops=crops).peak for crops in (1, None))
    assert small < usual
    for memory, expected in ((small, [False, True]), (small - 1, [True, True]), (usual, [False, False])):
        free(memory)
        opened.clear()
        for crops in (1, None):
            Molmo(large_bundle, threads=1, device="cpu", max_crops=crops).close()
        assert opened == expected


def test_memory_is_scarce_for_the_callers_image_tokens_and_cache(free: Callable[[int], None]) -> None:
    config = PRESETS["molmoe-1b"]
    mapped = bundle_weights_of(config, "mixed", kernels=True)
    free(predict(config, mapped, image_tokens=0.25).peak)
    assert memory_is_scarce(config, mapped)
    assert memory_is_scarce(config, mapped, image_tokens=0.5)
    assert not memory_is_scarce(config, mapped, image_tokens=0.25)
    assert not memory_is_scarce(config, bundle_weights_of(config, "mixed"))
    assert not memory_is_scarce(config, None)
    gguf = bundle_weights_of(config, "q4_k_m")
    free(predict(config, gguf, cache="q8_0").peak)
    assert memory_is_scarce(config, gguf)
    assert not memory_is_scarce(config, gguf, cache="q8_0")


def test_a_model_in_llama_cpp_is_told_that_memory_is_scarce(free: Callable[[int], None], opened: list[bool]) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    path = gguf_bundle("molmoe", "f32")
    bundle = open_bundle(path)
    peak = predict(bundle.config, bundle_weights(bundle), max_crops=1).peak
    opened.clear()  # the export opens the graphs, too
    for memory in (peak, peak - 1):
        free(memory)
        Molmo(path, threads=1, device="cpu", max_crops=1).close()
    assert opened == [False, True]


def test_longer_parts_of_a_prompt_are_planned() -> None:
    config = PRESETS["molmoe-1b"]
    weights = bundle_weights_of(config, "mixed", kernels=True)
    usual, long = (predict(config, weights, chunk=chunk).parts["working memory"] for chunk in (CHUNK, SCARCE_CHUNK))
    assert SCARCE_CHUNK > CHUNK
    assert usual < long < 2 * usual


def test_answers_are_equal_where_memory_is_scarce(
    tiny_bundle: Path, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vision tower is loaded again for each image."""
    loaded: list[str] = []

    def watch(path: Path, *arguments: Any, **options: Any) -> Any:
        loaded.append(path.stem)
        return load_session(path, *arguments, **options)

    monkeypatch.setattr("molmo_edge.runtimes.onnx.load_session", watch)
    bundle = open_bundle(tiny_bundle)
    files = {name: bundle.path(name) for name in ("vision_encoder", "connector", "embed_tokens", "decoder")}
    usual = Molmo(tiny_bundle)
    loaded.clear()
    scarce = Molmo.from_parts(OnnxRuntime(bundle.config, files, scarce=True), usual.engine.tokenizer)
    for question in ("What?", "Where?"):
        expected = usual.ask(golden / "astronaut.png", question, max_new_tokens=4)
        assert scarce.ask(golden / "astronaut.png", question, max_new_tokens=4).token_ids == expected.token_ids
    counts = {name: sum(one.startswith(name) for one in loaded) for name in ("vision_encoder", "decoder")}
    assert counts == {"vision_encoder": 2, "decoder": 1}
    scarce.close()
    with pytest.raises(EngineError, match="closed"):
        scarce.ask(golden / "astronaut.png", "What?")


def watched(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> OnnxRuntime:
    """A runtime of scarce memory, whose sessions `load` opens."""
    monkeypatch.setattr("molmo_edge.runtimes.onnx.load_session", load)
    names = ("vision_encoder", "connector", "embed_tokens", "decoder")
    return OnnxRuntime(bundle.config, {name: bundle.path(name) for name in names}, threads=1, scarce=True)


def crops_of(bundle: Bundle, count: int) -> np.ndarray:
    image = bundle.config.image
    shape = (count, image.patches**2, image.patch_size**2 * 3)
    return np.random.default_rng(count).normal(size=shape).astype(np.float32)


class Towers:
    """Load sessions; count those of the vision tower that were loaded, and those that are still open."""

    def __init__(self) -> None:
        self.loads, self.open = 0, weakref.WeakSet[Any]()
        self.error: Exception | None = None

    def __call__(self, path: Path, *arguments: Any, **options: Any) -> Any:
        if not path.stem.startswith("vision_encoder"):
            return load_session(path, *arguments, **options)
        self.loads += 1
        if self.error is not None:
            raise self.error
        session = load_session(path, *arguments, **options)
        self.open.add(session)
        return session


def test_the_tower_is_closed_after_an_error(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, towers = open_bundle(tiny_bundle), Towers()
    runtime = watched(bundle, monkeypatch, towers)
    with pytest.raises(EngineError, match="vision_encoder failed"):
        runtime.encode_crops(np.zeros((1, 3, 588), np.float32))
    gc.collect()
    assert (towers.loads, len(towers.open)) == (1, 0)
    assert len(runtime.encode_crops(crops_of(bundle, 1))) == 1
    gc.collect()
    assert (towers.loads, len(towers.open)) == (2, 0)


def test_a_tower_that_did_not_load_is_loaded_again(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that was missing may be free later."""
    bundle, towers = open_bundle(tiny_bundle), Towers()
    runtime, crops = watched(bundle, monkeypatch, towers), crops_of(bundle, 1)
    expected = runtime.encode_crops(crops)
    towers.error = EngineError("no memory is left")
    for _ in range(2):
        with pytest.raises(EngineError, match="no memory is left"):
            runtime.encode_crops(crops)
    towers.error = None
    np.testing.assert_array_equal(runtime.encode_crops(crops), expected)
    assert towers.loads == 4


def test_threads_that_encode_at_once_get_their_own_features(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each closes the tower that the others use."""
    bundle, towers = open_bundle(tiny_bundle), Towers()
    runtime = watched(bundle, monkeypatch, towers)
    given = [crops_of(bundle, count) for count in (1, 2, 3)]
    expected = [runtime.encode_crops(crops) for crops in given]
    with ThreadPoolExecutor(len(given)) as pool:
        for found, exact in zip(pool.map(runtime.encode_crops, 2 * given), 2 * expected, strict=True):
            np.testing.assert_array_equal(found, exact)
    gc.collect()
    assert not towers.open
    runtime.close()
    with pytest.raises(EngineError, match="closed"):
        runtime.encode_crops(given[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_that_were_copied_are_freed(tmp_path: Path) -> None:
    path = tmp_path / "weights of a model.data"
    path.write_bytes(bytes(range(256)) * 4096)

    def resident(mapping: np.ndarray) -> int:
        begin, inside = f"{mapping.ctypes.data:x}-", False
        for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
            if "-" in line.split()[0]:
                inside = line.startswith(begin)
            elif inside and line.startswith("Rss:"):
                return int(line.split()[1])
        raise AssertionError("not mapped")

    mapping = np.memmap(path, np.uint8, "c")
    assert mapping.astype(np.int64).sum() == 4096 * 255 * 128
    before = resident(mapping)
    forget_mapped(path)
    assert resident(mapping) < before / 2
    assert mapping[-1] == 255
