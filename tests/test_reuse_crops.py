"""An image of one crop is encoded once: its crop and its global view have the same pixels, in the reference, too."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from test_image_tokens import exported
from test_quantize import norm_error

from molmo_edge import Molmo
from molmo_edge.config import ConfigError, ImageConfig
from molmo_edge.errors import EngineError
from molmo_edge.frontend.crops import ImageProcessor, select_tiling
from molmo_edge.presets import PRESETS

HERE = Path(__file__).parent
SMALL = np.random.default_rng(3).integers(0, 255, (200, 336, 3), np.uint8)
LARGE = np.random.default_rng(4).integers(0, 255, (900, 900, 3), np.uint8)
QUESTION = "Point to the helmet."


def test_the_reference_encodes_the_same_pixels_twice() -> None:
    facts = json.loads((HERE / "golden" / "preprocess.json").read_text(encoding="utf-8"))
    arrays = load_file(HERE / "golden" / "preprocess.safetensors")
    single = [name for name, fact in facts.items() if fact["n_crops"] == 2]
    assert {"synth_336x336@12", "synth_336x336@4"} <= set(single)
    for name in single:
        view, crop = arrays[f"{name}.pixels"]
        np.testing.assert_array_equal(crop, view)
        masks = arrays[f"{name}.image_masks"]
        assert (masks[1] == -1).all()  # so that the features of the two are not equal after the connector
        assert (masks[0] >= 0).all()


@pytest.mark.parametrize("resize", ["default", "dino", "siglip"])
@settings(deadline=None, max_examples=12)
@given(height=st.integers(1, 336), width=st.integers(1, 336))
def test_an_image_of_at_most_one_crop_is_its_global_view(resize: str, height: int, width: int) -> None:
    config = ImageConfig(resize=resize)
    rgb = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    image = ImageProcessor(config)(rgb)
    assert image.tiling == (1, 1)
    np.testing.assert_array_equal(image.crops[1], image.crops[0])


def test_which_images_have_one_crop() -> None:
    config = ImageConfig()
    assert select_tiling(336, 336, config) == (1, 1)
    assert select_tiling(337, 336, config) != (1, 1)
    assert select_tiling(111, 1000, config) == (1, 1)  # a side shorter than the margins, as in the reference
    assert select_tiling(4000, 4000, ImageConfig(max_crops=1)) == (1, 1)
    assert select_tiling(378, 378, PRESETS["molmo2-4b"].image) == (1, 1)


@functools.cache
def opened(name: str, kind: str, reuse: bool) -> Molmo:
    return Molmo(exported(name, kind), threads=1, max_crops=4, reuse_crops=reuse)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("molmoe", "pytorch"), ("molmoe", "onnx"), ("molmo2_qwen3", "pytorch"), ("molmo_point", "pytorch")],
)
def test_features_and_answers_are_the_same(name: str, kind: str) -> None:
    once, twice = opened(name, kind, True), opened(name, kind, False)
    for image in (SMALL, LARGE):
        one, two = once.encode(image), twice.encode(image)
        assert one.crops == two.crops
        assert norm_error(one.embeddings, two.embeddings) < 1e-6
        answers = [molmo.ask(image, QUESTION, max_new_tokens=6) for molmo in (once, twice)]
        assert answers[0].token_ids == answers[1].token_ids


def test_the_tower_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    molmo, counts = opened("molmoe", "onnx", True), []
    runtime = molmo.engine.runtime
    real = runtime.encode_crops

    def encode_crops(crops: np.ndarray, *rest: Any) -> np.ndarray:
        counts.append(len(crops))
        found: np.ndarray = real(crops, *rest)
        return found

    monkeypatch.setattr(runtime, "encode_crops", encode_crops, raising=False)
    for image, crops in ((SMALL, 1), (LARGE, 5)):
        assert molmo.encode(image).crops == max(2, crops)
        assert counts.pop() == crops
    assert molmo.engine.with_max_crops(1).scene(LARGE).crops == 2
    assert counts == [1]


def test_what_cannot_reuse_says_so(saying: Callable[..., Molmo]) -> None:
    fake = saying("yes").engine
    with pytest.raises(EngineError, match="does not implement PartedRuntime; leave reuse_crops out"):
        Molmo.from_parts(fake.runtime, fake.tokenizer, reuse_crops=True)
    with pytest.raises(ConfigError, match="reuse_crops must be True or False, not 'yes'"):
        Molmo(reuse_crops="yes")  # type: ignore[arg-type]


def test_commands_take_the_option(cli: Callable[..., tuple[int, str, str]]) -> None:
    photo = HERE / "golden" / "coffee.png"
    options = ("--model", exported("molmoe", "onnx"), "--max-crops", 1, "--threads", 1, "--max-new-tokens", 2, "--json")
    texts = []
    for extra in ((), ("--reuse-crops",)):
        code, out, _ = cli("ask", photo, "Where?", *options, *extra)
        assert code == 0
        texts.append(json.loads(out)["text"])
    assert texts[0] == texts[1]
