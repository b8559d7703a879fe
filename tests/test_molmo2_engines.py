"""Molmo2 on every engine against golden values: features, logits, greedy ids."""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from molmo2_golden import GOLDEN2, inputs_of, read
from safetensors.numpy import load_file

from molmo_edge.checkpoints.gguf_layout import architecture
from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.tensor_names import hub_shapes
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.config import MolmoConfig
from molmo_edge.errors import EngineError
from molmo_edge.export import export_bundle
from molmo_edge.export.bundle_weights import BundleTensors
from molmo_edge.frontend.crops import image_token_count
from molmo_edge.presets import PRESETS
from molmo_edge.runtimes import open_runtime
from molmo_edge.runtimes.llama_native import LlamaContext
from molmo_edge.runtimes.llama_options import LlamaOptions
from molmo_edge.runtimes.protocol import ImageBlockRuntime

MODELS = ("molmo2_qwen3", "molmo2_olmo3")
CASES = ("square", "landscape", "wide_text", "tall", "two_images", "video", "chat", "text_only")
TOLERANCE = 5e-5  # relative to the largest value, with exact pixels (tests/golden2/README.md)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("molmo2")

    @functools.cache
    def make(model: str, kind: str) -> Path:
        if kind == "torch":
            return GOLDEN2 / model
        engine, precision = ("gguf", "f32") if kind == "gguf" else ("onnx", "fp32")
        export_bundle(GOLDEN2 / model, directory / f"{model}-{kind}", precision, engine=engine, plain=kind == "plain")
        return directory / f"{model}-{kind}"

    return make


def _relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["torch", "onnx", "plain"])
@pytest.mark.parametrize("model", MODELS)
def test_an_engine_equals_the_reference(bundles: Any, model: str, kind: str, name: str) -> None:
    _compare(cast(ImageBlockRuntime, open_runtime(bundles(model, kind), threads=1)), model, name)


def _compare(runtime: Any, model: str, name: str) -> None:
    case, tensors = read(f"{model}/expected.json")["cases"][name], load_file(GOLDEN2 / model / "expected.safetensors")
    inputs = inputs_of(model, name)
    rows = np.array(runtime.embed(inputs.ids), np.float32)
    if inputs.crops is not None and inputs.pooling is not None:
        patches = runtime.encode_crops(inputs.crops)
        assert _relative(patches[:, ::101], tensors[f"{name}.vit_features"]) < TOLERANCE
        features = runtime.connect(patches, np.empty(0), inputs.pooling)
        assert _relative(features[::23], tensors[f"{name}.image_features"]) < TOLERANCE
        rows[inputs.positions] += features
    assert _relative(rows[::41], tensors[f"{name}.inputs_embeds"]) < TOLERANCE
    cache = runtime.new_cache(len(rows) + 24)
    logits = runtime.prefill_image(rows, inputs.block, cache)
    assert _relative(logits, tensors[f"{name}.logits_last"]) < TOLERANCE
    ids = []
    for _ in case["generated_ids"]:
        ids.append(int(logits.argmax()))
        logits = runtime.forward(runtime.embed(np.array(ids[-1:])), cache)
    assert ids == case["generated_ids"]
    runtime.close()


