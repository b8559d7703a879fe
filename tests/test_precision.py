"""The PyTorch runtime in every precision, against the same model in float32 and against the reference's numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file

from molmo_edge import Molmo
from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.config import ConfigError
from molmo_edge.frontend.crops import ImageProcessor, load_image
from molmo_edge.frontend.prompts import build_prompt
from molmo_edge.modeling import load_checkpoint
from molmo_edge.modeling.decoder import SparseFFN, by_expert, grouped_mm, mix_experts
from molmo_edge.modeling.precision import PrecisionError, choose_precision, room, weight_bytes
from molmo_edge.presets import PRESETS
from molmo_edge.runtimes import EngineError, Unavailable, open_runtime
from molmo_edge.runtimes.torch import TorchRuntime

GOLDEN = Path(__file__).parent / "golden"
ARCHITECTURES = ("molmoe", "qwen", "olmo")
CASES = ("square", "landscape", "wide_text")


def logits_of(name: str, precision: str) -> torch.Tensor:
    """All positions of the three golden cases, over the 500 real ids, the image encoded in the same precision."""
    model, tokenizer, config = load_checkpoint(GOLDEN / name, precision=precision)
    cases = json.loads((GOLDEN / name / "expected.json").read_text())
    found = []
    with torch.inference_mode():
        for case in CASES:
            image = ImageProcessor(config.image, tokenizer.special)(load_image(GOLDEN / cases[case]["image"]))
            text = tokenizer.encode(build_prompt(cases[case]["question"]))
            ids = torch.tensor([[tokenizer.special.bos, *image.tokens.tolist(), *text]])
            index = torch.from_numpy(np.where(image.token_index >= 0, image.token_index + 1, -1))[None]
            crops, masks = (torch.from_numpy(a)[None] for a in (image.crops, image.masks))
            hidden = model(ids, crops, masks, index)
            found.append(model.decoder.logits(hidden)[0, :, :500].float())
    return torch.cat(found)


def compare(name: str, precision: str) -> tuple[float, float]:
    """Share of positions with the same top token as in float32, and the mean KL divergence from it."""
    exact, ours = logits_of(name, "fp32"), logits_of(name, precision)
    same = (exact.argmax(-1) == ours.argmax(-1)).float().mean().item()
    kl = F.kl_div(ours.log_softmax(-1), exact.log_softmax(-1), reduction="batchmean", log_target=True).item()
    print(f"{name} {precision}: same top token {same:.2%}, mean KL {kl:.2g}, {len(exact)} positions")
    return same, kl


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_keeps_the_top_token(name: str) -> None:
    same, kl = compare(name, "bf16")
    assert same >= 0.99
    assert kl < 2e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_equals_the_references_top_tokens(name: str) -> None:
    """The same, at the positions that the reference recorded."""
    model_logits = logits_of(name, "bf16")
    expected = load_file(GOLDEN / name / "expected.safetensors")
    start, same = 0, []
    for case in CASES:
        n = len(expected[f"{case}.input_ids"])
        ours = model_logits[start : start + n][::16].argmax(-1).numpy()
        same += list(ours == expected[f"{case}.logits_every_16th"][:, :500].argmax(-1))
        start += n
    assert len(same) > 100
    assert np.mean(same) >= 0.99


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("precision", "most"), [("int8", 2e-4), ("nf4", 0.04)])
def test_bitsandbytes_costs_what_it_says(name: str, precision: str, most: float) -> None:
    pytest.importorskip("bitsandbytes")
    same, kl = compare(name, precision)
    assert 0 < kl < most  # not zero: something was quantised
    assert same > 0.9


@pytest.mark.parametrize("precision", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["molmoe", "qwen"])
def test_what_is_quantised_and_what_is_not(name: str, precision: str) -> None:
    pytest.importorskip("bitsandbytes")
    from molmo_edge.modeling.bitsandbytes import QuantizedExperts, QuantizedLinear

    model, _, config = load_checkpoint(GOLDEN / name, precision=precision)
    quantized = {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    each = 2 + (3 * config.decoder.n_experts if config.decoder.n_experts else 2)
    assert len(quantized) == each * config.decoder.n_layers
    assert all(n.startswith("decoder.blocks.") for n in quantized)
    block = model.decoder.blocks[0]
    if config.decoder.n_experts:
        assert isinstance(block.ffn, QuantizedExperts)
        assert block.ffn.router.weight.dtype == torch.float32
    assert block.attn_norm.weight.dtype == torch.float32
    assert {p.dtype for p in model.connector.parameters()} == {torch.float32}
    assert model.decoder.head.weight.dtype == torch.bfloat16
    if config.decoder.qkv_bias:
        bias = block.attn.att_proj.bias
        assert bias is not None
        assert bias.abs().max() > 0


def test_int8_takes_inputs_beyond_float16() -> None:
    """Where no norm stands in front of a matrix, inputs pass 65504."""
    pytest.importorskip("bitsandbytes")
    from molmo_edge.modeling.bitsandbytes import Quantizer

    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 128, generator=generator), torch.randn(5, 128, generator=generator)
    x *= torch.tensor([1.0, 1e3, 1e5, 1e7, 0.0])[:, None]
    exact = x @ weight.T
    ours = Quantizer("int8", "cpu").linear(weight)(x)
    error = (ours - exact).norm(dim=1) / exact.norm(dim=1).clamp(min=1e-9)
    assert error.max() < 0.02
    assert ours[4].abs().max() == 0


def sparse_ffn(dtype: torch.dtype) -> SparseFFN:
    config = read_config(GOLDEN / "molmoe").decoder
    ffn = SparseFFN(config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in ffn.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        if "router" not in name:
            parameter.data = parameter.data.to(dtype)
    return ffn


def plain_loop(ffn: SparseFFN, x: torch.Tensor) -> torch.Tensor:
    """An independent reading of the rule: softmax over all, the top_k largest, not renormalised."""
    probabilities = torch.softmax(x @ ffn.router.weight.T, -1)
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for e in probabilities[t].argsort(descending=True)[: ffn.top_k].tolist():
            gate, up, down = (w[e].float() for w in (ffn.gate, ffn.up, ffn.down))
            out[t] += probabilities[t, e] * (down @ (F.silu(gate @ x[t]) * (up @ x[t])))
    return out


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("tokens", [1, 50])
def test_every_way_through_the_experts_equals_the_plain_loop(dtype: torch.dtype, tolerance: float, tokens: int) -> None:
    ffn = sparse_ffn(dtype)
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(2))
    exact = plain_loop(ffn, x)
    routed = ffn.route(x)
    ways = {
        "forward": ffn(x),
        "by expert": by_expert(x, *routed, len(ffn.gate), ffn.expert),
        "wide": mix_experts(x, *routed, (ffn.gate, ffn.up, ffn.down), "wide"),
    }
    if grouped_mm is not None:
        ways["one kernel"] = mix_experts(x, *routed, (ffn.gate, ffn.up, ffn.down), "grouped")
    for way, ours in ways.items():
        assert (ours - exact).abs().max() <= tolerance * exact.abs().max(), way


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_crop_is_empty_only_when_all_its_pixels_are_minus_one(precision: str) -> None:
    """Pixels stay float32 in every precision: one that bfloat16 would round to -1 must not blank its crop."""
    model, _, _ = load_checkpoint(GOLDEN / "molmoe", precision=precision)
    crops = torch.rand(4, 576, 588, generator=torch.Generator().manual_seed(0)) * 2 - 1
    crops[1, 5, 7] = -1.001  # what bfloat16 takes for -1
    crops[2, 5, 7] = -1
    crops[3] = -1
    assert crops[1, 5, 7].bfloat16() == -1 != crops[1, 5, 7]
    features = model.vision(crops)
    assert features.dtype == torch.float32
    assert all(features[i].abs().max() > 0 for i in range(3))
    assert features[3].abs().max() == 0
    all_rounded = torch.full((1, 576, 588), -1.001)  # all of them: still pixels, not padding
    assert model.vision(all_rounded).abs().max() > 0


def test_precision_and_memory() -> None:
    config = PRESETS["molmoe-1b"]
    sizes = {name: weight_bytes(config, name, "cpu") / 1e9 for name in ("fp32", "bf16", "int8", "nf4")}
    assert math.isclose(sizes["fp32"], 28.89, abs_tol=0.01)
    assert sizes["fp32"] > 1.9 * sizes["bf16"] > 1.9 * 1.5 * sizes["int8"]
    assert sizes["nf4"] < 6
    assert weight_bytes(config, "bf16", "cuda") < weight_bytes(config, "bf16", "cpu")
    gb = 1_000_000_000
    assert choose_precision(config, "auto", "cpu", 40 * gb) == "fp32"
    assert choose_precision(config, "auto", "cpu", None) == "fp32"
    assert choose_precision(config, "auto", "cpu", 20 * gb) == "bf16"
    assert choose_precision(config, "auto", "cuda", 40 * gb) == "bf16"
    assert choose_precision(config, "nf4", "cpu", 8 * gb) == "nf4"
    with pytest.raises(
        PrecisionError, match=r'need 15\.\d GB in bf16.*only 12\.0 GB .* are free: use precision="int8"'
    ):
        choose_precision(config, "auto", "cpu", 12 * gb)
    with pytest.raises(PrecisionError, match="no precision makes it fit"):
        choose_precision(config, "fp32", "cpu", 3 * gb)
    for name in ("int8", "nf4"):
        with pytest.raises(
            PrecisionError, match=f'"{name}" is not available on mps: use precision="bf16", or device="cpu"'
        ):
            choose_precision(config, name, "mps", None)
    with pytest.raises(PrecisionError, match="no precision makes it fit"):
        choose_precision(config, "auto", "mps", 8 * gb)
    # Keys and values count: those of the 7B-O in float32 are four times MolmoE's in bfloat16, and more.
    assert room(PRESETS["molmo-7b-o"], "fp32") > 4e9 > 2e9 > room(config, "bf16")


def test_memory_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = TorchRuntime(GOLDEN / "molmoe", device="cpu")
    for error in (
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: not enough memory"),
    ):
        monkeypatch.setattr(runtime.model.decoder, "embed", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(EngineError, match="not enough memory: use fewer crops"):
            runtime.embed(np.zeros(1, np.int64))
    monkeypatch.setattr(runtime.model.decoder, "embed", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        runtime.embed(np.zeros(1, np.int64))


def test_wrong_precisions_and_devices(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match='"fp8" is not a supported precision'):
        Molmo(GOLDEN / "molmoe", precision="fp8")
    with pytest.raises(PrecisionError, match='"fp8" is not supported'):
        TorchRuntime(GOLDEN / "molmoe", precision="fp8", device="cpu")
    with pytest.raises(EngineError, match="is a bundle, whose precision was chosen at its export"):
        open_runtime(tiny_bundle, precision="bf16")
    if not torch.backends.mps.is_available():
        with pytest.raises(Unavailable, match="no MPS device"):
            open_runtime(GOLDEN / "molmoe", device="mps")
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(PrecisionError, match=r"need bitsandbytes .*molmo-edge\[quantize\]"):
        load_checkpoint(GOLDEN / "molmoe", precision="nf4")
