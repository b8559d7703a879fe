"""The convolutional tower: its place in configuration and checkpoints, where patches sample it, and what it gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from molmo_edge import Molmo as Sdk
from molmo_edge.checkpoints.bundle import open_bundle
from molmo_edge.checkpoints.hub_config import from_hub_config, to_hub_config
from molmo_edge.checkpoints.manifest import GRAPHS
from molmo_edge.checkpoints.tensor_names import tower_shapes
from molmo_edge.config import ConfigError, ConvTowerConfig, DecoderConfig, ImageConfig, MolmoConfig, VisionConfig
from molmo_edge.export import CheckPhoto, export_bundle
from molmo_edge.frontend.crops import ImageProcessor, PreparedImage, patch_grid
from molmo_edge.modeling import Molmo, load_checkpoint, save_checkpoint
from molmo_edge.modeling.conv_tower import ConvTower
from molmo_edge.runtimes import EngineError, open_runtime
from molmo_edge.runtimes.onnx import OnnxRuntime
from molmo_edge.runtimes.onnx_sessions import load_session
from molmo_edge.selfcheck import check_bundle

GOLDEN = Path(__file__).parent / "golden"
TOWER = ConvTowerConfig(stem_dim=4, steps=(1, 1, 1, 2), pyramid_dim=6)
CONFIG = MolmoConfig(
    ImageConfig(crop_size=56, overlap_margins=(0, 0), max_crops=4, resize="dino", overview=96),
    VisionConfig("dino", 32, 2, 4, 64, n_pos=17, activation="gelu", layers=(-1, -2)),
    DecoderConfig(
        d_model=32,
        n_layers=1,
        n_heads=4,
        n_kv_heads=4,
        ffn_dim=16,
        n_experts=2,
        top_k=1,
        qk_norm=True,
        vocab_size=500,
        embedding_size=512,
        additional_vocab_size=16,
    ),
    projector_dim=32,
    conv_tower=TOWER,
)


def ramp(height: int, width: int) -> np.ndarray:
    """A picture that says where it is: red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x / (width - 1), 255 * y / (height - 1), 0 * x], -1).round().astype(np.uint8)


def test_tower_and_overview_go_together() -> None:
    with pytest.raises(ConfigError, match="must be set together"):
        dataclasses.replace(CONFIG, conv_tower=None)
    with pytest.raises(ConfigError, match="multiple of 32"):
        dataclasses.replace(CONFIG.image, overview=100)
    with pytest.raises(ConfigError, match="steps"):
        ConvTowerConfig(steps=(1, 2))
    assert CONFIG.feature_dim == 2 * 32 + 6 * 6


def test_configuration_survives_manifest_and_hub_files() -> None:
    assert MolmoConfig.from_dict(CONFIG.to_dict()) == CONFIG
    assert from_hub_config(*to_hub_config(CONFIG)) == CONFIG
    plain = dataclasses.replace(CONFIG, conv_tower=None, image=dataclasses.replace(CONFIG.image, overview=0))
    assert from_hub_config(*to_hub_config(plain)) == plain
    old = plain.to_dict()
    del old["conv_tower"], old["image"]["overview"]
    assert MolmoConfig.from_dict(old) == plain, "manifests written before the tower existed are read"


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    model = Molmo(CONFIG).init_weights(std=0.1, generator=torch.Generator().manual_seed(0))
    assert model.conv_tower is not None
    shapes = {name: tuple(p.shape) for name, p in model.conv_tower.named_parameters()}
    assert shapes == tower_shapes(TOWER)
    save_checkpoint(model, GOLDEN / "molmoe" / "tokenizer.json", tmp_path)
    again, _, config = load_checkpoint(tmp_path)
    assert config == CONFIG
    for name, values in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], values), name


