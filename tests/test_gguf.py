"""Decoders as GGUF on llama.cpp: equal to PyTorch and the reference, whatever the options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp")

import exported
import torch
from exported import (
    ARCHITECTURES,
    CASES,
    EXACT,
    GOLDEN,
    case,
    costs,
    expected,
    gguf_bundle,
    gguf_runtime,
    greedy,
    prompt,
    relative,
)
from gguf import GGUFReader
from gguf.quants import dequantize

from molmo_edge.checkpoints.bundle import load_tokenizer
from molmo_edge.checkpoints.gguf_layout import decoder_tensors
from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.export import export_bundle
from molmo_edge.frontend.prompts import text_ids
from molmo_edge.modeling import load_checkpoint, save_checkpoint
from molmo_edge.runtimes import EngineError, Unavailable, open_runtime
from molmo_edge.runtimes.llama_library import has_amx
from molmo_edge.runtimes.llama_options import LlamaOptions

# What float16 cannot hold, the random decoder of the golden OLMo makes.
HALVES = {"molmoe": "f16", "qwen": "f16", "olmo": "bf16"}


def logits_of(engine: Any, rows: np.ndarray, last: int) -> np.ndarray:
    """At the last positions, [last, embedding_size]."""
    cache = engine.new_cache(len(rows))
    engine.forward(rows[:-last], cache)
    return np.stack([engine.forward(row[None], cache) for row in rows[-last:]])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_f32_equals_the_reference(architecture: str, name: str) -> None:
    tensors, cases = expected(architecture)
    engine = gguf_runtime(architecture, "f32")
    rows = prompt(engine, case(architecture, name))  # images encoded by the bundle itself
    logits = engine.forward(rows, engine.new_cache(len(rows)))
    assert relative(logits, tensors[f"{name}.last_logits"]) < 1e-4
    assert greedy(engine, rows, 24) == cases[name]["generated_ids"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("architecture", ["molmoe", "qwen"])
def test_f16_gives_the_reference_s_tokens(architecture: str, name: str) -> None:
    engine = gguf_runtime(architecture, "f16", LlamaOptions())  # as a user has it: keys and values in f16 too
    rows = prompt(engine, case(architecture, name))
    assert greedy(engine, rows, 24) == expected(architecture)[1][name]["generated_ids"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_position_equals_pytorch(architecture: str) -> None:
    model = load_checkpoint(GOLDEN / architecture)[0]
    for precision, bound in (("f32", 1e-5), (HALVES[architecture], 1e-2)):
        engine = gguf_runtime(architecture, precision)
        rows = prompt(engine, case(architecture, "landscape"))
        with torch.inference_mode():
            hidden = model.decoder(torch.from_numpy(rows)[None])
            exact = model.decoder.logits(hidden[0]).numpy()[-64:]
        assert relative(logits_of(engine, rows, 64), exact) < bound, precision


def test_logits_of_chunks_equal_those_of_single_positions() -> None:
    engine = gguf_runtime("molmoe", "f32")
    rows = prompt(engine, case("molmoe", "landscape"))
    assert len(rows) > 512  # more than one chunk
    whole = engine.forward(rows, engine.new_cache(len(rows)))
    assert relative(logits_of(engine, rows, 8)[-1], whole) < 1e-5


@pytest.mark.parametrize(("precision", "most"), [("q8_0", 0.005), ("q4_k_m", 0.05)])
def test_what_rounding_costs(precision: str, most: float, capsys: pytest.CaptureFixture[str]) -> None:
    divergence, same = costs("molmoe", gguf_runtime("molmoe", precision, LlamaOptions()))
    with capsys.disabled():
        print(f"\nmolmoe as GGUF {precision}: mean KL {divergence:.2g}, same top token {same:.1%}")
    assert divergence < most


def test_special_rows_survive() -> None:
    """The image tokens' rows: MolmoE's are padding rows of the embedding, 7B-D's lie behind it (molmo_edge.export)."""
    for architecture in ARCHITECTURES:
        engine = gguf_runtime(architecture, "q4_k_m" if architecture != "olmo" else "bf16")
        model, tokenizer, _ = load_checkpoint(GOLDEN / architecture)
        ids = np.array([*tokenizer.special.to_dict().values(), 0, 7])
        with torch.inference_mode():
            exact = model.decoder.embed(torch.from_numpy(ids)).numpy()
        # The table beside q4_k_m is int8, with one scale per row.
        step = np.abs(exact).max(axis=1, keepdims=True) / 127 if architecture != "olmo" else 0
        assert (np.abs(engine.embed(ids) - exact) <= 0.501 * step).all(), architecture


def test_the_file_holds_the_checkpoint() -> None:
    """Every tensor of an f32 file, read by another reader, is what the layout says it is made of."""
    from molmo_edge.checkpoints.weight_files import open_tensors

    for architecture in ARCHITECTURES:
        config, tensors = read_config(GOLDEN / architecture), open_tensors(GOLDEN / architecture)
        found = {t.name: t for t in GGUFReader(gguf_bundle(architecture, "f32") / "decoder-f32.gguf").tensors}
        for tensor in decoder_tensors(config):
            data = dequantize(found[tensor.name].data, found[tensor.name].tensor_type).reshape(tensor.shape)
            whole = [tensors.get(part.hub) for part in tensor.parts]
            exact = [
                w if p.rows is None else w[p.start : p.start + p.rows] for w, p in zip(whole, tensor.parts, strict=True)
            ]
            assert np.array_equal(data, exact[0] if len(exact) == 1 else np.stack(exact)), tensor.name


