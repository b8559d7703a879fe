"""Calibration of Molmo2 and MolmoPoint: the decoder's own inputs, an unchanged function, and smaller errors."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from molmo2_golden import GOLDEN, GOLDEN2, MODELS, inputs_of, picture, tokenizer_of

pytest.importorskip("torch")

import torch
from PIL import Image
from torch import Tensor

from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.config import MolmoConfig
from molmo_edge.evaluation.fault_localization import tensor_part
from molmo_edge.export import export_bundle
from molmo_edge.export.bundle_weights import BundleTensors
from molmo_edge.modeling import load_checkpoint
from molmo_edge.modeling.decoder import image_attention_mask
from molmo_edge.modeling.weights import build_model
from molmo_edge.quantize.calibration import Calibration
from molmo_edge.quantize.calibration_prompts import DecoderInput, Prompt, embed_prompts
from molmo_edge.quantize.importance import importance
from molmo_edge.quantize.layer_inputs import LayerRunner
from molmo_edge.quantize.rounding import nearest
from molmo_edge.quantize.smoothing import smoothed
from molmo_edge.runtimes.torch import TorchRuntime

_MATRICES = ("att_proj", "attn_out", "ff_proj", "ff_out")


@dataclass(frozen=True)
class Case:
    """A golden checkpoint, a prompt as its decoder sees it, and the inputs of its matrices in the whole model."""

    model: Any
    config: MolmoConfig
    prompt: DecoderInput
    seen: dict[str, Tensor]  # "blocks.0.attn.att_proj" -> [n, in]

    def logits(self, model: Any = None) -> np.ndarray:
        """float32 [n, n_logits]"""
        decoder = (model or self.model).decoder
        mask = image_attention_mask(torch.from_numpy(self.prompt.image)[None])
        with torch.inference_mode():
            x = torch.from_numpy(self.prompt.embeddings)[None]
            found: np.ndarray = decoder.logits(decoder(x, mask=mask))[0].numpy()
        return found


@functools.cache
def _case(name: str) -> Case:
    model, _, config = load_checkpoint(GOLDEN2 / name)
    inputs, runtime = inputs_of(name, "square" if name != "molmo_point" else "one_image"), None
    assert inputs.crops is not None
    runtime = TorchRuntime.from_model(model, threads=1)
    rows = runtime.embed(inputs.ids)
    rows[inputs.positions] += runtime.encode_image(inputs.crops, np.empty(0), pooling=inputs.pooling)
    case, seen = Case(model, config, DecoderInput(rows, inputs.block), {}), {}
    hooks = [
        module.register_forward_pre_hook(lambda _, given, part=part: seen.update({part: given[0][0]}))
        for part, module in model.decoder.named_modules()
        if part.endswith(_MATRICES)
    ]
    case.logits()
    for hook in hooks:
        hook.remove()
    case.seen.update(seen)
    return case


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small ones: each crop costs time."""
    folder = tmp_path_factory.mktemp("photos")
    for size in ("378x378", "300x200"):
        Image.fromarray(picture(f"synth_{size}")).save(folder / f"{size}.png")
    return folder


