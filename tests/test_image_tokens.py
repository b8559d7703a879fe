"""Fewer image tokens: equal to the reference model with the others masked out, and counted everywhere."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from exported import bundle, gguf_bundle, gguf_runtime
from once import once

from molmo_edge import Molmo, MolmoEdgeError
from molmo_edge.config import ConfigError
from molmo_edge.errors import EngineError, Unavailable
from molmo_edge.export import export_bundle
from molmo_edge.frontend.prompts import text_ids
from molmo_edge.modeling.decoder import image_attention_mask
from molmo_edge.runtimes.memory_plan import bundle_weights_of, predict
from molmo_edge.runtimes.slot_positions import slot_positions
from molmo_edge.runtimes.torch import TorchRuntime
from molmo_edge.sdk.image_tokens import SCORES, ImageTokens, kept_tokens
from molmo_edge.sdk.scene_file import SceneFileError

HERE = Path(__file__).parent
GOLDEN = {name: HERE / "golden" / name for name in ("molmoe", "qwen", "olmo")}
GOLDEN |= {name: HERE / "golden2" / name for name in ("molmo2_qwen3", "molmo2_olmo3", "molmo_point")}
PHOTO = np.random.default_rng(3).integers(0, 255, (90, 120, 3), np.uint8)
QUESTION = "Point to the helmet."
HALF = ImageTokens(0.5)


@functools.cache
def exported(name: str, kind: str) -> Path:
    """A golden checkpoint, or its bundle: "onnx", or "plain" in standard operators."""
    if kind == "pytorch":
        return GOLDEN[name]
    if (name, kind) == ("molmoe", "onnx"):
        return bundle(name)
    return once(f"{name}-tokens-{kind}", lambda out: export_bundle(GOLDEN[name], out, "fp32", plain=kind == "plain"))


@functools.cache
def opened(name: str, kind: str = "pytorch", tokens: float | ImageTokens | None = HALF) -> Molmo:
    return Molmo(exported(name, kind), threads=1, max_crops=1, image_tokens=tokens)


@functools.cache
def reference(name: str) -> Any:
    return TorchRuntime(GOLDEN[name], precision="fp32", threads=1).model


def following(molmo: Molmo, image: Any = PHOTO) -> tuple[Any, np.ndarray, np.ndarray]:
    """The scene, the ids of a question and three tokens, and the logits after the question and each of them."""
    engine = molmo.engine
    scene = engine.prefill(engine.scene(image), 64)
    ids = np.append(text_ids(engine.tokenizer, [QUESTION]), [17, 23, 42])
    rows, cache = engine.runtime.embed(ids), scene.cache
    assert cache is not None
    logits = [engine.runtime.forward(rows[:-3], cache)]
    logits += [engine.runtime.forward(rows[-3 + i :][:1], cache) for i in range(3)]
    return scene, ids, np.stack(logits)


def masked(name: str, kept: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The same logits of the PyTorch model over ALL tokens, which attend to none of those that are not `kept`."""
    engine = opened(name, tokens=None).engine
    scene, model = engine.scene(PHOTO), reference(name)
    rows = np.concatenate([scene.embeddings, engine.runtime.embed(ids)])
    flags = torch.from_numpy(scene.image_flags(len(ids)))[None]
    if not engine.config.decoder.bidirectional_images:
        flags = torch.zeros_like(flags)
    mask = image_attention_mask(flags)
    mask[..., np.setdiff1d(np.arange(len(scene.embeddings)), kept)] = False
    with torch.inference_mode():
        states = model.decoder(torch.from_numpy(rows)[None], mask=mask)[0, -4:]
        return np.asarray(model.decoder.logits(states).float())


def difference(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.abs(found - exact).max() / np.abs(exact).max())


EXPORTED = ("molmoe", "molmo2_olmo3", "molmo_point")  # experts; YaRN in some layers and both directions; grounding


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "pytorch") for name in GOLDEN), *((name, "onnx") for name in EXPORTED), ("molmo2_olmo3", "plain")],
)
def test_leaving_out_tokens_equals_masking_them(name: str, kind: str) -> None:
    scene, ids, logits = following(opened(name, kind))
    assert scene.dropped > 60
    exact = masked(name, scene.positions, ids)
    assert difference(logits, exact) < 1e-5
    # With all tokens the logits differ.
    assert difference(masked(name, np.arange(scene.end), ids), exact) > 1e-4


def test_without_original_positions_the_kept_tokens_are_counted_anew() -> None:
    exact = following(opened("molmo2_qwen3"))
    scene, _, logits = following(opened("molmo2_qwen3", tokens=ImageTokens(0.5, original_positions=False)))
    assert len(scene.embeddings) == scene.end == len(exact[0].embeddings)
    assert difference(logits, exact[2]) > 1e-4