@pytest.mark.parametrize("resize", ["dino", "default"])
@pytest.mark.parametrize("size", [(200, 150), (90, 260), (64, 64)])
def test_patches_sample_the_place_they_show(resize: str, size: tuple[int, int]) -> None:
    """A patch of a crop and the overview at its position have the same colour, in every tiling."""
    config = dataclasses.replace(CONFIG.image, resize=resize, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), overview=192)
    prepared = ImageProcessor(config)(ramp(*size))
    assert prepared.overview is not None
    pixels, positions = prepared.overview.pixels, prepared.overview.positions
    assert pixels.shape[1] % 32 == 0
    assert pixels.shape[2] % 32 == 0
    assert max(pixels.shape) == 192
    centres, sides = patch_grid(config, prepared.tiling, *size)
    colours = prepared.crops.reshape(*prepared.crops.shape[:2], -1, 3).mean(2)  # [n_crops, patches^2, 3]
    inside = (np.abs(centres - 0.5) + sides[:, None] / 2 < 0.49).all(-1)  # patches without padding or edges
    assert inside.sum() > 4
    at = positions.mean(2)[inside]
    grid = torch.from_numpy(at / np.array(pixels.shape[:0:-1], np.float32) * 2 - 1)[None, :, None]
    seen = F.grid_sample(torch.from_numpy(pixels)[None], grid.float(), align_corners=False)[0, :, :, 0].T.numpy()
    np.testing.assert_allclose(seen[:, :2], colours[inside][:, :2], atol=0.02)


def test_features_are_the_pyramid_at_the_positions() -> None:
    tower = ConvTower(TOWER).eval()
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.normal(size=(1, 3, 64, 96)).astype(np.float32))
    quarters = torch.from_numpy(rng.uniform(10, 50, (2, 3, 4, 2)).astype(np.float32))
    with torch.no_grad():
        levels = [level[0].numpy() for level in tower.pyramid(pixels)]
        features = tower(pixels, [quarters]).numpy()
    assert [level.shape for level in levels] == [(6, 8, 12), (6, 4, 6), (6, 2, 3)]
    assert features.shape == (2, 3, TOWER.feature_dim)

    def sample(level: np.ndarray, x: float, y: float) -> np.ndarray:
        """Bilinear, cell centres at half pixels, zeros outside."""
        total = np.zeros(len(level))
        for i in (int(np.floor(y - 0.5)), int(np.floor(y - 0.5)) + 1):
            for j in (int(np.floor(x - 0.5)), int(np.floor(x - 0.5)) + 1):
                if 0 <= i < level.shape[1] and 0 <= j < level.shape[2]:
                    total += (1 - abs(y - 0.5 - i)) * (1 - abs(x - 0.5 - j)) * level[:, i, j]
        return total

    for crop, patch in np.ndindex(2, 3):
        q = quarters[crop, patch].numpy()
        expected = [sample(levels[0], *(point / 8)) for point in q]
        expected += [sample(levels[1], *(q.mean(0) / 16)), sample(levels[2], *(q.mean(0) / 32))]
        np.testing.assert_allclose(features[crop, patch], np.concatenate(expected), atol=1e-5)


def test_pictures_of_a_batch_do_not_touch_each_other() -> None:
    tower = ConvTower(TOWER).eval()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 64, 64, generator=generator)
    positions = [64 * torch.rand(n, 5, 4, 2, generator=generator) for n in (1, 3)]
    with torch.no_grad():
        together = tower(pixels, positions)
        alone = torch.cat([tower(pixels[i : i + 1], positions[i : i + 1]) for i in range(2)])
    assert torch.allclose(together, alone, atol=1e-6)


def test_the_tower_is_needed_where_the_model_has_one() -> None:
    model = Molmo(CONFIG).init_weights(std=0.15, generator=torch.Generator().manual_seed(0)).eval()
    prepared = ImageProcessor(CONFIG.image)(ramp(120, 100))
    assert prepared.overview is not None
    crops, masks = torch.from_numpy(prepared.crops), torch.from_numpy(prepared.masks)
    with pytest.raises(ValueError, match="needs the overview"):
        model.encode_image(crops, masks)
    view = (torch.from_numpy(prepared.overview.pixels)[None], [torch.from_numpy(prepared.overview.positions)])
    cells = model.encode_image(crops, masks, *view)
    assert cells.shape == (len(crops), CONFIG.image.cells**2, 32)
    darker = model.encode_image(crops, masks, view[0] - 1, view[1])
    assert not torch.allclose(cells, darker), "the tower's features reach the cells"


def whole(prepared: PreparedImage, model: Molmo) -> np.ndarray:
    """Image features by the module itself, all crops at once."""
    assert prepared.overview is not None
    view = (torch.from_numpy(prepared.overview.pixels)[None], [torch.from_numpy(prepared.overview.positions)])
    with torch.no_grad():
        return model.encode_image(torch.from_numpy(prepared.crops), torch.from_numpy(prepared.masks), *view).numpy()