@pytest.mark.parametrize("name", CASES)
def test_pytorch_equals_the_reference_at_every_stored_position(name: str) -> None:
    from molmo_edge.modeling import load_checkpoint
    from molmo_edge.modeling.decoder import image_attention_mask

    for model in MODELS:
        molmo, _, _ = load_checkpoint(GOLDEN2 / model)
        case, tensors = (
            read(f"{model}/expected.json")["cases"][name],
            load_file(GOLDEN2 / model / "expected.safetensors"),
        )
        inputs = inputs_of(model, name)
        with torch.inference_mode():
            rows = molmo.decoder.embed(torch.from_numpy(inputs.ids).long()[None])
            if inputs.crops is not None and inputs.pooling is not None:
                patches = molmo.vit_features(torch.from_numpy(inputs.crops))
                cells = molmo.connector(patches, torch.empty(0), torch.from_numpy(inputs.pooling).long())
                rows[0, torch.from_numpy(inputs.positions).long()] += cells
            mask = image_attention_mask(torch.from_numpy(inputs.block)[None])
            hidden = molmo.decoder(rows, mask=mask)[0]
            logits = molmo.decoder.logits(hidden[torch.tensor(case["positions"])]).numpy()
        assert _relative(hidden[::41].numpy(), tensors[f"{name}.hidden_last"]) < TOLERANCE
        assert _relative(logits, tensors[f"{name}.logits_at"]) < TOLERANCE
        assert logits.argmax(-1).tolist() == case["argmax_at_positions"]


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("two_images", "video")])
def test_llama_cpp_equals_the_reference(bundles: Any, name: str) -> None:
    pytest.importorskip("llama_cpp")
    options = LlamaOptions(cache="f32", flash_attention=False)
    runtime = open_runtime(bundles("molmo2_qwen3", "gguf"), threads=1, engine_options=options)
    _compare(runtime, "molmo2_qwen3", name)


@pytest.mark.parametrize("name", ["two_images", "video"])
def test_llama_cpp_refuses_images_with_text_between_them(bundles: Any, name: str) -> None:
    pytest.importorskip("llama_cpp")
    runtime = cast(ImageBlockRuntime, open_runtime(bundles("molmo2_qwen3", "gguf"), threads=1))
    inputs = inputs_of("molmo2_qwen3", name)
    rows = np.zeros((len(inputs.ids), runtime.config.decoder.d_model), np.float32)
    with pytest.raises(EngineError, match="export the decoder to ONNX"):
        runtime.prefill_image(rows, inputs.block, runtime.new_cache(len(rows)))
    runtime.close()


def test_llama_cpp_takes_more_crops_than_the_models_own(bundles: Any) -> None:
    """Their block exceeds the batch that llama.cpp reserves, which would abort the process."""
    pytest.importorskip("llama_cpp")
    options = LlamaOptions(cache="f32", flash_attention=False)
    runtime = open_runtime(bundles("molmo2_qwen3", "gguf"), threads=1, engine_options=options)
    exact = open_runtime(bundles("molmo2_qwen3", "torch"), threads=1)
    config = runtime.config.image
    own = max(image_token_count(config, tiling) for tiling in ((1, config.max_crops), (config.max_crops, 1)))
    rows = np.random.default_rng(0).standard_normal((own + 300, runtime.config.decoder.d_model)).astype(np.float32)
    for start in (0, 1):  # without and with BOS before the image
        image = (np.arange(len(rows)) >= start) & (np.arange(len(rows)) < own + 200)
        found, expected = (
            cast(ImageBlockRuntime, one).prefill_image(rows, image, one.new_cache(len(rows)))
            for one in (runtime, exact)
        )
        assert _relative(found, expected) < TOLERANCE
    for one in (runtime, exact):
        one.close()


def test_llama_cpp_refuses_a_run_that_exceeds_its_batch(bundles: Any) -> None:
    pytest.importorskip("llama_cpp")
    runtime: Any = open_runtime(bundles("molmo2_qwen3", "gguf"), threads=1)
    context = LlamaContext(runtime.model, 100)
    with pytest.raises(EngineError, match="101 positions at once here, only 100"):
        context.run(0, np.zeros((101, runtime.config.decoder.d_model), np.float32), 0)
    runtime.close()


def test_only_layers_in_use_are_built_and_negative_numbers_count_the_declared_ones() -> None:
    config = read_config(GOLDEN2 / "molmo2_qwen3")  # declares 6 layers, stores 4, uses -3 and -5
    assert config.vision.n_layers == 4
    assert config.vision.layers == (3, 1)


