"""Rotated models: the same outputs in float32, channels of equal size, and a refusal where it is impossible."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import EXACT, GOLDEN, bundle, case, expected, prompt, relative
from molmo2_golden import GOLDEN2
from small_checkpoints import DECODERS

from molmo_edge.checkpoints.bundle import open_bundle
from molmo_edge.checkpoints.tensor_names import hub_shapes
from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import ImageConfig, MolmoConfig, VisionConfig
from molmo_edge.evaluation.fault_localization import check_candidate
from molmo_edge.evaluation.loss import LossError
from molmo_edge.export import ExportError, export_bundle
from molmo_edge.export.source import open_source
from molmo_edge.modeling import Molmo, save_checkpoint
from molmo_edge.modeling.weights import build_model
from molmo_edge.quantize import QuantizeError
from molmo_edge.quantize.orthogonal import random_rotation
from molmo_edge.quantize.rotation import rotated, rotated_parts
from molmo_edge.runtimes import open_runtime

TOLERANCE = 1e-5


def rotated_model(config: MolmoConfig, tensors: TensorSource) -> Molmo:
    return build_model(*rotated(config, tensors), where="test")


@torch.inference_mode()
def outputs(model: Molmo) -> dict[str, np.ndarray]:
    """Of every stage for random inputs; image features enter the decoder beside tokens."""
    config, rng = model.config, np.random.default_rng(0)
    crops = rng.standard_normal((2, config.vision.n_patches, 3 * config.vision.patch_size**2), np.float32)
    masks = np.ones((2, config.image.patches**2), np.float32)
    masks[1, ::3] = 0.5
    masks[1, 1::3] = 0
    pooling = None
    if config.image.pools_across_crops:
        pooling = torch.from_numpy(rng.integers(-1, 2 * config.image.patches**2, (9, config.image.pool**2)))
        pooling[:, 0] = pooling[:, 0].clamp(min=0)
    features = model.vit_features(torch.from_numpy(crops))
    cells = model.connector(features, torch.from_numpy(masks), pooling).reshape(-1, config.decoder.d_model)[:12]
    d = config.decoder
    ids = torch.from_numpy(rng.integers(0, d.embedding_size + d.additional_vocab_size, 20))
    x = torch.cat([cells, model.decoder.embed(ids)])[None]
    if model.point_head is not None:
        x[0, 5] += model.point_head.project_features(features[0, :1])[1][0]
    states = model.decoder.states(x)
    found = {"logits": model.decoder.logits(model.decoder.ln_f(states))}
    if model.point_head is not None:
        names = ("patch_q", "patch_k", "subpatch_q", "location")
        found |= dict(zip(names, model.point_head.project(states[0]), strict=True))
        found["subpatch_k"] = model.point_head.project_features(features[0])[0]
        if config.point_head is not None and config.point_head.votes:
            found["vote_q"] = model.point_head.vote_queries(states[0])
            found["vote_k"] = model.point_head.vote_keys(features[0])
    return {name: value.numpy() for name, value in found.items()}


def check_same(config: MolmoConfig, tensors: TensorSource) -> None:
    exact, found = outputs(build_model(config, tensors, where="test")), outputs(rotated_model(config, tensors))
    for name, value in exact.items():
        assert relative(found[name], value) < TOLERANCE, name


def spread_norms(model: Molmo) -> Molmo:
    """Gains, biases and LayerScales that differ from channel to channel, and whose place therefore matters."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            with torch.no_grad():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


SMALL_IMAGE = ImageConfig(crop_size=56, overlap_margins=(0, 0), max_crops=2)
TIED = dataclasses.replace(DECODERS["dense"], weight_tying=True, qk_norm=True, qk_norm_per_head=True)


