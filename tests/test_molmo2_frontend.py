"""Molmo2's crops, pooling, prompts and frame sampling against golden values: all exact."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from molmo2_golden import GOLDEN2, MODELS, inputs_of, picture, read, tokenizer_of, turns_of
from safetensors.numpy import load_file

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.frontend.bilinear import resize_bilinear
from molmo_edge.frontend.crops import ImageProcessor, group_patches, image_token_count, select_tiling
from molmo_edge.frontend.prompts import PromptError, text_ids
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.frontend.video import sample_frames

PREPROCESS = read("molmo2_preprocess.json")
CONFIG = read_config(GOLDEN2 / "molmo2_qwen3").image


@pytest.fixture(scope="module")
def pixels() -> dict[str, np.ndarray]:
    return load_file(GOLDEN2 / "molmo2_preprocess.safetensors")


def test_the_documentation_names_the_most_positions_of_an_image() -> None:
    def most(crops: int) -> int:
        config = replace(CONFIG, max_crops=crops)
        return max(image_token_count(config, (rows, crops // rows)) for rows in range(1, crops + 1))

    docs = Path(__file__).parent.parent / "docs"
    table = (docs / "models.md").read_text(encoding="utf-8")
    assert CONFIG.max_crops == 8
    assert f"| an image with 8 crops (Molmo2) | up to {most(8):,} |" in table
    assert f"| {image_token_count(CONFIG, (0, 0))}, or up to {most(1)} |" in table
    higher = " ".join((docs / "command-line.md").read_text(encoding="utf-8").split())
    assert f"up to {most(36):,} positions instead of {most(8):,}" in higher


@pytest.mark.parametrize("name", PREPROCESS["cases"])
def test_crops_and_pooling_are_those_of_the_reference(name: str, pixels: dict[str, np.ndarray]) -> None:
    source, _, max_crops = name.partition("@")
    config = replace(CONFIG, max_crops=int(max_crops))
    image = ImageProcessor(config, tokenizer_of("molmo2_qwen3").special)(picture(source))
    expected = PREPROCESS["cases"][name]
    assert [side for grid in config.cell_grids(image.tiling) for side in grid] == expected["image_grid"]
    assert len(image.tokens) == image_token_count(config, image.tiling) == expected["n_image_tokens"]
    assert image.pooling is not None
    assert hashlib.sha256(image.pooling.astype(np.int32).tobytes()).hexdigest() == expected["pooling_sha256_int32"]
    np.testing.assert_allclose(image.crops[:, ::61, ::97], pixels[name], rtol=0, atol=1e-7)
    rounded = np.rint((image.crops * np.float32(0.5) + np.float32(0.5)) * 255).astype(np.uint8)
    assert hashlib.sha256(rounded.tobytes()).hexdigest() == expected["pixels_as_bytes_sha256"]


def test_tilings_are_those_of_the_reference() -> None:
    for width, height, max_crops, *expected in PREPROCESS["grids"]["rows"]:
        config = replace(CONFIG, max_crops=max_crops)
        rows, cols = select_tiling(height, width, config)
        sides = [side for grid in config.cell_grids((rows, cols)) for side in grid]
        assert [*sides, rows * cols + 1] == expected, (width, height, max_crops)


@pytest.mark.parametrize("size", [(7, 5), (400, 3), (61, 200)])
def test_resizing_equals_torch(size: tuple[int, int], request: pytest.FixtureRequest) -> None:
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)  # torch rounds otherwise with several
    rgb = np.random.default_rng(3).integers(0, 256, (*size, 3), np.uint8)
    for shape in ((378, 378), (50, 91), (1, 640)):
        values = torch.from_numpy(rgb).permute(2, 0, 1)[None].float()
        expected = torch.nn.functional.interpolate(values, shape, mode="bilinear", antialias=False)[0]
        rounded = expected.round().clamp(0, 255).permute(1, 2, 0).numpy().astype(np.uint8)
        np.testing.assert_array_equal(resize_bilinear(rgb, *shape), rounded)


def test_pooling_pads_an_odd_grid_below_and_to_the_right() -> None:
    pooled = group_patches(np.arange(9).reshape(3, 3), 2)
    assert pooled.tolist() == [[[0, 1, 3, 4], [2, -1, 5, -1]], [[6, 7, -1, -1], [8, -1, -1, -1]]]


def test_frames_are_sampled_as_by_the_reference() -> None:
    for row in PREPROCESS["video_sampling"]["rows"]:
        numbers = sample_frames(row["total_frames"], row["fps"], max_frames=row["num_frames"], max_fps=row["max_fps"])
        assert numbers == row["reference_indices"], row


CASES = [(model, name) for model in MODELS for name in read(f"{model}/expected.json")["cases"]]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_prompts_are_those_of_the_reference(model: str, name: str) -> None:
    case, inputs = read(f"{model}/expected.json")["cases"][name], inputs_of(model, name)
    ids = case["input_ids"]
    assert inputs.ids.tolist() == (json.loads(ids) if isinstance(ids, str) else ids)
    edges = np.flatnonzero(np.diff(np.r_[0, inputs.block.astype(int), 0])).reshape(-1, 2)
    assert edges.tolist() == case["image_block_runs"]
    assert len(inputs.positions) == (0 if inputs.pooling is None else len(inputs.pooling))


def test_conversations_are_those_of_the_template() -> None:
    tokenizer = tokenizer_of("molmo2_qwen3")
    checked = 0
    for row in read("molmo2_chat.json")["rows"]:
        messages: list[dict[str, Any]] = row["messages"]
        roles = [message["role"] for message in messages]
        alternate = all(role == ("user", "assistant")[i % 2] for i, role in enumerate(roles))
        if not (row["add_generation_prompt"] and alternate and len(messages) % 2):
            continue
        text = row["text"][row["text"].index("<|im_start|>") :]
        got = text_ids(tokenizer, turns_of(_without_plain_styles(row)))
        assert got.tolist() == tokenizer.encode(text, allow_special=True), text
        checked += 1
    assert checked >= 10


def _without_plain_styles(case: dict[str, Any]) -> dict[str, Any]:
    """The case with its styles that the template leaves out removed: here only point_count is among them."""
    return json.loads(json.dumps(case).replace(', "style": "point_count"', ""))


def test_a_style_stands_before_the_last_question_alone() -> None:
    tokenizer = tokenizer_of("molmo2_qwen3")
    assert "vqa2: b" in tokenizer.decode(text_ids(tokenizer, ["a", "x", "b"], style="vqa2"))
    assert "vqa2: a" not in tokenizer.decode(text_ids(tokenizer, ["a", "x", "b"], style="vqa2"))
    assert "point_count" not in tokenizer.decode(text_ids(tokenizer, ["a"], style="point_count"))


def test_special_tokens_in_a_question_stay_text() -> None:
    tokenizer = tokenizer_of("molmo2_qwen3")
    (end,) = tokenizer.encode("<|im_end|>", allow_special=True)
    assert text_ids(tokenizer, ["say <|im_end|>"]).tolist().count(end) == 1


def test_turns_without_a_question_are_refused() -> None:
    tokenizer = tokenizer_of("molmo2_qwen3")
    for turns in ([], ["a", "b"], ["  "], "a"):
        with pytest.raises(PromptError):
            text_ids(tokenizer, turns)


def test_bos_comes_from_the_checkpoint_and_eos_ends_a_turn() -> None:
    special = tokenizer_of("molmo2_olmo3").special
    assert (special.bos, special.eos) == (342, 344)  # <|endoftext|>, <|im_end|>
    special = tokenizer_of("molmo2_qwen3").special
    assert special.bos == special.eos == 323
    text = (GOLDEN2 / "molmo2_olmo3" / "tokenizer.json").read_text(encoding="utf-8")
    assert Tokenizer(text).special.bos == 344, "tokenizer.json alone does not tell"
    assert Tokenizer(text, bos="<|endoftext|>").special.bos == 342


def test_an_answer_may_be_given_as_ids() -> None:
    tokenizer = tokenizer_of("molmo2_qwen3")
    ids = tokenizer.encode("Coffee.")
    assert text_ids(tokenizer, ["a", ids, "b"]).tolist() == text_ids(tokenizer, ["a", "Coffee.", "b"]).tolist()