def test_text_alone_in_any_program() -> None:
    """llama.cpp by itself, from ids of its own tokenizer: the same logits as our embeddings of the same text."""
    import llama_cpp

    engine, directory = gguf_runtime("molmoe", "f32"), gguf_bundle("molmoe", "f32")
    tokenizer = load_tokenizer(directory)
    ids = [tokenizer.special.bos, *text_ids(tokenizer, ["What is this?"])]
    model = llama_cpp.Llama(str(directory / "decoder-f32.gguf"), n_ctx=256, logits_all=False, verbose=False)
    assert model.tokenize(b" User: What is this? Assistant:", add_bos=True, special=False) == ids
    assert model.token_eos() == tokenizer.special.eos
    model.eval(ids)
    theirs = np.ctypeslib.as_array(
        llama_cpp.llama_get_logits_ith(model.ctx, -1), (engine.config.decoder.embedding_size,)
    )
    rows = engine.embed(np.array(ids))
    # Its cache is in float16.
    assert relative(theirs.copy(), engine.forward(rows, engine.new_cache(len(rows)))) < 1e-3
    said = model.create_chat_completion([{"role": "user", "content": "What is this?"}], max_tokens=4)
    assert said["usage"]["prompt_tokens"] == len(ids)
    model.close()


def test_options_change_no_token() -> None:
    rows = prompt(gguf_runtime("molmoe", "f32"), case("molmoe", "square"))
    for options in (LlamaOptions(flash_attention=True), LlamaOptions(cache="bf16", gpu_layers=0)):
        engine = gguf_runtime("molmoe", "f16", options)
        assert greedy(engine, rows, 24) == expected("molmoe")[1]["square"]["generated_ids"], options


def test_weights_laid_out_anew_are_the_same_weights() -> None:
    """q4_0 is what llama.cpp repacks; its other kernel adds up in another order."""
    if has_amx():
        with pytest.raises(EngineError, match="without them: CMAKE_ARGS"):
            open_runtime(gguf_bundle("molmoe", "q4_0"), engine_options=replace(EXACT, repack=True))
        assert open_runtime(gguf_bundle("molmoe", "q4_0")).engine == "llama.cpp"
        return
    rows = prompt(gguf_runtime("molmoe", "f32"), case("molmoe", "square"))
    plain, repacked = (
        logits_of(gguf_runtime("molmoe", "q4_0", replace(EXACT, repack=repack)), rows, 16) for repack in (False, True)
    )
    assert relative(repacked, plain) < 1e-2


def test_options_are_read_and_refused() -> None:
    assert LlamaOptions.parse("") == LlamaOptions()
    wanted = LlamaOptions(gpu_layers=20, cache="q8_0", flash_attention=True, repack=False)
    assert LlamaOptions.parse("gpu_layers=20, cache=q8_0,flash_attention=yes,repack=no") == wanted
    assert LlamaOptions.parse("gpu_layers=auto,repack=auto") == LlamaOptions()
    for text, why in (
        ("cache=q9", "'q9' is not a supported cache type"),
        ("gpu_layers=-1", "whole number"),
        ("gpu_layers=many", "whole number"),
        ("repack=maybe", "yes, no or auto"),
        ("threads=2", '"threads" is not a known option'),
        ("cache", '"cache" is not NAME=VALUE'),
        ("cache=q8_0,flash_attention=no", "needs flash attention"),
    ):
        with pytest.raises(EngineError, match=why):
            LlamaOptions.parse(text)
    for given in ({"cache": "q8_0"}, "cache=f32", 3, True):
        with pytest.raises(EngineError, match="engine_options must be LlamaOptions"):
            open_runtime(gguf_bundle("molmoe", "f32"), engine_options=given)  # type: ignore[arg-type]
    assert open_runtime(gguf_bundle("molmoe", "f32"), engine_options=LlamaOptions(cache="f32")).engine == "llama.cpp"
    with pytest.raises(EngineError, match=r"but .* is a bundle for ONNX Runtime: leave engine_options out"):
        open_runtime(exported.bundle("molmoe"), engine_options=LlamaOptions())
    with pytest.raises(EngineError, match=r"but .* is a checkpoint, which runs on PyTorch: leave engine_options out"):
        open_runtime(GOLDEN / "molmoe", engine_options=LlamaOptions())


def test_a_gpu_that_is_not_here_is_refused_with_what_builds_it() -> None:
    from molmo_edge.runtimes.llama_library import gpus

    if gpus():
        pytest.skip("this build has a GPU")
    for device, flag in (("cuda", "GGML_CUDA"), ("vulkan", "GGML_VULKAN"), ("mps", "GGML_METAL")):
        with pytest.raises(Unavailable, match=f"only the CPU: .*{flag}=on.* pip install"):
            open_runtime(gguf_bundle("molmoe", "f32"), device=device)


@pytest.mark.parametrize("head_dim", [8, 16])
def test_per_head_norms_run_on_llama_cpp_s_qwen3(head_dim: int, tmp_path: Path) -> None:
    """Heads of d_model / n_heads, and wider ones, which the file's metadata has to name."""
    from test_model_variants import TOKENIZER, VARIANTS, random_model

    config = VARIANTS["qk_norm_per_head"]
    model = random_model(replace(config, decoder=replace(config.decoder, head_dim_override=head_dim)))
    save_checkpoint(model, TOKENIZER, tmp_path / "checkpoint")
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", "f32", engine="gguf")
    engine = open_runtime(tmp_path / "bundle", threads=2, engine_options=EXACT)
    assert engine.config == model.config
    rows = engine.embed(np.random.default_rng(0).integers(0, 500, 80))
    with torch.inference_mode():
        exact = model.decoder.logits(model.decoder(torch.from_numpy(rows)[None])[0]).numpy()[-64:]
    assert relative(logits_of(engine, rows, 64), exact) < 1e-5