@pytest.mark.parametrize("decoder", [DECODERS["experts"], DECODERS["dense"], TIED], ids=["experts", "dense", "tied"])
@pytest.mark.parametrize("vit", ["openai", "dino", "siglip"])
def test_rotated_weights_are_the_same_function(vit: str, decoder: object, tmp_path: Path) -> None:
    n_pos = 16 if vit == "siglip" else 17
    vision = VisionConfig(vit, 48, 3, 4, 64, n_pos=n_pos, layers=(-1, -3))
    extra = (dataclasses.replace(vision, image_model_type="siglip", d_model=24, n_pos=16),) if vit == "dino" else ()
    config = MolmoConfig(SMALL_IMAGE, vision, decoder, projector_dim=32, extra_vision=extra)
    model = spread_norms(Molmo(config).init_weights(std=0.07, generator=torch.Generator().manual_seed(1)))
    save_checkpoint(model, GOLDEN / "molmoe" / "tokenizer.json", tmp_path / "checkpoint")
    check_same(*open_source(tmp_path / "checkpoint"))


def test_votes_of_a_grounding_head_are_the_same_function(tmp_path: Path) -> None:
    before = open_source(GOLDEN2 / "molmo_point")[0]
    assert before.point_head is not None
    config = dataclasses.replace(before, point_head=dataclasses.replace(before.point_head, votes=2, vote_dim=8))
    model = spread_norms(Molmo(config).init_weights(std=0.07, generator=torch.Generator().manual_seed(1)))
    save_checkpoint(model, GOLDEN2 / "molmo_point" / "tokenizer.json", tmp_path / "checkpoint")
    check_same(*open_source(tmp_path / "checkpoint"))


@pytest.mark.parametrize("folder", [GOLDEN / "qwen", GOLDEN2 / "molmo2_qwen3", GOLDEN2 / "molmo_point"])
def test_golden_models_are_the_same_functions(folder: Path) -> None:
    check_same(*open_source(folder))


@pytest.mark.parametrize("architecture", ["molmoe", "qwen"])
def test_rotated_models_give_the_reference_answers(architecture: str) -> None:
    """Against the reference's own logits, from the golden image features on."""
    config, tensors = open_source(GOLDEN / architecture)
    model, (golden, _) = rotated_model(config, tensors), expected(architecture)
    one = case(architecture, "square")
    with torch.inference_mode():
        index = torch.from_numpy(one.index.astype(np.int64))[None]
        cells = model.encode_image(torch.from_numpy(one.crops), torch.from_numpy(one.masks))[None]
        x = model.embed(torch.from_numpy(one.ids.astype(np.int64))[None], cells, index)
        logits = model.decoder.logits(model.decoder(x))[0, -1].numpy()
    assert relative(logits[:500], golden["square.last_logits"][:500]) < 1e-4


def test_a_loud_channel_is_spread_over_all() -> None:
    config, tensors = open_source(GOLDEN / "molmoe")
    name = "model.transformer.wte.embedding"
    loud = tensors.get(name).copy()
    loud[:, 7] *= 100
    _, turned = rotated(config, _With(tensors, name, loud))
    before, after = loud[:, 7].std() / np.median(loud.std(0)), turned.get(name).std(0)
    assert before > 50
    assert after.max() / np.median(after) < 3


@dataclasses.dataclass(frozen=True)
class _With:
    """A TensorSource with one tensor replaced."""

    tensors: TensorSource
    name: str
    array: np.ndarray

    def get(self, name: str) -> np.ndarray:
        return self.array if name == self.name else self.tensors.get(name)

    def __getattr__(self, name: str) -> object:
        return getattr(self.tensors, name)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 24, 48, 576, 896, 2048])
@pytest.mark.parametrize("keep_mean", [False, True])
def test_rotations_are_orthogonal(n: int, *, keep_mean: bool) -> None:
    q = random_rotation(n, np.random.default_rng(n), keep_mean=keep_mean).apply(np.eye(n)).astype(np.float64)
    assert np.abs(q @ q.T - np.eye(n)).max() < 1e-6
    if keep_mean:
        assert np.abs(q.sum(0) - 1).max() < 1e-5
        assert np.abs(q.sum(1) - 1).max() < 1e-5
    elif n >= 64:
        assert np.abs(q).max() < 5 / np.sqrt(n), "no channel keeps its own place"


