"""What model families differ in, as configuration: PyTorch, ONNX and the files agree for each of it on tiny models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import relative

from molmo_edge import Molmo as Sdk
from molmo_edge.checkpoints.gguf_layout import NoGraphError, architecture
from molmo_edge.checkpoints.hub_config import from_hub_config, to_hub_config
from molmo_edge.config import ConfigError, DecoderConfig, ImageConfig, MolmoConfig, VisionConfig, YarnConfig
from molmo_edge.export import CheckPhoto, ExportError, export_bundle
from molmo_edge.export.bundle_weights import BundleTensors
from molmo_edge.frontend.crops import ImageProcessor, PreparedImage
from molmo_edge.frontend.prompts import image_ids
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import KVCache, Molmo, load_checkpoint, save_checkpoint
from molmo_edge.modeling.connector import Connector
from molmo_edge.modeling.decoder import Decoder, image_attention_mask
from molmo_edge.presets import PRESETS
from molmo_edge.runtimes import EngineError, open_runtime
from molmo_edge.runtimes.onnx import OnnxRuntime
from molmo_edge.runtimes.prompt_embeddings import image_embeddings, prefill
from molmo_edge.runtimes.torch import TorchRuntime
from molmo_edge.selfcheck import check_bundle

GOLDEN = Path(__file__).parent / "golden"
TOKENIZER = GOLDEN / "molmoe" / "tokenizer.json"
DECODER = DecoderConfig(
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=48,
    vocab_size=500,
    embedding_size=512,
    additional_vocab_size=16,
)
BASE = MolmoConfig(
    ImageConfig(crop_size=56, overlap_margins=(0, 0), max_crops=2),
    VisionConfig("openai", 32, 3, 4, 64, n_pos=17, layers=(-2, -3)),
    DECODER,
    projector_dim=32,
)
SIGLIP = VisionConfig("siglip", 32, 3, 4, 48, n_pos=16, activation="gelu_pytorch_tanh", layers=(2, 0))
DINO = VisionConfig("dino", 24, 2, 3, 48, n_pos=17, activation="gelu", layers=(-1,))
QWEN3 = replace(DECODER, head_dim_override=12, qk_norm=True, qk_norm_per_head=True)
ODD = ImageConfig(crop_size=98, overlap_margins=(2, 2), max_crops=6, resize="dino")  # 7 patches, 3 of them in a window
VARIANTS = {
    "head_dim": replace(BASE, decoder=replace(DECODER, head_dim_override=16)),
    "qk_norm": replace(BASE, decoder=replace(DECODER, head_dim_override=16, qk_norm=True)),
    "qk_norm_per_head": replace(BASE, decoder=QWEN3),
    "qk_norm_per_head_and_experts": replace(BASE, decoder=replace(QWEN3, ffn_dim=16, n_experts=4, top_k=2)),
    "siglip": replace(BASE, vision=SIGLIP),
    "no_pad_embed": replace(BASE, pad_embed=False),
    "two_vits": replace(BASE, extra_vision=(replace(SIGLIP, d_model=16), DINO)),
    "odd_grid": replace(BASE, image=ODD, vision=replace(BASE.vision, n_pos=50)),
    "odd_grid_3x3": replace(BASE, image=replace(ODD, pool=3), vision=replace(BASE.vision, n_pos=50)),
    "bidirectional": replace(BASE, decoder=replace(DECODER, image_attention="bidirectional")),
    "molmo2": MolmoConfig(
        ODD,
        replace(SIGLIP, n_pos=49),
        replace(QWEN3, image_attention="bidirectional"),
        projector_dim=40,
        pad_embed=False,
    ),
}
TOLERANCE = 1e-4  # relative, as in tests/test_export.py
ADDED = {
    *("pad_embed", "extra_vision", "head_dim_override", "qk_norm_per_head", "image_attention"),
    *("layout", "pooling_heads", "pooling_output", "point_head", "yarn", "additional_head"),
}


def random_model(config: MolmoConfig) -> Molmo:
    model = Molmo(config).init_weights(std=0.2, generator=torch.Generator().manual_seed(0)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases that do something
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Molmo, Path]:
    """The model of a variant, and its checkpoint."""
    model, directory = random_model(VARIANTS[request.param]), tmp_path_factory.mktemp(request.param)
    save_checkpoint(model, TOKENIZER, directory)
    return model, directory


def photo(config: MolmoConfig) -> PreparedImage:
    y, x = np.mgrid[:90, :140]
    rgb = np.stack([x * 255 // 139, y * 255 // 89, (x * y) % 256], -1).astype(np.uint8)
    return ImageProcessor(config.image, Tokenizer.from_file(TOKENIZER).special)(rgb)


def image_rows(runtime: TorchRuntime | OnnxRuntime, config: MolmoConfig) -> tuple[np.ndarray, np.ndarray]:
    """The embeddings of an image's prompt followed by some text, and which of them are image tokens."""
    image = photo(config)
    prompt = image_ids(Tokenizer.from_file(TOKENIZER), image)
    text = runtime.embed(np.arange(20, 30))
    rows = np.concatenate([image_embeddings(runtime, image, prompt), text])
    return rows, (np.arange(len(rows)) > 0) & (np.arange(len(rows)) < len(prompt.ids))