def write_checkpoint(directory: Path) -> Path:
    """One whose tower's weights float16 holds, as a detector's are published."""
    model = Molmo(CONFIG).init_weights(std=0.15, generator=torch.Generator().manual_seed(1))
    assert model.conv_tower is not None
    model.conv_tower.half().float()
    save_checkpoint(model, GOLDEN / "molmoe" / "tokenizer.json", directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tower"))


def test_engines_equal_the_module_on_pictures_of_any_shape(checkpoint: Path, tmp_path: Path) -> None:
    model, _, config = load_checkpoint(checkpoint)
    bundle = tmp_path / "bundle"
    export_bundle(checkpoint, bundle, "fp32")
    sizes = [(120, 100), (60, 250), (300, 90), (40, 40)]
    for engine in (open_runtime(bundle), open_runtime(checkpoint)):
        for size in sizes:
            prepared = ImageProcessor(config.image)(ramp(*size))
            exact = whole(prepared, model)
            found = engine.encode_image(prepared.crops, prepared.masks, prepared.overview)
            assert np.abs(found - exact).max() < 2e-4 * np.abs(exact).max(), (engine.engine, size)
        with pytest.raises(EngineError, match="pass the overview"):
            engine.encode_image(prepared.crops, prepared.masks)
        engine.close()


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_the_tower_is_exact_in_every_precision_of_pytorch(checkpoint: Path, precision: str) -> None:
    """With a decoder in bfloat16 and its inputs in float32, the convolutions failed."""
    if precision == "int8":
        pytest.importorskip("bitsandbytes")
    model, _, config = load_checkpoint(checkpoint)
    prepared = ImageProcessor(config.image)(ramp(120, 100))
    engine = open_runtime(checkpoint, precision=precision)
    found = engine.encode_image(prepared.crops, prepared.masks, prepared.overview)
    engine.close()
    np.testing.assert_allclose(found, whole(prepared, model), atol=2e-4)


def test_the_towers_are_closed_after_each_image_where_memory_is_scarce(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_bundle(checkpoint, tmp_path / "bundle", "fp32", measure=False)
    bundle, loaded = open_bundle(tmp_path / "bundle"), []

    def watch(path: Path, *arguments: Any, **options: Any) -> Any:
        loaded.append(path.stem)
        return load_session(path, *arguments, **options)

    monkeypatch.setattr("molmo_edge.runtimes.onnx.load_session", watch)
    engine = OnnxRuntime(bundle.config, {name: bundle.path(name) for name in GRAPHS}, threads=1, scarce=True)
    prepared = ImageProcessor(bundle.config.image)(ramp(120, 100))
    features = [engine.encode_crops(prepared.crops, prepared.overview) for _ in range(2)]
    np.testing.assert_array_equal(*features)
    assert loaded.count("vision_encoder") == 2
    engine.close()


def test_a_bundle_answers_as_its_checkpoint_in_every_precision(checkpoint: Path, tmp_path: Path) -> None:
    """The whole way: export, check, questions, the loss of rounding, and the bundle exported again."""
    photo = tmp_path / "photo.png"
    Image.fromarray(ramp(120, 160)).save(photo)
    check = CheckPhoto(photo, "What is it?", max_new_tokens=8)
    export_bundle(checkpoint, tmp_path / "fp32", "fp32", check=check)
    export_bundle(checkpoint, tmp_path / "int8", "int8")
    export_bundle(tmp_path / "fp32", tmp_path / "again", "fp32")
    assert check_bundle(tmp_path / "fp32").passed
    answers = {}
    for model in (checkpoint, *(tmp_path / name for name in ("fp32", "int8", "again"))):
        with Sdk(model) as sdk:
            answers[model.name] = sdk.ask(photo, "Why?", max_new_tokens=12).token_ids
    assert answers["fp32"] == answers[checkpoint.name] == answers["again"]
    assert len(answers["int8"]) == len(answers["fp32"])
    names = {t.name: t for t in onnx.load(tmp_path / "fp32" / "vision_encoder.onnx").graph.initializer}
    convolutions = [t for name, t in names.items() if "conv_tower" in name]
    assert len(convolutions) == len(tower_shapes(TOWER))
    assert all(t.data_type == onnx.TensorProto.FLOAT16 for t in convolutions)