@pytest.mark.parametrize("model", [*MODELS, "molmo_point"])
def test_a_checkpoint_is_written_as_it_was_read(tmp_path: Path, model: str) -> None:
    from molmo_edge.modeling import load_checkpoint, save_checkpoint

    molmo, tokenizer, config = load_checkpoint(GOLDEN2 / model)
    save_checkpoint(molmo, GOLDEN2 / model / "tokenizer.json", tmp_path)
    again, same, written = load_checkpoint(tmp_path)
    assert written == config
    assert same.special == tokenizer.special
    for (name, before), (_, after) in zip(molmo.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(before, after), name
    assert MolmoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_weights_come_back_from_a_bundle(bundles: Any) -> None:
    for model in MODELS:
        source, copy = open_tensors(GOLDEN2 / model), BundleTensors(bundles(model, "onnx"))
        assert sorted(copy.names()) == sorted(name for name in source.names())
        for name in copy.names():
            np.testing.assert_array_equal(copy.get(name), source.get(name), err_msg=name)


@pytest.mark.parametrize("preset", ["molmo2-4b", "molmo2-8b", "molmo2-o-7b"])
def test_presets_have_the_published_sizes(preset: str) -> None:
    shapes = hub_shapes(PRESETS[preset])
    billions = sum(math.prod(shape) for shape in shapes.values()) / 1e9
    assert billions == pytest.approx({"molmo2-4b": 4.85, "molmo2-8b": 8.66, "molmo2-o-7b": 7.77}[preset], abs=0.15)
    assert shapes["model.vision_backbone.image_vit.positional_embedding"] == (729, 1152)


def test_the_documentation_names_every_architecture_of_llama_cpp() -> None:
    root = Path(__file__).parent.parent
    found = (root / "CHANGELOG.md").read_text(encoding="utf-8").partition("llama.cpp's architectures ")[2]
    listed = set(re.findall(r"`(\w+)`", found.partition(", in the precisions")[0]))
    table = (root / "docs" / "gguf.md").read_text(encoding="utf-8")
    names = {architecture(config.decoder) for config in PRESETS.values()}
    assert listed == names
    assert all(f"| `{name}`" in table for name in names)


def test_llama_cpp_stretches_every_fourth_layer(tmp_path: Path) -> None:
    """YaRN as Molmo2-O-7B has it. The golden model stretches other layers, which llama.cpp has no graph for."""
    pytest.importorskip("llama_cpp")
    from molmo_edge.checkpoints.gguf_layout import NoGraphError
    from molmo_edge.modeling import load_checkpoint, save_checkpoint

    with pytest.raises(NoGraphError, match="YaRN in layers 0, 1, 3"):
        export_bundle(GOLDEN2 / "molmo2_olmo3", tmp_path / "no", "f32", engine="gguf")
    molmo, _, config = load_checkpoint(GOLDEN2 / "molmo2_olmo3")
    assert config.decoder.yarn is not None
    fourth = replace(config.decoder, yarn=replace(config.decoder.yarn, layers=(3,)))
    molmo.config = replace(config, decoder=fourth)
    molmo.decoder.config = fourth
    save_checkpoint(molmo, GOLDEN2 / "molmo2_olmo3" / "tokenizer.json", tmp_path / "checkpoint")
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", "f32", engine="gguf")
    options = LlamaOptions(cache="f32", flash_attention=False)
    runtime = open_runtime(tmp_path / "bundle", threads=1, engine_options=options)
    exact = open_runtime(tmp_path / "checkpoint", threads=1)
    plain = open_runtime(GOLDEN2 / "molmo2_olmo3", threads=1)
    rows = np.random.default_rng(0).standard_normal((200, fourth.d_model)).astype(np.float32)
    flags = np.zeros(len(rows), bool)
    found, expected, other = (
        cast(ImageBlockRuntime, one).prefill_image(rows, flags, one.new_cache(len(rows)))
        for one in (runtime, exact, plain)
    )
    assert _relative(found, expected) < TOLERANCE
    assert _relative(found, other) > 0.1, "the layers matter"
    for one in (runtime, exact, plain):
        one.close()
