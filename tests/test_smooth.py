"""Loud channels: the same function after smoothing, and a smaller error in int8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from exported import GOLDEN, case, prompt, relative, runtime

from molmo_edge.export import export_bundle
from molmo_edge.export.source import open_source
from molmo_edge.modeling import load_checkpoint
from molmo_edge.modeling.decoder import DenseFFN
from molmo_edge.modeling.weights import save_checkpoint
from molmo_edge.quantize.calibration_prompts import DecoderInput
from molmo_edge.quantize.smoothing import smoothed
from molmo_edge.runtimes import open_runtime

LOUD = (3, 17)  # channels


def with_loud_channels(architecture: str, folder: Path) -> Path:
    """The golden checkpoint, two channels behind each norm fifty times as loud, and their columns as much quieter."""
    model = load_checkpoint(GOLDEN / architecture)[0]
    with torch.no_grad():
        for block in model.decoder.blocks:
            ffn = block.ffn
            behind = [ffn.ff_proj.weight] if isinstance(ffn, DenseFFN) else [ffn.router.weight, ffn.gate, ffn.up]
            for norm, matrices in ((block.attn_norm, [block.attn.att_proj.weight]), (block.ff_norm, behind)):
                for channel in LOUD:
                    norm.weight[channel] *= 50
                    for matrix in matrices:
                        matrix[..., channel] /= 50
    save_checkpoint(model, GOLDEN / architecture / "tokenizer.json", folder)
    return folder


def logits(bundle: Path, rows: np.ndarray) -> np.ndarray:
    engine = open_runtime(bundle)
    cache = engine.new_cache(len(rows))
    engine.forward(rows[:-16], cache)
    found = np.stack([engine.forward(row[None], cache) for row in rows[-16:]])
    engine.close()
    return found


@pytest.mark.parametrize("architecture", ["molmoe", "qwen"])
def test_int8_with_a_calibration_bears_loud_channels(architecture: str, tmp_path: Path) -> None:
    checkpoint = with_loud_channels(architecture, tmp_path / "checkpoint")
    rows = prompt(runtime(architecture), case(architecture, "square"))
    found = {}
    for name, precision, calibrate in (("exact", "fp32", None), ("plain", "int8", None), ("smooth", "int8", GOLDEN)):
        export_bundle(checkpoint, tmp_path / name, {"decoder": precision}, calibrate=calibrate, measure=False)
        found[name] = logits(tmp_path / name, rows)
    exact = logits_of(architecture, rows)
    assert relative(found["exact"], exact) < 1e-4, "loud or not, it is the same function"
    errors = {name: float(np.linalg.norm(found[name] - exact)) for name in ("plain", "smooth")}
    assert errors["smooth"] < 0.5 * errors["plain"], errors


def logits_of(architecture: str, rows: np.ndarray) -> np.ndarray:
    engine = runtime(architecture)
    cache = engine.new_cache(len(rows))
    engine.forward(rows[:-16], cache)
    return np.stack([engine.forward(row[None], cache) for row in rows[-16:]])


@pytest.mark.parametrize("architecture", ["molmoe", "qwen", "olmo"])
def test_smoothed_weights_are_the_same_function(architecture: str) -> None:
    from molmo_edge.modeling.weights import build_model

    config, tensors = open_source(GOLDEN / architecture)
    rows = prompt(runtime(architecture), case(architecture, "square"))
    smooth = smoothed(config, tensors, [DecoderInput(rows, np.zeros(len(rows), bool))], ("attention", "experts"))
    a, b = (build_model(config, source, where="test") for source in (tensors, smooth))
    with torch.inference_mode():
        x = torch.from_numpy(rows)[None]
        exact, found = (model.decoder.logits(model.decoder(x))[0].numpy() for model in (a, b))
    assert relative(found, exact) < 1e-4
    name = "model.transformer.blocks.0" + (".attn" if config.decoder.n_experts else "") + ".att_proj.weight"
    changed = (smooth.get(name) != tensors.get(name)).any(axis=1)
    d = config.decoder
    assert changed[d.q_dim + d.kv_dim :].any()
    assert changed[: d.q_dim + d.kv_dim].any() != d.norm_after, "OLMo has no norm before its queries and keys"


def test_only_what_int8_rounds_is_smoothed() -> None:
    config, tensors = open_source(GOLDEN / "molmoe")
    rows = prompt(runtime("molmoe"), case("molmoe", "square"))
    smooth = smoothed(config, tensors, [DecoderInput(rows, np.zeros(len(rows), bool))], ("attention",))
    changed = {name for name in tensors.names() if (smooth.get(name) != tensors.get(name)).any()}
    block = "model.transformer.blocks.{}.attn"
    assert changed == {f"{block.format(n)}.{leaf}.weight" for n in (0, 1) for leaf in ("attn_norm", "att_proj")}