# Configuration.


@pytest.mark.parametrize("name", VARIANTS)
def test_configurations_survive_manifest_and_config_json(name: str) -> None:
    config = VARIANTS[name]
    assert MolmoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    raw, preprocessor = json.loads(json.dumps(to_hub_config(config)))
    assert from_hub_config(raw, preprocessor) == config


@pytest.mark.parametrize(
    "name", [name for name, config in PRESETS.items() if config.image.layout == "molmo" and not config.point_head]
)
def test_files_of_earlier_models_stay_as_they_were(name: str) -> None:
    written = PRESETS[name].to_dict()
    assert not ADDED & {*written, *written["decoder"], *written["vision"], *written["image"]}
    raw, _ = to_hub_config(PRESETS[name])
    added = {"head_dim", "qk_norm_type", "image_attention", "image_padding_embed", "pooling_attention_mask"}
    assert not added & set(raw)
    assert "extra_vision" not in raw["vision_backbone"]


def test_the_manifest_of_nano_is_written_as_it_is() -> None:
    import molmo_edge

    manifest = json.loads((Path(molmo_edge.__file__).parent / "nano" / "molmo_edge.json").read_text(encoding="utf-8"))
    written = json.loads(json.dumps(MolmoConfig.from_dict(manifest["model"]).to_dict()))
    if "conv_tower" not in manifest["model"]:  # these two keys are younger than some manifests
        assert written.pop("conv_tower") is None
        assert written["image"].pop("overview") == 0
    assert written == manifest["model"]


def test_a_head_dim_that_is_the_default_is_no_override() -> None:
    raw, preprocessor = to_hub_config(BASE)
    assert from_hub_config(raw | {"head_dim": 8}, preprocessor) == BASE
    assert replace(DECODER, head_dim_override=8) == DECODER