def test_every_tensor_keeps_its_shape() -> None:
    config, tensors = open_source(GOLDEN2 / "molmo2_qwen3")
    turned_config, turned = rotated(config, tensors)
    shapes = hub_shapes(turned_config)
    assert set(shapes) <= set(turned.names())
    assert {name: turned.get(name).shape for name in shapes} == shapes
    assert rotated_parts(config) == ("vision_encoder", "decoder")
    assert rotated_parts(open_source(GOLDEN / "molmoe")[0]) == ("decoder",), "CLIP has a norm before its blocks"


@pytest.mark.parametrize("folder", [GOLDEN / "olmo", GOLDEN2 / "molmo2_olmo3"])
def test_norms_after_the_branches_are_refused(folder: Path) -> None:
    with pytest.raises(QuantizeError, match="norms after attention and FFN"):
        rotated(*open_source(folder))


def logits_of(bundle: Path, architecture: str) -> np.ndarray:
    engine = open_runtime(bundle, threads=1)
    rows = prompt(engine, case(architecture, "square"))
    cache = engine.new_cache(len(rows))
    engine.forward(rows[:-4], cache)
    found = np.stack([engine.forward(row[None], cache) for row in rows[-4:]])
    engine.close()
    return found


@pytest.mark.parametrize("architecture", ["molmoe", "qwen"])
def test_export_records_the_rotation(architecture: str, tmp_path: Path) -> None:
    export_bundle(GOLDEN / architecture, tmp_path / "rotated", rotate=True)
    assert open_bundle(tmp_path / "rotated").manifest.rotated == ("decoder",)
    assert open_bundle(bundle(architecture)).manifest.rotated == ()
    exact = logits_of(bundle(architecture), architecture)
    assert relative(logits_of(tmp_path / "rotated", architecture), exact) < TOLERANCE
    config, tensors = open_source(tmp_path / "rotated")
    restored = outputs(build_model(config, tensors, where="test"))["logits"]
    original = outputs(build_model(*open_source(GOLDEN / architecture), where="test"))["logits"]
    assert relative(restored, original) < TOLERANCE


def test_a_rotated_bundle_stays_rotated_when_it_is_exported_again(tmp_path: Path) -> None:
    export_bundle(GOLDEN / "molmoe", tmp_path / "rotated", rotate=True, measure=False)
    export_bundle(tmp_path / "rotated", tmp_path / "again", measure=False)
    assert open_bundle(tmp_path / "again").manifest.rotated == ("decoder",)
    with pytest.raises(ExportError, match="leave rotate out"):
        export_bundle(tmp_path / "rotated", tmp_path / "twice", rotate=True)
    with pytest.raises(LossError, match="their channels differ"):
        check_candidate(bundle("molmoe"), tmp_path / "rotated")
    check_candidate(tmp_path / "again", tmp_path / "rotated")


def test_quantized_exports_round_the_rotated_weights(tmp_path: Path) -> None:
    out = tmp_path / "mixed"  # smoothing for attention, GPTQ for the experts
    export_bundle(GOLDEN / "molmoe", out, {"decoder": "mixed"}, calibrate=GOLDEN, rotate=True, measure=False)
    exact = logits_of(bundle("molmoe"), "molmoe")
    assert np.linalg.norm(logits_of(out, "molmoe") - exact) < 0.2 * np.linalg.norm(exact)


def test_export_of_norms_after_the_branches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="leave rotate out"):
        export_bundle(GOLDEN / "olmo", tmp_path / "bundle", rotate=True)
    assert not (tmp_path / "bundle").exists()


def test_llama_cpp_runs_rotated_weights(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    export_bundle(GOLDEN / "molmoe", tmp_path / "bundle", "f32", engine="gguf", rotate=True)
    engine = open_runtime(tmp_path / "bundle", threads=1, engine_options=EXACT)
    rows = prompt(engine, case("molmoe", "square"))
    found = engine.forward(rows, engine.new_cache(len(rows)))
    engine.close()
    assert relative(found, logits_of(bundle("molmoe"), "molmoe")[-1]) < 1e-4
