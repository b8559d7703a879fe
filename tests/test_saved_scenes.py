"""Scenes in files: equal answers on every engine, and every other file is refused."""

from __future__ import annotations

import functools
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from molmo_edge import Molmo, MolmoEdgeError, Scene, Video
from molmo_edge.sdk.scene_file import SceneFileError
from molmo_edge.system.tensor_files import TensorFileError, read_arrays, read_metadata, write_arrays

GOLDEN, GOLDEN2 = Path(__file__).parent / "golden", Path(__file__).parent / "golden2"
RNG = np.random.default_rng(3)
PHOTO = RNG.integers(0, 255, (90, 120, 3), np.uint8)
QUESTION = "Point to the helmet."


def onnx(tiny_bundle: Path) -> Molmo:
    return Molmo(tiny_bundle, threads=1, max_crops=1)


def pytorch(name: str, precision: str = "fp32") -> Molmo:
    pytest.importorskip("torch")
    return Molmo((GOLDEN if name == "molmoe" else GOLDEN2) / name, threads=1, max_crops=1, precision=precision)


def llama(_: Path) -> Molmo:
    pytest.importorskip("llama_cpp")
    from exported import EXACT, gguf_bundle

    return Molmo(gguf_bundle("molmoe", "f32"), threads=1, engine_options=EXACT, max_crops=1)


ENGINES: dict[str, Callable[[Path], Molmo]] = {
    "onnxruntime": onnx,
    "pytorch fp32": lambda _: pytorch("molmoe"),
    "pytorch bf16": lambda _: pytorch("molmoe", "bf16"),
    "llama.cpp": llama,
}


def without_vision(monkeypatch: pytest.MonkeyPatch, molmo: Molmo) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("vision was run")

    monkeypatch.setattr(molmo.engine.runtime, "encode_image", refuse, raising=False)
    monkeypatch.setattr(molmo.engine.runtime, "encode_crops", refuse, raising=False)


def same_answers(molmo: Molmo, scene: Scene, other: Molmo, loaded: Scene) -> None:
    here = molmo.ask(scene, QUESTION, max_new_tokens=12)
    there = other.ask(loaded, QUESTION, max_new_tokens=12)
    assert here.token_ids == there.token_ids
    assert here.points == there.points
    assert all(np.array_equal(a, b) for a, b in zip(here.images, there.images, strict=True))
    assert there.usage.tokens.prefilled < there.usage.tokens.image


