"""Crops, masks and token layout: golden values, geometry as properties, the resize filter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from molmo_edge.config import IMAGENET_MEAN, IMAGENET_STD, ImageConfig
from molmo_edge.frontend.crops import (
    ImageError,
    ImageProcessor,
    image_token_count,
    load_image,
    select_tiling,
)
from molmo_edge.frontend.resize import resize
from molmo_edge.frontend.tokenizer import MOLMOE_SPECIAL_IDS, SpecialIds

GOLDEN = Path(__file__).parent / "golden"
SUMMARY = json.loads((GOLDEN / "preprocess.json").read_text(encoding="utf-8"))
ARRAYS = load_file(GOLDEN / "preprocess.safetensors")
IM_PATCH = MOLMOE_SPECIAL_IDS.im_patch

CONFIGS = [
    ImageConfig(),
    ImageConfig(max_crops=4),
    ImageConfig(max_crops=1),
    ImageConfig(max_crops=0),
    ImageConfig(crop_size=224, overlap_margins=(2, 2), max_crops=4, resize="dino"),
    ImageConfig(crop_size=224, overlap_margins=(0, 0), max_crops=6),
    ImageConfig(crop_size=336, overlap_margins=(4, 2), max_crops=9),
    ImageConfig(crop_size=224, overlap_margins=(0, 6), max_crops=5),
    ImageConfig(crop_size=96, patch_size=8, pool=3, overlap_margins=(3, 3), max_crops=7),
    ImageConfig(crop_size=112, pool=1, overlap_margins=(1, 2), max_crops=3),
]
sizes = st.tuples(st.integers(1, 400), st.integers(1, 400)) | st.sampled_from(
    [(1, 1), (50, 10000), (10000, 50), (10000, 1), (1, 10000), (112, 112), (111, 113), (112, 900), (720, 1280)]
)


def describe(config: ImageConfig) -> str:
    left, right = config.overlap_margins
    return (
        f"{config.max_crops} crops of {config.crop_size}, margins {left} {right}, pool {config.pool}, {config.resize}"
    )


def synthetic(width: int, height: int) -> np.ndarray:
    """The `synth_WxH` images of preprocess.json."""
    x, y = np.meshgrid(np.arange(width, dtype=np.int64), np.arange(height, dtype=np.int64))
    seed = width + height
    red = (7 * x + 3 * y + 11 * seed) % 256
    green = (200 * ((x // 8 + y // 8) % 2) + (x * y % 53)) % 256
    blue = ((x * x) // 97 + 5 * y + seed) % 256
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("name", SUMMARY)
def test_equals_the_reference(name):
    image, max_crops = name.split("@")
    if image.startswith("synth_"):
        rgb = synthetic(*map(int, image.removeprefix("synth_").split("x")))
    else:
        rgb = load_image(GOLDEN / image)
    expected = SUMMARY[name]
    assert rgb.shape == (expected["height"], expected["width"], 3)
    prepared = ImageProcessor(ImageConfig(max_crops=int(max_crops)))(rgb)
    assert len(prepared.crops) == expected["n_crops"]
    # The golden sequence has BOS before the image and a question after it.
    tokens = ARRAYS[f"{name}.tokens"]
    assert len(tokens) == expected["n_tokens"]
    assert np.array_equal(prepared.tokens, tokens[1 : 1 + len(prepared.tokens)])
    assert not (tokens[1 + len(prepared.tokens) :] >= MOLMOE_SPECIAL_IDS.im_start).any()
    index = prepared.token_index
    assert np.array_equal(np.where(index < 0, index, index + 1), ARRAYS[f"{name}.image_input_idx"])
    assert np.array_equal(prepared.masks, ARRAYS[f"{name}.image_masks"])
    np.testing.assert_allclose(prepared.crops[:, ::23, ::97], ARRAYS[f"{name}.pixels"], rtol=0, atol=1e-5)
    assert np.abs(prepared.crops).sum(dtype=np.float64) == pytest.approx(expected["pixel_abs_sum"], rel=1e-6)
    assert prepared.crops.mean(dtype=np.float64) == pytest.approx(expected["pixel_mean"], abs=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=describe)
@given(size=sizes)
@settings(max_examples=10, deadline=None)
def test_shapes_and_tokens(config, size):
    prepared = ImageProcessor(config)(np.full((*size, 3), 128, np.uint8))
    rows, cols = prepared.tiling
    n_crops = 1 + rows * cols
    assert rows * cols <= config.max_crops
    assert prepared.crops.shape == (n_crops, config.patches**2, config.patch_size**2 * 3)
    assert prepared.masks.shape == (n_crops, config.patches**2)
    assert prepared.token_index.shape == (n_crops, config.cells**2)
    assert [a.dtype for a in (prepared.crops, prepared.masks, prepared.tokens, prepared.token_index)] == (
        [np.float32, np.float32, np.int32, np.int32]
    )
    assert np.isfinite(prepared.crops).all()
    assert len(prepared.tokens) == image_token_count(config, prepared.tiling)
    # Every im_patch gets exactly one cell.
    kept = prepared.token_index[prepared.token_index >= 0]
    assert np.array_equal(np.sort(kept), np.flatnonzero(prepared.tokens == IM_PATCH))
    # T2: each row holds the mask of the next crop, the last row is -1.
    assert (prepared.masks[-1] == -1).all()
    assert ((prepared.masks[:-1] >= 0) & (prepared.masks[:-1] <= 1)).all()


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.max_crops], ids=describe)
@pytest.mark.parametrize("size", [(640, 480), (200, 900), (900, 200), (300, 300)])
def test_each_token_shows_its_own_place(config, size):
    """A token at row r and column c of the stitched grid shows just that part of the canvas.

    The canvas is painted with its own coordinates, by way of an image of its exact size, which passes the
    filter unchanged; means of cells, put where token_index says, must then be the means of the canvas.
    """
    rows, cols = select_tiling(*size, config)
    margin = sum(config.overlap_margins) * config.patch_size
    height, width = (n * config.window * config.patch_size + margin for n in (rows, cols))
    rgb = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    prepared = ImageProcessor(config)(rgb)
    assert prepared.tiling == (rows, cols)
    n, pool = config.cells, config.pool
    cell = pool * config.patch_size
    cells = prepared.crops.reshape(-1, n, pool, n, pool, config.patch_size**2, 3).mean(axis=(2, 4, 5))  # [.., n, n, 3]
    by_token = np.full((len(prepared.tokens), 3), np.nan)
    index = prepared.token_index[1:].reshape(-1)
    by_token[index[index >= 0]] = cells[1:].reshape(-1, 3)[index >= 0]
    second = prepared.tokens[n * (n + 1) + 2 :]  # the second block: im_start, rows, im_end
    grid = by_token[n * (n + 1) + 2 :][1:-1].reshape(height // cell, width // cell + 1, 3)
    assert (second[1:-1].reshape(grid.shape[:2])[:, -1] == MOLMOE_SPECIAL_IDS.im_col).all()
    canvas = (rgb / 255 - config.mean) / config.std
    expected = canvas.reshape(height // cell, cell, width // cell, cell, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(grid[:, :-1], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("width", "height", "max_crops", "tiling", "tokens"),
    [
        (336, 336, 12, (1, 1), 316),
        (512, 512, 12, (2, 2), 580),
        (640, 480, 12, (2, 3), 740),
        (1024, 768, 12, (3, 4), 1196),
        (1024, 768, 36, (3, 5), 1420),
        (1280, 720, 36, (3, 6), 1644),
        (1920, 1080, 36, (4, 8), 2644),
        (1080, 1920, 12, (4, 3), 1204),
        (4000, 3000, 36, (5, 7), 2844),
        (1000, 111, 12, (1, 1), 316),  # shorter than the margins: the reference's quirk
        (1000, 112, 12, (1, 4), 604),
    ],
)
def test_tilings(width, height, max_crops, tiling, tokens):
    config = ImageConfig(max_crops=max_crops)
    assert select_tiling(height, width, config) == tiling
    assert image_token_count(config, tiling) == tokens


def test_truncation_in_float32():
    """640x480 fits 336 as 336x251, not 252: the padding is 42 rows above and 43 below."""
    view = ImageProcessor()(np.full((480, 640, 3), 255, np.uint8)).crops[0]
    pixels = view.reshape(24, 24, 14, 14, 3).transpose(0, 2, 1, 3, 4).reshape(336, 336, 3)
    white = (pixels > 1).all(axis=(1, 2))
    assert white.sum() == 251
    assert np.flatnonzero(white)[0] == 42


def test_global_view_alone():
    prepared = ImageProcessor(ImageConfig(max_crops=0))(synthetic(640, 480))
    whole = ImageProcessor(ImageConfig(max_crops=12))(synthetic(640, 480))
    assert prepared.tiling == (0, 0)
    assert np.array_equal(prepared.crops, whole.crops[:1])
    assert np.array_equal(prepared.token_index, whole.token_index[:1])
    assert np.array_equal(prepared.tokens, whole.tokens[:158])
    assert (prepared.masks == -1).all()


def test_dino_stretches_and_counts_everything_as_image():
    config = ImageConfig(
        crop_size=224, overlap_margins=(2, 2), max_crops=4, resize="dino", mean=IMAGENET_MEAN, std=IMAGENET_STD
    )
    prepared = ImageProcessor(config)(np.full((90, 300, 3), 255, np.uint8))
    assert (prepared.masks[:-1] == 1).all()
    white = (1 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(
        prepared.crops.reshape(-1, 3), np.broadcast_to(white, (prepared.crops.size // 3, 3)), rtol=1e-5
    )


def test_special_ids_are_the_tokenizers():
    special = SpecialIds(bos=9, eos=9, im_start=1, im_end=2, im_patch=3, im_col=4, image=5)
    tokens = ImageProcessor(ImageConfig(max_crops=0), special)(np.zeros((5, 5, 3), np.uint8)).tokens
    assert tokens.tolist() == [1, *([3] * 12 + [4]) * 12, 2]


def test_the_image_is_not_changed():
    rgb = synthetic(100, 60)
    before = rgb.copy()
    ImageProcessor()(rgb)
    assert np.array_equal(rgb, before)


def test_views_of_arrays_work():
    rgb = synthetic(300, 200)
    flipped = ImageProcessor(ImageConfig(max_crops=2))(rgb[:, ::-1])
    copied = ImageProcessor(ImageConfig(max_crops=2))(rgb[:, ::-1].copy())
    assert np.array_equal(flipped.crops, copied.crops)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((5, 5), np.uint8),
        np.zeros((5, 5, 4), np.uint8),
        np.zeros((5, 5, 3)),
        np.zeros((0, 5, 3), np.uint8),
        "a.png",
    ],
    ids=["grey", "rgba", "float", "empty", "path"],
)
def test_wrong_arrays_are_refused(wrong):
    with pytest.raises(ImageError, match="uint8"):
        ImageProcessor()(wrong)


@pytest.mark.parametrize("cubic", [False, True], ids=["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((480, 640), (560, 746)),
        ((480, 640), (251, 336)),
        ((1080, 1920), (567, 1007)),
        ((30, 50), (201, 336)),
        ((1, 1), (336, 336)),
        ((50, 5000), (1, 336)),
        ((64, 64), (64, 64)),
        ((7, 1001), (13, 999)),
    ],
)
def test_resize_equals_torch(size, target, cubic):
    torch = pytest.importorskip("torch")
    rgb = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    planes = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255
    mode = "bicubic" if cubic else "bilinear"
    expected = torch.nn.functional.interpolate(planes, target, mode=mode, antialias=True).clip(0, 1)
    np.testing.assert_allclose(
        resize(rgb, *target, cubic=cubic), expected[0].permute(1, 2, 0).numpy(), rtol=0, atol=2e-6
    )
