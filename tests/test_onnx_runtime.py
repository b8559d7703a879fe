"""The onnxruntime engine: one answer however the positions arrive, and clear refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from exported import ARCHITECTURES, CASES, bundle, case, expected, prompt, relative, runtime

from molmo_edge.bundle import BundleError
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.runtimes import EngineError, Unavailable, open_runtime
from molmo_edge.runtimes.onnx import OnnxRuntime


@pytest.mark.parametrize("precision", ["fp32", "int8", "q8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_equals_uncached(architecture: str, precision: str) -> None:
    """One prefill, chunks of any size, token by token: the same logits. Also in eight bits, where each row has
    its own scale; what is left is the order of float sums."""
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
    """Qwen's special ids lie behind the embedding, in new_embedding; the others' inside of it."""
    ids = case("qwen", name).ids
    assert ids.max() >= runtime("qwen").config.decoder.embedding_size
    assert runtime("qwen").embed(ids).shape == (len(ids), 32)


def test_what_does_not_fit_is_refused() -> None:
    engine = runtime("qwen")
    with pytest.raises(EngineError, match="4097 positions were asked for"):
        engine.new_cache(4097)
    cache = engine.new_cache(4)
    engine.forward(engine.embed(np.arange(3)), cache)
    with pytest.raises(EngineError, match="do not fit: 3 of 4"):
        engine.forward(engine.embed(np.arange(2)), cache)
    assert cache.length == 3
    with pytest.raises(EngineError, match="nothing to run"):
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
    with pytest.raises(EngineError, match=r"decoder\.onnx cannot be loaded") as error:
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
    with pytest.raises(EngineError, match="at least 1"):
        open_runtime(bundle("qwen"), threads=0)


def test_closed_means_closed() -> None:
    engine = open_runtime(bundle("qwen"), threads=1)
    engine.embed(np.array([1]))
    engine.close()
    engine.close()
    with pytest.raises(MolmoEdgeError, match="closed"):
        engine.embed(np.array([1]))