@pytest.mark.parametrize("kind", ENGINES)
def test_a_loaded_scene_answers_like_the_saved_one_on_every_engine(
    kind: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = functools.partial(ENGINES[kind], tiny_bundle)
    with make() as molmo, make() as other:
        scene = molmo.encode(PHOTO)
        scene.save(tmp_path / "scene")
        without_vision(monkeypatch, other)
        loaded = other.load_scene(tmp_path / "scene")
        same_answers(molmo, scene, other, loaded)
        assert np.array_equal(scene.embeddings, loaded.embeddings)
        texts = [other.chat(loaded).ask(question, max_new_tokens=5).token_ids for question in (QUESTION, "Why?")]
        assert texts == [molmo.chat(scene).ask(question, max_new_tokens=5).token_ids for question in (QUESTION, "Why?")]
        long = other.ask(other.load_scene(tmp_path / "scene", room=0), QUESTION, max_new_tokens=30)
        assert long.token_ids == molmo.ask(PHOTO, QUESTION, max_new_tokens=30).token_ids


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("molmo2_qwen3", [PHOTO, PHOTO[:40, :70]]),
        ("molmo2_qwen3", Video([PHOTO, PHOTO[::-1].copy(), PHOTO // 2], fps=1.0)),
        ("molmo_point", [PHOTO, PHOTO[:40, :70]]),
        ("molmo_point", Video([PHOTO, PHOTO[::-1].copy(), PHOTO // 2], fps=1.0)),
    ],
)
def test_several_images_and_videos(name: str, shown: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytorch(name) as molmo, pytorch(name) as other:
        scene = molmo.encode(shown)
        scene.save(tmp_path / "scene")
        without_vision(monkeypatch, other)
        loaded = other.load_scene(tmp_path / "scene")
        same_answers(molmo, scene, other, loaded)
        assert loaded.shown.times == scene.shown.times
        assert repr(loaded) == repr(scene)


@pytest.fixture(scope="module")
def saved(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "photo.scene"
    with onnx(tiny_bundle) as molmo:
        molmo.encode(PHOTO).save(path)
    return path


@pytest.fixture(scope="module")
def molmo(tiny_bundle: Path) -> Molmo:
    return onnx(tiny_bundle)


def rewritten(saved: Path, path: Path, *, facts: dict[str, Any] | None = None, **metadata: str) -> Path:
    """A copy of `saved` with other metadata, whose hash is right."""
    arrays, found = read_arrays(saved)
    scene = json.loads(found["scene"]) | (facts or {})
    write_arrays(path, arrays, found | {"scene": json.dumps(scene)} | metadata)
    return path


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_or_truncated_file_is_refused(data: st.DataObject, saved: Path, molmo: Molmo, tmp_path: Path) -> None:
    contents = bytearray(saved.read_bytes())
    header = 8 + struct.unpack("<Q", contents[:8])[0]
    if data.draw(st.booleans()):
        del contents[data.draw(st.integers(0, len(contents) - 1)) :]
    else:
        place = data.draw(st.one_of(st.integers(0, header - 1), st.integers(header, len(contents) - 1)))
        contents[place] ^= data.draw(st.integers(1, 255))
    (tmp_path / "damaged").write_bytes(contents)
    with pytest.raises(SceneFileError, match=str(tmp_path / "damaged")):
        molmo.load_scene(tmp_path / "damaged")


def test_files_of_another_version_kind_model_or_engine_are_refused(saved: Path, molmo: Molmo, tmp_path: Path) -> None:
    path = tmp_path / "other"
    for metadata, message in (
        ({"format_version": "3"}, "pip install --upgrade molmo-edge"),
        ({"format_version": "x"}, "format version x"),
        ({"format": "pt"}, "not the file of a scene"),
        ({"model": "0" * 64}, "saved with another model"),
        ({"engine": "pytorch fp32"}, "saved with pytorch fp32, and the model runs on onnxruntime"),
        ({"scene": "[]"}, "incomplete or damaged"),
        ({"scene": "{"}, "incomplete or damaged"),
    ):
        with pytest.raises(SceneFileError, match=message):
            molmo.load_scene(rewritten(saved, path, **metadata))
    for facts in (
        {"crops": -1},
        {"images": 2},
        {"images": "1"},
        {"times": [0.0, 1.0]},
        {"times": [float("nan")]},
        {"frame_size": [1]},
        {"grounding": {}},
    ):
        with pytest.raises(SceneFileError, match="incomplete or damaged"):
            molmo.load_scene(rewritten(saved, path, facts=facts))
    path.write_bytes(b"\x89PNG" + bytes(200))
    with pytest.raises(SceneFileError, match="not in the safetensors format"):
        molmo.load_scene(path)
    with pytest.raises(SceneFileError, match="No such file"):
        molmo.load_scene(tmp_path / "missing")
    with pytest.raises(MolmoEdgeError, match="room must be"):
        molmo.load_scene(saved, room=-1)


def test_arrays_that_do_not_fit_the_model_are_refused(saved: Path, molmo: Molmo, tmp_path: Path) -> None:
    arrays, metadata = read_arrays(saved)
    cached = next(name for name in arrays if name.startswith("cache."))
    changes: list[dict[str, np.ndarray | None]] = [
        {"embeddings": arrays["embeddings"][:, :-1]},
        {"embeddings": arrays["embeddings"][:-1]},
        {"embeddings": np.zeros((0, arrays["embeddings"].shape[1]), np.float32), "flags": np.zeros(0, bool)},
        {"flags": None},
        {"image.0": arrays["image.0"][0]},
        {"image.0": arrays["image.0"].astype(np.float32)},
        {cached: arrays[cached][:, :, :-1]},
        {cached: arrays[cached].astype(np.float16)},
        {cached: None},
    ]
    for change in changes:
        kept = {name: array for name, array in (arrays | change).items() if array is not None}
        write_arrays(tmp_path / "other", kept, metadata)
        with pytest.raises(SceneFileError, match=r"incomplete or damaged|do(es)? not fit"):
            molmo.load_scene(tmp_path / "other")


def test_a_changed_checkpoint_refuses_its_old_scenes(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import shutil

    shutil.copytree(GOLDEN / "molmoe", tmp_path / "model", ignore=shutil.ignore_patterns("expected*"))
    with Molmo(tmp_path / "model", threads=1, max_crops=1, precision="fp32") as molmo:
        molmo.encode(PHOTO).save(tmp_path / "scene")
        molmo.load_scene(tmp_path / "scene")
    with (tmp_path / "model" / "model.safetensors").open("r+b") as weights:
        weights.seek(-4, 2)  # another weight in a file of the same size
        weights.write(b"\0\0\0\x01")
    with (
        Molmo(tmp_path / "model", threads=1, max_crops=1, precision="fp32") as molmo,
        pytest.raises(SceneFileError, match="another model"),
    ):
        molmo.load_scene(tmp_path / "scene")


def test_a_failed_save_leaves_the_old_file(saved: Path, molmo: Molmo, tmp_path: Path) -> None:
    scene = molmo.load_scene(saved)
    with pytest.raises(OSError, match="missing"):
        scene.save(tmp_path / "missing" / "scene")
    before = saved.read_bytes()
    scene.save(saved)
    assert saved.read_bytes() == before  # and saving is reproducible
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_model_made_from_parts_cannot_save(molmo: Molmo, tmp_path: Path) -> None:
    parts = Molmo.from_parts(molmo.engine.runtime, molmo.engine.tokenizer, max_crops=1)
    with pytest.raises(SceneFileError, match="made from parts"):
        parts.encode(PHOTO).save(tmp_path / "scene")


def test_a_fresh_process_answers_equally(saved: Path, molmo: Molmo, tiny_bundle: Path) -> None:
    code = (
        "import sys; from molmo_edge import Molmo; molmo = Molmo(sys.argv[1], threads=1);"
        "print(*molmo.ask(molmo.load_scene(sys.argv[2]), sys.argv[3], max_new_tokens=8).token_ids)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tiny_bundle, saved, QUESTION], capture_output=True, text=True, check=True
    )
    expected = molmo.ask(PHOTO, QUESTION, max_new_tokens=8).token_ids
    assert done.stdout.split() == [str(token) for token in expected]


def test_arrays_of_all_kinds_survive_and_a_hostile_header_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "arrays"
    arrays = {
        dtype: np.arange(6).reshape(2, 3).astype(dtype)
        for dtype in ("float32", "float16", "int64", "int32", "int16", "uint8", "bool")
    } | {"empty": np.empty((0, 4), np.int64), "strided": np.arange(12, dtype=np.float32)[::2]}
    write_arrays(path, arrays, {"a": "b"})
    found, metadata = read_arrays(path)
    assert metadata == {"a": "b"}
    assert read_metadata(path)["a"] == "b"
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
    from safetensors.numpy import load_file

    assert np.array_equal(load_file(path)["float16"], arrays["float16"])
    huge = [1 << 40, 1 << 20]
    for entry in (
        {"dtype": "F32", "shape": huge, "data_offsets": [0, 4 * huge[0] * huge[1]]},
        {"dtype": "F32", "shape": huge, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
        {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        {"dtype": [], "shape": [2], "data_offsets": [0, 8]},
        "nothing",
    ):
        text = json.dumps({"x": entry}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
        with pytest.raises(TensorFileError):
            read_arrays(path)
    path.write_bytes(struct.pack("<Q", 1 << 60) + bytes(8))
    with pytest.raises(TensorFileError):
        read_metadata(path)