def _relative(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_layer_inputs_are_those_of_the_whole_model(name: str) -> None:
    case = _case(name)
    runner = LayerRunner(case.config, open_tensors(GOLDEN2 / name), [case.prompt])
    compared = 0
    for layer in range(case.config.decoder.n_layers):
        runner.advance_to(layer)
        for part, module in runner.block.named_modules():
            exact = case.seen.get(f"blocks.{layer}.{part}")
            if exact is not None:
                (found,) = runner.inputs(module)
                torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
                compared += 1
    assert compared == len(case.seen) == len(_MATRICES) * case.config.decoder.n_layers


@torch.inference_mode()
def test_a_causal_mask_would_give_other_inputs() -> None:
    case = _case("molmo2_olmo3")
    causal = case.prompt._replace(image=np.zeros_like(case.prompt.image))
    runner = LayerRunner(case.config, open_tensors(GOLDEN2 / "molmo2_olmo3"), [causal])
    runner.advance_to(1)
    (found,) = runner.inputs(runner.block.attn.att_proj)
    assert _relative(found.numpy(), case.seen["blocks.1.attn.att_proj"].numpy()) > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_prompts_are_those_of_the_sdk(name: str) -> None:
    case, image = _case(name), GOLDEN / "coffee.png"
    runtime, tokenizer = TorchRuntime.from_model(case.model, threads=1), tokenizer_of(name)
    (found,) = embed_prompts([Prompt(image, "What?")], runtime, tokenizer)
    from molmo_edge import Molmo

    scene = Molmo.from_parts(runtime, tokenizer).engine.scene(picture("coffee.png"))
    np.testing.assert_array_equal(found.embeddings[: len(scene.embeddings)], scene.embeddings)
    np.testing.assert_array_equal(found.image, scene.image_flags(len(found.image) - len(scene.embeddings)))


def test_answers_of_prompts_are_in_the_form_of_the_model() -> None:
    model, tokenizer, _ = load_checkpoint(GOLDEN2 / "molmo2_qwen3")
    runtime, image = TorchRuntime.from_model(model, threads=1), GOLDEN / "coffee.png"
    answer = 'A <point x="10.0" y="20.0" alt="cup">cup</point>.'
    without, found = embed_prompts([Prompt(image, "What?"), Prompt(image, "What?", answer)], runtime, tokenizer)
    written = tokenizer.encode('A <points coords="1 1 100 200">cup</points>.')
    np.testing.assert_array_equal(found.embeddings[len(without.embeddings) :], runtime.embed(np.array(written)))


@pytest.mark.parametrize("name", MODELS)
def test_smoothed_weights_are_the_same_function(name: str) -> None:
    case, tensors = _case(name), open_tensors(GOLDEN2 / name)
    smooth = smoothed(case.config, tensors, [case.prompt], ("attention", "experts"))
    changed = {part for part in tensors.names() if (smooth.get(part) != tensors.get(part)).any()}
    leaves = {part.rsplit(".", 2)[-2] for part in changed}
    norms_after = case.config.decoder.norm_after
    assert leaves == ({*_MATRICES} if norms_after else {"attn_norm", "att_proj", "ff_norm", "ff_proj"})
    assert len(changed) == 4 * case.config.decoder.n_layers
    found = case.logits(build_model(case.config, smooth, where="test"))
    assert _relative(found, case.logits()) < 1e-5


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_gptq_has_smaller_errors_of_products(name: str) -> None:
    case, tensors = _case(name), open_tensors(GOLDEN2 / name)
    calibration = Calibration(case.config, tensors, [case.prompt])
    hub = [part for part in tensors.names() if ".blocks." in part and part.split(".")[-2] in _MATRICES]
    assert len(hub) == len(case.seen)
    errors: dict[str, list[float]] = {"gptq": [], "nearest": []}
    for part in sorted(hub, key=lambda part: (int(part.split(".")[3]), _MATRICES.index(part.split(".")[-2]))):
        weight = tensors.get(part)
        if padding := -weight.shape[1] % 32:
            weight = np.pad(weight, ((0, 0), (0, padding)))
        layer, leaf = int(part.split(".")[3]), part.split(".")[-2]
        x = case.seen[f"blocks.{layer}.{'attn' if leaf.startswith('att') else 'ffn'}.{leaf}"].numpy()
        exact = x @ weight[:, : x.shape[1]].T
        for kind, round_ in (("gptq", calibration), ("nearest", nearest)):
            rounded = round_(part.removesuffix(".weight"), weight, 32, False).restored()
            errors[kind].append(_relative(x @ rounded[:, : x.shape[1]].T, exact))
    ratios = np.array(errors["gptq"]) / np.array(errors["nearest"])
    assert ratios.max() < 1, dict(zip(hub, ratios, strict=True))
    assert ratios.mean() < 0.8


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_importance_is_the_mean_square_of_inputs(name: str) -> None:
    case = _case(name)
    found = importance(case.config, open_tensors(GOLDEN2 / name), [case.prompt])
    last = case.config.decoder.n_layers - 1
    for part, seen in (("attn_q", "attn.att_proj"), ("attn_output", "attn.attn_out"), ("ffn_down", "ffn.ff_out")):
        x = case.seen[f"blocks.{last}.{seen}"]
        if case.config.decoder.norm_after:
            x = torch.nn.functional.normalize(x, dim=-1)
        exact = x.square().mean(0)
        torch.testing.assert_close(torch.from_numpy(found[f"blk.{last}.{part}.weight"]), exact, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("name", ["molmo2_qwen3", "molmo_point"])
def test_a_calibrated_bundle_is_closer_to_float32(name: str, photos: Path, tmp_path: Path) -> None:
    """GPTQ and smoothing together: `mixed` has four-bit FFNs and int8 attention."""
    case, errors = _case(name), {}
    for kind, calibrate in (("plain", None), ("calibrated", photos)):
        out = tmp_path / kind
        export_bundle(GOLDEN2 / name, out, {"decoder": "mixed"}, calibrate=calibrate, measure=False)
        model = build_model(case.config, BundleTensors(out), where="test")
        errors[kind] = _relative(case.logits(model), case.logits())
    assert errors["calibrated"] < 0.85 * errors["plain"], errors


def test_int8_with_norms_after_bears_large_values(photos: Path, tmp_path: Path) -> None:
    """Two channels of the values and of `up` are made large, and the columns that take them small."""
    name, case = "molmo2_olmo3", _case("molmo2_olmo3")
    from molmo_edge.modeling.weights import save_checkpoint
    from molmo_edge.runtimes import open_runtime
    from molmo_edge.runtimes.prompt_embeddings import prefill

    model, _, config = load_checkpoint(GOLDEN2 / name)
    d = config.decoder
    with torch.no_grad():
        for block in model.decoder.blocks:
            for channel in (3, 17):
                block.attn.att_proj.weight[d.q_dim + d.kv_dim + channel] *= 50
                block.attn.attn_out.weight[:, channel] /= 50
                block.ffn.ff_proj.weight[channel] *= 50
                block.ffn.ff_out.weight[:, channel] /= 50
    save_checkpoint(model, GOLDEN2 / name / "tokenizer.json", tmp_path / "checkpoint")
    exact, errors = case.logits()[-1], {}
    for kind, calibrate in (("plain", None), ("smooth", photos)):
        export_bundle(tmp_path / "checkpoint", tmp_path / kind, {"decoder": "int8"}, calibrate=calibrate, measure=False)
        engine = open_runtime(tmp_path / kind, threads=1)
        rows, image, _ = case.prompt
        errors[kind] = _relative(prefill(engine, rows, image, engine.new_cache(len(rows))), exact)
        engine.close()
    assert errors["smooth"] < 0.5 * errors["plain"], errors


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_belongs_to_one_part(name: str) -> None:
    from molmo_edge.checkpoints.tensor_names import hub_shapes
    from molmo_edge.evaluation.ablation import PARTS

    found = {tensor_part(part) for part in hub_shapes(_case(name).config)}
    assert found == {*PARTS} - {"router"} | ({"point_head"} if name == "molmo_point" else set())
