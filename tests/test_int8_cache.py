"""Keys and values in eight bits on ONNX Runtime: what they cost in logits, and the options around them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from molmo2_golden import GOLDEN2

from molmo_edge import Molmo
from molmo_edge.checkpoints.bundle import open_bundle
from molmo_edge.evaluation.routing import agreement, router_choices
from molmo_edge.quantize.calibration_prompts import DecoderInput, Prompt, embed_prompts
from molmo_edge.runtimes.memory_plan import bundle_weights, predict
from molmo_edge.runtimes.prompt_embeddings import prefill

pytest.importorskip("onnx")

from molmo_edge.export import export_bundle
from molmo_edge.export.errors import ExportError

Bundles = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def photos(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    shutil.copyfile(golden / "coffee.png", folder / "coffee.png")
    return folder


@pytest.fixture(scope="module")
def bundles(golden: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """The fp32 bundles of a checkpoint with a float32 and with an int8 cache."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(model: str) -> tuple[Path, Path]:
        if model not in made:
            checkpoint = (GOLDEN2 if model.startswith("molmo2") else golden) / model
            plain, small = (tmp_path_factory.mktemp(model) / name for name in ("plain", "small"))
            export_bundle(checkpoint, plain, "fp32", measure=False)
            export_bundle(checkpoint, small, "fp32", calibrate=photos, cache="int8", measure=False)
            made[model] = plain, small
        return made[model]

    return make


@pytest.mark.parametrize(("model", "most"), [("molmoe", 0.005), ("molmo2_qwen3", 0.05), ("qwen", 0.15)])
def test_logits_stay_close_on_another_photo(model: str, most: float, bundles: Bundles, golden: Path) -> None:
    """Measured: 0.001, 0.018 and 0.080, as Qwen2 adds large biases to keys. Scales of other channels cost over 0.5."""
    plain, small = (Molmo(path, max_crops=1, threads=1) for path in bundles(model))
    scene = plain.engine.scene(golden / "astronaut.png")
    rows = np.concatenate([scene.embeddings, plain.engine.runtime.embed(np.arange(5, 25))])
    logits, sizes = [], []
    for molmo in (plain, small):
        runtime = molmo.engine.runtime
        cache: Any = runtime.new_cache(len(rows) + 1)
        prefill(runtime, rows, scene.image_flags(20), cache)
        logits.append(runtime.forward(runtime.embed(np.array([30])), cache))
        sizes.append(sum(array.nbytes for array in cache.arrays().values()))
    assert sizes[0] == 4 * sizes[1]
    difference = np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm(logits[0])
    assert 0 < difference < most


@pytest.fixture(scope="module")
def combined(golden: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an int8 cache whose decoder is rotated and drafts."""
    out = tmp_path_factory.mktemp("combined") / "bundle"
    export_bundle(
        golden / "molmoe", out, "fp32", calibrate=photos, cache="int8", rotate=True, drafting=True, measure=False
    )
    return out


@pytest.mark.parametrize(("share", "most"), [(None, 0.005), (0.5, 0.012)])
def test_logits_stay_close_with_rotation_and_without_some_image_tokens(
    share: float | None, most: float, bundles: Bundles, combined: Path, golden: Path
) -> None:
    """Measured: 0.0035 and 0.0081, both also without the rotation: fewer keys average fewer errors."""
    logits = []
    for path in (bundles("molmoe")[0], combined):
        with Molmo(path, max_crops=1, threads=1, image_tokens=share) as molmo:
            engine = molmo.engine
            scene = engine.prefill(engine.scene(golden / "astronaut.png"), 32)
            assert bool(scene.dropped) == (share is not None)
            assert scene.cache is not None
            logits.append(engine.runtime.forward(engine.runtime.embed(np.arange(5, 25)), scene.cache))
    assert 0 < np.linalg.norm(logits[0] - logits[1]) < most * np.linalg.norm(logits[0])


def test_drafts_are_verified_with_an_int8_cache(combined: Path, golden: Path) -> None:
    pytest.importorskip("llguidance")
    point = r'<point x="[0-9][0-9]\.[0-9]" y="[0-9][0-9]\.[0-9]" alt="cups">cups</point>'
    found = []
    for draft in (True, False):
        with Molmo(combined, draft=draft, max_crops=0, threads=1) as molmo:
            found.append(molmo.ask(golden / "coffee.png", "Point to the cups.", regex=point, max_new_tokens=60))
    assert found[0] == found[1]
    assert found[0].usage.tokens.drafted > 5
    assert not found[1].usage.tokens.drafted


def test_a_scene_is_stored_in_eight_bits(bundles: Bundles, golden: Path, tmp_path: Path) -> None:
    molmo = Molmo(bundles("molmoe")[1], max_crops=1, threads=1)
    scene = molmo.encode(golden / "astronaut.png")
    expected = molmo.ask(scene, "What?", max_new_tokens=4)
    scene.save(tmp_path / "scene")
    again = molmo.ask(molmo.load_scene(tmp_path / "scene"), "What?", max_new_tokens=4)
    assert again.token_ids == expected.token_ids


def test_routers_are_watched(bundles: Bundles) -> None:
    """What the loss report needs of a model with experts."""
    rows = [np.random.default_rng(0).normal(size=(30, open_bundle(bundles("molmoe")[0]).config.decoder.d_model))]
    plain, small = (router_choices(path, [r.astype(np.float32) for r in rows], threads=1) for path in bundles("molmoe"))
    assert plain is not None
    assert small is not None
    assert agreement(plain[0], small[0]) > 0.9


def test_the_manifest_and_the_plan_know_the_cache(bundles: Bundles) -> None:
    plain, small = map(open_bundle, bundles("molmoe"))
    assert (plain.components["decoder"].cache, small.components["decoder"].cache) == ("", "int8")
    assert small.components["decoder"].onnxruntime == "1.32"
    parts = [predict(bundle.config, bundle_weights(bundle)).parts for bundle in (plain, small)]
    assert parts[0]["keys and values (f32)"] == 4 * parts[1]["keys and values (int8)"]


def test_photos_are_encoded_once(photos: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although they calibrate the weights and the cache."""
    counts = []

    def embed(prompts: Sequence[Prompt], *rest: Any) -> list[DecoderInput]:
        counts.append(len(prompts))
        return embed_prompts(prompts, *rest)

    monkeypatch.setattr("molmo_edge.export.bundle.embed_prompts", embed)
    export_bundle(golden / "molmoe", tmp_path / "out", "int8", calibrate=photos, cache="int8", measure=False)
    assert counts == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "int4"}, "not a supported cache"),
        ({"cache": "int8"}, "add calibrate"),
        ({"cache": "int8", "plain": True}, "leave cache out"),
        ({"cache": "int8", "precision": "fp16"}, "leave cache out"),
        ({"cache": "int8", "engine": "gguf"}, "--llama cache=q8_0"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str, golden: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export_bundle(golden / "molmoe", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