@pytest.mark.parametrize(
    ("section", "change", "says"),
    [
        (DECODER, {"head_dim_override": 7}, "must be even"),
        (DECODER, {"head_dim_override": -8}, "positive or 0"),
        (DECODER, {"qk_norm_per_head": True}, "needs qk_norm"),
        (DECODER, {"image_attention": "full"}, '"full" is not supported'),
        (SIGLIP, {"image_model_type": "vit"}, '"vit" is not supported'),
        (SIGLIP, {"activation": "relu"}, '"relu" is not supported'),
        (BASE, {"vision": replace(SIGLIP, n_pos=17)}, "17 positions, but a crop has 16 patches$"),
        (BASE, {"vision": replace(DINO, n_pos=16)}, "16 positions, but a crop has 16 patches and a class token"),
        (BASE, {"extra_vision": (replace(DINO, patch_size=7),)}, "7 px"),
        (ODD, {"pool": 8}, "larger than a crop of 7 x 7 patches"),
        (ODD, {"crop_size": 100}, "not a multiple of patch_size 14"),
        (ODD, {"overlap_margins": (-1, 2)}, "must not be negative"),
    ],
)
def test_contradictions_are_refused(section: MolmoConfig, change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        replace(section, **change)  # type: ignore[arg-type]


def test_a_manifest_with_broken_vits_is_refused() -> None:
    for broken in (None, "x", [3], [{"d_model": 8, "depth": 1}]):
        with pytest.raises(ConfigError):
            MolmoConfig.from_dict(BASE.to_dict() | {"extra_vision": broken})


def test_a_v1_checkpoint_with_odd_crops_is_refused() -> None:
    """The reference pads such crops with zeros, which is not what a pooling with a mask does."""
    raw, preprocessor = to_hub_config(VARIANTS["odd_grid"])
    del raw["pooling_attention_mask"]
    with pytest.raises(ConfigError, match=r"7 x 7 patches.*no pooling_attention_mask"):
        from_hub_config(raw, preprocessor)


# Crops of odd grids.


def test_molmo2_s_image_tokens() -> None:
    """Seven crops of 27 x 27 patches, stitched and pooled 2 x 2: the 955 cells of transformers' public test image."""
    config = ImageConfig(crop_size=378, overlap_margins=(4, 4), max_crops=8, resize="dino")
    prepared = ImageProcessor(config)(np.zeros((600, 880, 3), np.uint8))
    assert prepared.tiling == (2, 3)
    assert prepared.pooling is not None
    assert prepared.pooling.shape == (955, 4)
    assert prepared.token_index.shape == (955,)
    assert config.cell_grids((2, 3)) == [(14, 14), (23, 33)]
    assert (prepared.pooling[:196] < 0).sum() == 13 * 2 * 2 + 3  # the padding below and to the right of the global view


@pytest.mark.parametrize("pool", [2, 3])
@pytest.mark.parametrize("size", [(90, 140), (300, 60), (64, 64)])
def test_cells_tile_the_image_once(pool: int, size: tuple[int, int]) -> None:
    """Red and green of a patch say where it lies in the image: each cell has the patches that it should."""
    config = replace(ODD, pool=pool, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    y, x = np.mgrid[: size[0], : size[1]] / np.array(size)[:, None, None]
    special = Tokenizer.from_file(TOKENIZER).special
    prepared = ImageProcessor(config, special)(np.stack([255 * x, 255 * y, 0 * x], -1).astype(np.uint8))
    assert prepared.pooling is not None
    assert (prepared.tokens[prepared.token_index] == special.im_patch).all()
    assert len(set(prepared.token_index)) == (prepared.tokens == special.im_patch).sum()
    colour = prepared.crops.reshape(-1, 14 * 14, 3).mean(1)[:, :2]  # of each patch, x and y in 0..1
    start = 0
    for (rows, cols), (height, width) in zip(
        config.cell_grids(prepared.tiling), config.grids(prepared.tiling), strict=True
    ):
        cells = prepared.pooling[start : start + rows * cols].reshape(rows, cols, pool, pool)
        grid = cells.transpose(0, 2, 1, 3).reshape(rows * pool, cols * pool)
        assert (grid[height:] == -1).all()
        assert (grid[:, width:] == -1).all()
        inside = grid[:height, :width]
        assert len(np.unique(inside)) == inside.size
        assert inside.min() >= 0
        expected = np.stack(np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height), -1)
        assert np.abs(colour[inside] - expected).max() < 0.03
        start += rows * cols
    assert start == len(prepared.pooling)


@torch.no_grad()
def test_absent_patches_play_no_part() -> None:
    """A cell with a mask is the same as attention over the patches that it has, without one."""
    config = VARIANTS["odd_grid"]
    connector = Connector(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in connector.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    pooling = photo(config).pooling
    assert pooling is not None
    n = pooling.max() // 49 + 1
    features = torch.randn(n, 49, config.feature_dim, generator=generator)
    masks = torch.ones(n, 49)
    cells = connector(features, masks, torch.from_numpy(pooling).long())
    assert cells.shape == (len(pooling), 32)
    for cell, patches in zip(cells, pooling, strict=True):
        there = features.flatten(0, 1)[patches[patches >= 0]][None]
        alone = connector.projector(connector.pooling(there.mean(1, keepdim=True), there))[0, 0]
        torch.testing.assert_close(cell, alone, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="pools across crops"):
        connector(features, masks)


# The decoder.


@torch.no_grad()
def test_cached_equals_uncached(variant: tuple[Molmo, Path]) -> None:
    """The image in one piece, then text in two: the hidden states of one go."""
    decoder, config = variant[0].decoder, variant[0].config.decoder
    x = torch.randn(1, 24, config.d_model, generator=torch.Generator().manual_seed(0))
    image = (torch.arange(24) > 2) & (torch.arange(24) < 15) & (torch.arange(24) != 8)
    masks = [image_attention_mask(part[None]) for part in (image, image[:16])] if config.bidirectional_images else []
    whole = decoder(x, mask=masks[0] if masks else None)
    cache = KVCache.empty(config, 1, 24, like=x)
    first = decoder(x[:, :16], mask=masks[1] if masks else None, cache=cache)
    pieces = [first, *(decoder(part, cache=cache) for part in x[:, 16:].split([7, 1], dim=1))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=2e-5)


@torch.no_grad()
def test_who_sees_whom_in_a_bidirectional_prefill() -> None:
    """A change at position j reaches position i exactly where i attends to j, with one layer."""
    config = replace(DECODER, n_layers=1, image_attention="bidirectional")
    decoder = Decoder(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    image = torch.tensor([False, True, True, False, True, False])
    x = torch.randn(1, 6, 32, generator=generator)
    before = decoder(x, mask=image_attention_mask(image[None]))
    for j in range(6):
        changed = x.clone()
        changed[0, j] += 1
        after = decoder(changed, mask=image_attention_mask(image[None]))
        reached = ((after - before).abs().amax(-1)[0] > 1e-5).tolist()
        assert reached == [j <= i or bool(image[i] and image[j]) for i in range(6)]


def test_masks_of_a_prefill_after_other_positions() -> None:
    """What the cache holds is visible to all, and sees nothing new."""
    mask = image_attention_mask(torch.tensor([[True, False, True]]), start=2)[0, 0]
    assert mask.tolist() == [[True, True, True, False, True], [True, True, True, True, False], [True] * 5]


# Files and engines.


def test_checkpoints_load_back(variant: tuple[Molmo, Path]) -> None:
    model, directory = variant
    again, _, config = load_checkpoint(directory)
    assert config == model.config
    parameters = dict(again.named_parameters())
    for name, ours in model.named_parameters():
        assert torch.equal(ours, parameters[name]), name


@pytest.mark.parametrize("plain", [False, True])
def test_onnx_equals_pytorch(variant: tuple[Molmo, Path], plain: bool, tmp_path: Path) -> None:
    model, directory = variant
    export_bundle(directory, tmp_path / "bundle", "fp32", plain=plain)
    onnx, exact = open_runtime(tmp_path / "bundle", threads=1), TorchRuntime.from_model(model)
    assert isinstance(onnx, OnnxRuntime)
    assert onnx.config == model.config
    image = photo(model.config)
    patches = exact.encode_crops(image.crops)
    assert relative(onnx.encode_crops(image.crops), patches) < TOLERANCE
    cells = exact.connect(patches, image.masks, image.pooling)
    assert relative(onnx.connect(patches, image.masks, image.pooling), cells) < TOLERANCE
    assert relative(onnx.encode_image(image.crops, image.masks, None, image.pooling), cells) < TOLERANCE
    rows, flags = image_rows(exact, model.config)
    logits = []
    for each in (onnx, exact):
        cache = each.new_cache(len(rows))
        found = [prefill(each, rows[:-6], flags[:-6], cache), each.forward(rows[-6:-2], cache)]
        logits.append(np.stack([*found, *(each.forward(row[None], cache) for row in rows[-2:])]))
    assert relative(*logits) < TOLERANCE


def test_bundles_give_their_weights_back(variant: tuple[Molmo, Path], tmp_path: Path) -> None:
    """LayerScale is folded, so the models are compared, not the tensors."""
    from molmo_edge.modeling.weights import build_model

    model, directory = variant
    export_bundle(directory, tmp_path / "bundle", "fp32")
    again = build_model(model.config, BundleTensors(tmp_path / "bundle"), where="the bundle")
    image = photo(model.config)
    view = (image.crops, image.masks, None, image.pooling)
    assert relative(*(TorchRuntime.from_model(m).encode_image(*view) for m in (again, model))) < 1e-5
    x = torch.randn(1, 5, model.config.decoder.d_model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(again.decoder(x), model.decoder(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 5e-3), ("int8", 0.1)])
@pytest.mark.parametrize("name", ["molmo2", "qk_norm_per_head_and_experts"])
def test_rounded_exports(name: str, precision: str, bound: float, tmp_path: Path) -> None:
    """Also the probes that an export runs know the inputs of such graphs."""
    model = random_model(VARIANTS[name])
    save_checkpoint(model, TOKENIZER, tmp_path / "checkpoint")
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", precision)
    onnx, exact = open_runtime(tmp_path / "bundle", threads=1), TorchRuntime.from_model(model)
    image = photo(model.config)
    view = (image.crops, image.masks, None, image.pooling)
    assert relative(onnx.encode_image(*view), exact.encode_image(*view)) < bound
    rows, flags = image_rows(exact, model.config)
    logits = (prefill(each, rows, flags, each.new_cache(len(rows))) for each in (onnx, exact))
    assert relative(*logits) < bound


@pytest.mark.parametrize("name", ["odd_grid", "bidirectional", "molmo2"])
def test_questions_in_every_way(name: str, tmp_path: Path) -> None:
    """From a photo to the same answer on both engines, with the image prefilled before, in a chat and in a batch."""
    model = random_model(VARIANTS[name])
    save_checkpoint(model, TOKENIZER, tmp_path / "checkpoint")
    export_bundle(
        tmp_path / "checkpoint", tmp_path / "bundle", "fp32", check=CheckPhoto(GOLDEN / "coffee.png", "Why?", 8)
    )
    image, question, answers = GOLDEN / "coffee.png", "What is this?", []
    for path in (tmp_path / "checkpoint", tmp_path / "bundle"):
        with Sdk(path, threads=1) as molmo:
            answers += [
                molmo.ask(image, question, max_new_tokens=8).token_ids,
                molmo.ask(molmo.encode(image), question, max_new_tokens=8).token_ids,
                molmo.chat(image).ask(question, max_new_tokens=8).token_ids,
                molmo.ask_batch([(image, question)], max_new_tokens=8)[0].token_ids,
            ]
    assert len(answers[0]) > 0
    assert answers == answers[:1] * 8
    assert check_bundle(tmp_path / "bundle").passed


def test_engines_refuse_what_they_would_get_wrong() -> None:
    config = VARIANTS["molmo2"]
    runtime = TorchRuntime.from_model(random_model(config))
    image = photo(config)
    with pytest.raises(EngineError, match="pass the pooling"):
        runtime.encode_image(image.crops, image.masks)
    rows, flags = image_rows(runtime, config)
    with pytest.raises(EngineError, match="prefill_image"):
        runtime.forward(rows, runtime.new_cache(len(rows)))
    with pytest.raises(EngineError, match="need as many image flags"):
        runtime.prefill_image(rows, flags[1:], runtime.new_cache(len(rows)))
    with pytest.raises(EngineError, match="not causal"):
        runtime.prefill_batch([rows], 1)
    cache = runtime.new_cache(len(rows))
    assert np.isfinite(runtime.prefill_image(rows, flags, cache)).all()
    with pytest.raises(NoGraphError, match="YaRN in layers 0"):
        architecture(replace(config.decoder, yarn=YarnConfig(layers=(0,))))


def test_an_mmproj_of_another_tower_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    save_checkpoint(random_model(VARIANTS["siglip"]), TOKENIZER, tmp_path / "siglip")
    with pytest.raises(ExportError, match="leave mmproj out"):
        export_bundle(tmp_path / "siglip", tmp_path / "bundle", "f32", engine="gguf", mmproj=True)
