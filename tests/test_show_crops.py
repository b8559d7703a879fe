"""Which crop and token each part of an image belongs to, as a map, a picture and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from molmo_edge.checkpoints.bundle import load_tokenizer
from molmo_edge.config import ImageConfig
from molmo_edge.frontend.crop_map import CropMap, crop_map
from molmo_edge.frontend.crops import ImageProcessor
from molmo_edge.presets import PRESETS
from molmo_edge.sdk.crop_picture import draw_crops

GOLDEN2 = Path(__file__).parent / "golden2"
SIZES = ((400, 600), (90, 700), (1200, 300), (20, 20))  # height, width
CONFIGS = {
    "molmo": (ImageConfig(), "golden/molmoe"),
    "padded": (ImageConfig(max_crops=4), "golden/molmoe"),
    "dino": (ImageConfig(resize="dino", max_crops=6), "golden/molmoe"),
    "molmo2": (PRESETS["molmo2-4b"].image, "golden2/molmo2_qwen3"),
    "molmo_point": (dataclasses.replace(PRESETS["molmo2-8b"].image, layout="molmo_point"), "golden2/molmo_point"),
    "global": (ImageConfig(max_crops=0), "golden/molmoe"),
}

Cli = Callable[..., tuple[int, str, str]]  # the fixture of conftest.py
every_layout = pytest.mark.parametrize("kind", CONFIGS)


def mapped(kind: str, size: tuple[int, int]) -> tuple[CropMap, ImageProcessor]:
    config, folder = CONFIGS[kind]
    return crop_map(config, *size), ImageProcessor(config, load_tokenizer(Path(__file__).parent / folder).special)


@every_layout
@pytest.mark.parametrize("size", SIZES)
def test_every_cell_is_a_patch_token_of_the_processor(kind: str, size: tuple[int, int]) -> None:
    layout, process = mapped(kind, size)
    prepared = process(np.zeros((*size, 3), np.uint8))
    special = process.special
    assert (layout.token_count, len(layout.crops)) == (len(prepared.tokens), len(prepared.crops))
    assert layout.tiling == prepared.tiling
    patches = [at for at, token in enumerate(prepared.tokens) if token in (special.im_patch, special.im_low)]
    assert layout.tokens.tolist() == patches


@every_layout
def test_a_cell_is_where_its_token_looks(kind: str) -> None:
    """A white block on a black image is brightest in the patches of the cell around it, in both views."""
    size = (400, 600)
    layout, process = mapped(kind, size)
    for x, y in ((90, 70), (301, 203), (560, 380)):
        image = np.zeros((*size, 3), np.uint8)
        for is_global in {True, layout.tiling == (0, 0)}:
            cells = np.flatnonzero(layout.is_global == is_global)
            boxes = layout.cells[cells]
            (at,) = np.flatnonzero((boxes[:, :2] <= (x, y)).all(1) & (boxes[:, 2:] > (x, y)).all(1))[:1]
            x0, y0, x1, y1 = np.clip(np.round(boxes[at]).astype(int), 0, (600, 400, 600, 400))
            image[:] = 0
            image[y0:y1, x0:x1] = 255
            pixels = process(image).crops
            light = pixels.reshape(-1, pixels.shape[-1]).mean(1)
            means = [light[members[members >= 0]].mean() for members in layout.members[cells]]
            assert int(np.argmax(means)) == at


@every_layout
@pytest.mark.parametrize("size", SIZES)
def test_cells_and_crops_cover_the_image(kind: str, size: tuple[int, int]) -> None:
    layout, _ = mapped(kind, size)
    height, width = size
    for chosen in (layout.is_global, ~layout.is_global):
        if chosen.any():
            inside = np.clip(layout.cells[chosen], 0, (width, height, width, height))
            areas = (inside[:, 2:] - inside[:, :2]).prod(1)
            assert areas.sum() == pytest.approx(width * height, rel=2e-3)  # each place in one cell
    kept = layout.members[~layout.is_global]
    kept = kept[kept >= 0]
    assert len(np.unique(kept)) == len(kept)  # no patch is in two cells
    for crop, box in enumerate(layout.crops):
        own = layout.patches.reshape(len(layout.crops), -1, 4)[crop]
        assert (own[:, :2] >= box[:2] - 1e-6).all()
        assert (own[:, 2:] <= box[2:] + 1e-6).all()


@every_layout
def test_the_picture_shows_all_views(kind: str) -> None:
    layout, _ = mapped(kind, (90, 200))
    image = Image.fromarray(np.full((90, 200, 3), 200, np.uint8))
    picture = np.asarray(draw_crops(image, layout, "a heading\nof two lines"))
    assert picture.dtype == np.uint8
    assert min(picture.shape[:2]) > 200
    other = np.asarray(draw_crops(Image.new("RGB", (200, 90)), layout, "a heading\nof two lines"))
    assert other.shape == picture.shape
    assert (other != picture).any()


@pytest.mark.parametrize("model", ["molmo-7b-d", "allenai/MolmoE-1B-0924", "molmo2-4b", "MolmoPoint-8B"])
def test_published_models_need_no_download(cli: Cli, golden: Path, tmp_path: Path, model: str) -> None:
    saved = tmp_path / "crops.png"
    status, out, err = cli("show-crops", golden / "coffee.png", "--model", model, "--json", "--save", saved)
    assert (status, err) == (0, f"wrote {saved}\n")
    data = json.loads(out)
    assert data["tokens"]["total"] == data["tokens"]["cells"] + data["tokens"]["markers"]
    assert len(data["cells"]) == data["tokens"]["cells"]
    assert len(data["crops"]) == 1 + data["tiling"][0] * data["tiling"][1]
    assert data["saved"] == str(saved)
    with Image.open(saved) as picture:
        assert picture.format == "PNG"


def test_show_crops_of_a_bundle_a_checkpoint_and_nano(cli: Cli, golden: Path, tiny_bundle: Path) -> None:
    for options in (("-m", tiny_bundle), ("-m", GOLDEN2 / "molmo2_qwen3"), ()):
        status, out, err = cli("show-crops", golden / "coffee.png", *options, "--max-crops", 2)
        assert (status, err) == (0, "")
        first, crops, tokens = out.splitlines()
        assert str(golden / "coffee.png") in first
        assert "at most 2" in crops
        assert tokens.startswith("tokens: ")


def test_wrong_use_of_show_crops(cli: Cli, golden: Path, tmp_path: Path) -> None:
    assert cli("show-crops", tmp_path / "no.png")[0] == 1
    assert cli("show-crops", golden / "coffee.png", "--save", tmp_path / "x.txt")[0] == 2
    status, _, err = cli("show-crops", golden / "coffee.png", "-m", "nothing")
    assert status == 1
    assert "nothing" in err