@pytest.mark.parametrize(("name", "kind"), [("molmoe", "pytorch"), ("molmoe", "onnx"), ("molmo2_olmo3", "onnx")])
def test_keeping_all_tokens_changes_nothing(name: str, kind: str) -> None:
    before, after = following(opened(name, kind, None)), following(opened(name, kind, ImageTokens(1.0)))
    np.testing.assert_array_equal(before[0].embeddings, after[0].embeddings)
    np.testing.assert_array_equal(before[2], after[2])
    assert opened(name, kind, 1.0).engine.image_tokens is None


def test_a_share_of_each_view_stays_with_all_markers() -> None:
    engine = opened("molmoe", tokens=None).engine
    prompt_ids = engine.process(PHOTO).tokens
    ids, special = np.append(engine.tokenizer.special.bos, prompt_ids), engine.tokenizer.special
    cells = np.flatnonzero(ids == special.im_patch)
    features = np.random.default_rng(0).standard_normal((len(cells), 8)).astype(np.float32)
    for score in SCORES:
        for share in (0.001, 0.3, 0.5, 1.0):
            kept = kept_tokens(ids, special, cells, features, ImageTokens(share, score))
            assert kept[ids != special.im_patch].all()
            ends = np.flatnonzero(ids == special.im_end)
            counts = [int(kept[cells[(cells > a) & (cells < b)]].sum()) for a, b in ((0, ends[0]), (ends[0], ends[1]))]
            sizes = [int(((cells > a) & (cells < b)).sum()) for a, b in ((0, ends[0]), (ends[0], ends[1]))]
            assert counts == [max(1, round(share * size)) for size in sizes]


def test_scores_keep_what_they_say() -> None:
    special = opened("molmoe", tokens=None).engine.tokenizer.special
    ids, cells = np.full(8, special.im_patch), np.arange(8)
    features = np.tile(np.array([[1.0, 0.0]], np.float32), (8, 1))
    features[2], features[5], features[6] = (0, 3), (0, 3.1), (-0.5, 0)

    def kept(score: str, count: int) -> list[int]:
        return np.flatnonzero(kept_tokens(ids, special, cells, features, ImageTokens(count / 8, score))).tolist()

    assert kept("norm", 2) == [2, 5]
    assert kept("distinct", 1) == [6]
    assert len(set(kept("spread", 3)) & {2, 5}) == 1  # one of two equal directions
    assert kept("even", 4) == [1, 3, 5, 7]


def test_chats_scenes_and_files_continue_after_the_original_last_position(tmp_path: Path) -> None:
    for kind in ("pytorch", "onnx"):
        molmo = opened("molmoe", kind)
        scene = molmo.encode(PHOTO)
        whole = len(opened("molmoe", tokens=None).encode(PHOTO).embeddings)
        assert scene.end == whole == len(scene.embeddings) + scene.dropped
        assert f"{scene.dropped} image tokens left out" in repr(scene)
        fresh = molmo.ask(PHOTO, QUESTION, max_new_tokens=6)
        assert fresh.usage.tokens.dropped == scene.dropped
        assert fresh.usage.tokens.image == len(scene.embeddings)
        assert fresh.to_dict()["usage"]["tokens"]["dropped"] == scene.dropped
        assert molmo.ask(scene, QUESTION, max_new_tokens=6) == fresh
        scene.save(tmp_path / kind)
        loaded = molmo.load_scene(tmp_path / kind)
        assert molmo.ask(loaded, QUESTION, max_new_tokens=6) == fresh
        assert loaded.dropped == scene.dropped
        assert molmo.ask_batch([(loaded, QUESTION), (PHOTO, QUESTION)], max_new_tokens=6) == [fresh, fresh]
        chat = molmo.chat(loaded)
        assert chat.ask(QUESTION, max_new_tokens=6) == fresh
        again = chat.ask("And now?", max_new_tokens=6)
        alone = molmo.ask(PHOTO, "And now?", max_new_tokens=6, history=[(QUESTION, fresh.text)])
        assert again.usage.tokens.prompt >= alone.usage.tokens.prompt - 8
        assert chat.positions == scene.end + again.usage.tokens.prompt + 6 + 1
    assert (
        "dropped" not in opened("molmoe", tokens=None).ask(PHOTO, "A?", max_new_tokens=1).to_dict()["usage"]["tokens"]
    )


def test_the_context_ends_at_the_original_positions() -> None:
    molmo = opened("molmoe")
    scene = molmo.encode(PHOTO, room=10**6)
    assert scene.cache is not None
    assert scene.cache.capacity == molmo.config.decoder.max_position_embeddings - scene.dropped


def test_grounding_tokens_choose_only_kept_patches() -> None:
    molmo, every = opened("molmo_point"), opened("molmo_point", tokens=None)
    scene, full = molmo.encode(PHOTO), every.encode(PHOTO)
    assert scene.grounding is not None
    assert full.grounding is not None
    assert scene.grounding.states is not None
    assert len(scene.grounding.states) == len(scene.embeddings)
    left_out = ~np.isin(scene.grounding.positions, scene.positions)
    assert left_out.sum() == scene.dropped
    begun, complete = scene.grounding.begin(scene.grounding.states), full.grounding.begin(np.zeros((1, 1), np.float32))
    assert scene.grounding.token_ids == full.grounding.token_ids
    np.testing.assert_array_equal(begun.positions, complete.positions)
    np.testing.assert_array_equal(begun.selectable[: len(left_out)], complete.selectable[: len(left_out)] & ~left_out)


def test_llama_cpp_itself_refuses_gaps() -> None:
    pytest.importorskip("llama_cpp")
    runtime = gguf_runtime("molmoe", "f32")
    rows = runtime.embed(np.arange(4))
    context = runtime.new_cache(16).context
    sequence = context.new_sequence()
    assert sequence is not None
    context.run(sequence, rows, 0)
    with pytest.raises(EngineError, match="positions"):  # once it does not, gaps can be supported
        context.run(sequence, rows, 6)


def test_llama_cpp_is_refused_in_a_sentence(cli: Any) -> None:
    pytest.importorskip("llama_cpp")
    model = gguf_bundle("molmoe", "f32")
    with pytest.raises(Unavailable, match="refuses positions with gaps"):
        Molmo(model, image_tokens=0.5)
    code, _, err = cli("plan", model, "--image-tokens", 0.5)
    assert code == 1
    assert "does not apply to a GGUF decoder" in err


def test_engines_that_cannot_refuse_in_a_sentence(tmp_path: Path, saying: Callable[..., Molmo]) -> None:
    fake = saying("yes").engine
    with pytest.raises(EngineError, match="does not implement GappedRuntime"):
        Molmo.from_parts(fake.runtime, fake.tokenizer, image_tokens=0.5)
    plain = Molmo(exported("molmoe", "onnx"), threads=1, max_crops=1)
    with pytest.raises(EngineError, match="open the model with image_tokens"):
        Molmo.from_parts(plain.engine.runtime, plain.engine.tokenizer, image_tokens=0.5)
    scene = opened("molmoe", "onnx").encode(PHOTO)
    scene.save(tmp_path / "scene")
    with pytest.raises(SceneFileError, match="open the model with image_tokens"):
        plain.load_scene(tmp_path / "scene")


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan"), "0.5", True])
def test_a_share_is_between_0_and_1(share: Any) -> None:
    with pytest.raises(ConfigError, match="image_tokens must be a share"):
        Molmo(image_tokens=share)


def test_an_unknown_score_is_refused() -> None:
    with pytest.raises(ConfigError, match="known: norm"):
        ImageTokens(0.5, "attention")


def test_positions_of_slots() -> None:
    positions = np.array([0, 1, 4, 7])
    assert slot_positions(positions, 1, 7).tolist() == [1, 4, 7, 8, 9, 10]
    assert slot_positions(None, 2, 4).tolist() == [2, 3]
    runtime = opened("molmoe").engine.runtime
    for wrong in ([0, 0, 1], [3, 2], [-1, 0], [[0, 1]], [0.5], [], [0, 10**6]):
        with pytest.raises(MolmoEdgeError, match="positions of a cache"):
            runtime.new_cache(8, np.array(wrong))  # type: ignore[call-arg]


def test_the_plan_counts_kept_tokens() -> None:
    config = opened("molmoe", tokens=None).config
    weights = bundle_weights_of(config, "mixed")
    whole, half = predict(config, weights, max_crops=1), predict(config, weights, max_crops=1, image_tokens=0.5)
    scene = opened("molmoe").encode(np.zeros((400, 400, 3), np.uint8))
    assert whole.positions - half.positions == scene.dropped
    assert half.answering < whole.answering
    assert half.image_tokens == 0.5


def test_commands_take_the_option(cli: Callable[..., tuple[int, str, str]]) -> None:
    photo = HERE / "golden" / "coffee.png"
    model = exported("molmoe", "onnx")
    given = ("--model", model, "--max-crops", 1, "--threads", 1, "--max-new-tokens", 2)
    code, out, err = cli("ask", photo, "Where?", *given, "--image-tokens", 0.5, "--json")
    assert code == 0
    assert json.loads(out)["usage"]["tokens"]["dropped"] > 100
    assert "image tokens left out" in err
    code, _, err = cli("ask", photo, "Where?", *given, "--image-tokens", 0)
    assert code == 2
    assert "must be greater than 0 and at most 1" in err
    code, out, _ = cli("plan", model, "--image-tokens", 0.5, "--memory", "8GB")
    assert code == 0
    assert "--image-tokens 0.5" in out
