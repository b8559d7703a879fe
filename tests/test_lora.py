"""Adapters against the weights that they stand for, in memory and in files, over float32 and over four bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_checkpoints import DECODERS, PLAIN, a_batch, a_recipe, close, hidden, write_checkpoint
from torch import Tensor

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.tensor_names import hub_layout
from molmo_edge.checkpoints.tensor_sources import CheckpointError
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import Molmo, load_checkpoint
from molmo_edge.modeling.decoder import SparseFFN, grouped_mm, mix_experts
from molmo_edge.presets import PRESETS
from molmo_edge.training.adapters import (
    ADAPTERS,
    AdaptersFile,
    base_identity,
    load_adapters,
    merge,
    save_adapters,
)
from molmo_edge.training.forward import Trainable
from molmo_edge.training.lora import (
    LoraConfig,
    LoraError,
    adapted,
    adapter_name,
    add_adapters,
    build_adapted,
    count_values,
    open_base,
)
from molmo_edge.training.optimizer import part_of
from molmo_edge.training.parallel import World

CPU = torch.device("cpu")
EVERYWHERE = LoraConfig(rank=3, expert_rank=2, targets=("attention", "ffn", "experts", "connector", "vision"), whole=())


pytestmark = pytest.mark.usefixtures("one_thread")


def filled(molmo: Molmo, lora: LoraConfig, seed: int = 1) -> list[str]:
    """Adapters as after some steps: no b is zero, and what is trained whole has moved."""
    names = add_adapters(molmo, lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in names:
            molmo.get_parameter(name).add_(torch.randn(molmo.get_parameter(name).shape, generator=generator) * 0.02)
    return names


def saved(molmo: Molmo, lora: LoraConfig, checkpoint: Path, path: Path) -> Path:
    save_adapters(molmo, path, lora, base_identity(molmo.config, open_tensors(checkpoint)))
    return path


def differ(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-3 * one.abs().max())


@pytest.mark.parametrize("kind", DECODERS)
def test_a_run_begins_with_the_checkpoints_answers(small_checkpoints: dict[str, Path], kind: str) -> None:
    batch = a_batch(small_checkpoints[kind])
    molmo, _, _ = load_checkpoint(small_checkpoints[kind])
    before = hidden(molmo, batch)
    names = add_adapters(molmo, EVERYWHERE)
    close(hidden(molmo, batch), before)
    again, _, _ = load_checkpoint(small_checkpoints[kind])
    add_adapters(again, EVERYWHERE)
    assert all(torch.equal(molmo.get_parameter(n), again.get_parameter(n)) for n in names), "drawn from the seed"
    assert molmo.get_parameter("decoder.blocks.0.attn.att_proj.adapter.a").std() > 0.05


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("kind", DECODERS)
def test_gradients_are_where_they_are_asked_for(small_checkpoints: dict[str, Path], kind: str, recompute: bool) -> None:
    molmo, _, _ = load_checkpoint(small_checkpoints[kind])
    names = filled(molmo, LoraConfig(rank=3, expert_rank=2))
    model = Trainable(molmo, dataclasses.replace(PLAIN, recompute=recompute)).train()
    sums = model(a_batch(small_checkpoints[kind]))
    sums.cross_entropy.backward()
    assert {n.removeprefix("molmo.") for n, p in model.named_parameters() if p.grad is not None} == set(names)
    assert all(molmo.get_parameter(n).grad.abs().max() > 0 for n in names)
    assert {part_of(n) for n in names} == {"connector", "decoder"}
    assert not any("router" in n or "norm" in n for n in names)
    inner = "ffn.adapter.down.a" if kind == "experts" else "ffn.ff_out.adapter.a"
    assert f"decoder.blocks.1.{inner}" in names
    assert "connector.pad_embed" in names


@pytest.mark.parametrize("kind", DECODERS)
def test_an_adapter_of_full_rank_has_the_gradient_of_its_matrix(small_checkpoints: dict[str, Path], kind: str) -> None:
    """With a the identity, W + s b: the gradient of b is s times that of W."""
    batch = a_batch(small_checkpoints[kind])
    whole, _, _ = load_checkpoint(small_checkpoints[kind])
    Trainable(whole, PLAIN).train()(batch).cross_entropy.backward()
    molmo, _, _ = load_checkpoint(small_checkpoints[kind])
    n = 64  # no matrix has more columns
    add_adapters(molmo, dataclasses.replace(EVERYWHERE, rank=n, expert_rank=n, alpha=2.0 * n))
    parameters = adapted(whole.config, EVERYWHERE)
    for parameter in parameters:
        a = molmo.get_parameter(f"{adapter_name(parameter)}.a")
        a.data = torch.eye(n, a.shape[-1]).expand_as(a).contiguous()
    Trainable(molmo, PLAIN).train()(batch).cross_entropy.backward()
    for parameter in parameters:
        ours, expected = molmo.get_parameter(f"{adapter_name(parameter)}.b").grad, whole.get_parameter(parameter).grad
        assert ours is not None
        assert expected is not None
        assert expected.any()
        close(ours[..., : expected.shape[-1]], 2 * expected, 1e-4)


def only(target: str) -> LoraConfig:
    return LoraConfig(rank=3, expert_rank=2, targets=(target,), whole=())


@pytest.mark.parametrize("target", EVERYWHERE.targets)
def test_merged_weights_answer_as_their_adapters(
    small_checkpoints: dict[str, Path], target: str, tmp_path: Path
) -> None:
    checkpoint = small_checkpoints["dense" if target == "ffn" else "experts"]
    batch = a_batch(checkpoint)
    molmo, _, _ = load_checkpoint(checkpoint)
    plain = hidden(molmo, batch)
    filled(molmo, only(target))
    ours = hidden(molmo, batch)
    merge(checkpoint, saved(molmo, only(target), checkpoint, tmp_path / ADAPTERS), tmp_path / "out", "F32")
    merged, tokenizer, config = load_checkpoint(tmp_path / "out")
    close(hidden(merged, batch), ours)
    assert differ(plain, ours)
    assert config == molmo.config
    assert tokenizer.special.bos == Tokenizer.from_file(checkpoint / "tokenizer.json").special.bos
    base, _, _ = load_checkpoint(checkpoint)
    changed = {n for n in hub_layout(config) if not torch.equal(base.get_parameter(n), merged.get_parameter(n))}
    assert changed == set(adapted(config, only(target)))


def test_what_is_trained_whole_is_merged_too(small_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint, lora = (
        small_checkpoints["experts"],
        LoraConfig(rank=3, targets=("attention",), whole=("connector", "vision")),
    )
    molmo, _, _ = load_checkpoint(checkpoint)
    names = filled(molmo, lora)
    assert "vision.blocks.1.feed_forward.w1.bias" in names
    assert "vision.pre_ln.weight" in names
    assert "vision.blocks.2.feed_forward.w1.bias" not in names, "a block that never runs"
    merge(checkpoint, saved(molmo, lora, checkpoint, tmp_path / ADAPTERS), tmp_path / "out", "F32")
    merged, _, _ = load_checkpoint(tmp_path / "out")
    close(hidden(merged, a_batch(checkpoint)), hidden(molmo, a_batch(checkpoint)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kernel", ["loop", "grouped", "auto", "wide"])
def test_experts_by_every_kernel(
    small_checkpoints: dict[str, Path], kernel: str, dtype: torch.dtype, tolerance: float
) -> None:
    if kernel == "grouped" and grouped_mm is None:
        pytest.skip("this PyTorch has no grouped product")
    molmo, _, _ = load_checkpoint(small_checkpoints["experts"])
    filled(molmo, EVERYWHERE)
    ffn = molmo.decoder.blocks[0].ffn
    assert isinstance(ffn, SparseFFN)
    merged = []
    for which in ("gate", "up", "down"):
        adapter = ffn.adapter[which]  # type: ignore[index]
        merged.append((getattr(ffn, which) + adapter.scale * adapter.b @ adapter.a).detach())
        getattr(ffn, which).data = getattr(ffn, which).data.to(dtype)
    ffn.kernel = kernel
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(2), requires_grad=True)
    weights, experts = ffn.route(x)
    expected = mix_experts(x, weights, experts, tuple(merged), "loop")
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = ffn.mix(x, weights, experts)
    assert ours.dtype == torch.float32
    close(ours, expected, tolerance)
    (grad,) = torch.autograd.grad(ours.sum(), x, retain_graph=True)
    close(grad, torch.autograd.grad(expected.sum(), x, retain_graph=True)[0], 2 * tolerance)
    ours.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in ffn.adapter.parameters())


def test_saved_adapters_are_loaded(small_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint, lora = small_checkpoints["experts"], LoraConfig(rank=3, expert_rank=2, alpha=7.5)
    molmo, _, _ = load_checkpoint(checkpoint)
    names = filled(molmo, lora)
    path = saved(molmo, lora, checkpoint, tmp_path / ADAPTERS)
    assert AdaptersFile.open(path).lora == lora
    again, _, _ = load_checkpoint(checkpoint)
    assert load_adapters(again, path, checkpoint) == names
    assert torch.equal(hidden(again, a_batch(checkpoint)), hidden(molmo, a_batch(checkpoint)))
    from safetensors.torch import load_file

    assert set(load_file(path)) == set(names), "other tools read it"
    values = sum(count_values(molmo.config, lora)[:2])
    assert 4 * values < path.stat().st_size < 4 * values + 40_000


def test_adapters_of_another_base_are_refused(small_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = small_checkpoints["experts"]
    molmo, _, _ = load_checkpoint(checkpoint)
    filled(molmo, LoraConfig())
    path = saved(molmo, LoraConfig(), checkpoint, tmp_path / ADAPTERS)
    other = write_checkpoint(tmp_path / "other", "experts", seed=5)
    for stranger in (other, small_checkpoints["dense"]):
        with pytest.raises(LoraError, match=r"adapters\.safetensors were trained for a different checkpoint than"):
            merge(stranger, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    fresh, _, _ = load_checkpoint(other)
    with pytest.raises(LoraError, match="for a different checkpoint"):
        load_adapters(fresh, path, other)
    merge(checkpoint, path, tmp_path / "merged")
    with pytest.raises(LoraError, match="for a different checkpoint"):  # they would count twice
        merge(tmp_path / "merged", path, tmp_path / "out")
    narrow = write_checkpoint(tmp_path / "narrow", "experts", dtype="BF16")
    merge(narrow, path, tmp_path / "out")  # the same weights, stored otherwise


def test_errors(small_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = small_checkpoints["dense"]
    molmo, _, config = load_checkpoint(checkpoint)
    for wrong, match in (
        (
            {"targets": ("decoder",)},
            r'"decoder" cannot be trained this way \(known: attention, ffn, experts',
        ),
        ({"whole": ("decoder",)}, r'"decoder" cannot be trained this way \(known: connector, vision'),
        ({"targets": ("connector",)}, '"connector" cannot be trained both as a whole and with adapters'),
        ({"rank": 0}, "ranks must be at least 1"),
    ):
        with pytest.raises(LoraError, match=match):
            LoraConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(LoraError, match="it has no experts"):
        add_adapters(molmo, LoraConfig(targets=("experts",), whole=()))
    filled(molmo, EVERYWHERE)
    path = saved(molmo, EVERYWHERE, checkpoint, tmp_path / ADAPTERS)
    with pytest.raises(LoraError, match="is the checkpoint itself"):
        merge(checkpoint, path, checkpoint)
    with pytest.raises(LoraError, match=r"nowhere does not exist"):
        merge(checkpoint, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(LoraError, match="lacks the settings of its adapters"):
        merge(checkpoint, checkpoint / "model.safetensors", tmp_path / "out")
    lied = tmp_path / "lied.safetensors"
    save_adapters(molmo, lied, LoraConfig(), base_identity(config, open_tensors(checkpoint)))
    with pytest.raises(LoraError, match="is damaged: its adapters do not match its header"):
        merge(checkpoint, lied, tmp_path / "out")
    short = tmp_path / "short.safetensors"
    short.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"short\.safetensors is damaged"):
        merge(checkpoint, short, tmp_path / "out")
    assert not list(tmp_path.glob("*.part")), "written under another name, and renamed"
    with pytest.raises(LoraError, match=r'cannot be stored in "int8" \(known: fp32, bf16, nf4'):
        build_adapted(checkpoint, a_recipe(), World(0, 1, CPU), LoraConfig(), "int8")
    with pytest.raises(LoraError, match="4-bit weights cannot be spread over ranks"):
        build_adapted(checkpoint, a_recipe(), World(0, 2, CPU), LoraConfig(), "nf4")


def test_how_much_is_trained(small_checkpoints: dict[str, Path]) -> None:
    for kind, checkpoint in small_checkpoints.items():
        for lora in (LoraConfig(), EVERYWHERE):
            molmo, _, config = load_checkpoint(checkpoint)
            adapters, own, every = count_values(config, lora)
            assert every == sum(p.numel() for p in molmo.parameters()), kind
            add_adapters(molmo, lora)
            assert adapters + own == sum(p.numel() for p in molmo.parameters() if p.requires_grad), kind
    adapters, own, every = count_values(PRESETS["molmoe-1b"], LoraConfig())
    assert (adapters + own) / every == pytest.approx(0.0073, abs=1e-4)


# --- four bits ------------------------------------------------------------------------------------------------------


def codes(molmo: Molmo) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in molmo.named_parameters() if p.dtype == torch.uint8}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", DECODERS)
def test_four_bits_learn_and_stay_as_they_are(
    small_checkpoints: dict[str, Path], kind: str, precision: torch.dtype
) -> None:
    pytest.importorskip("bitsandbytes")
    checkpoint, lora = small_checkpoints[kind], LoraConfig(rank=4, expert_rank=2)
    config, batch = read_config(checkpoint), a_batch(checkpoint)
    molmo = open_base(config, open_tensors(checkpoint), str(checkpoint), "nf4", CPU)
    answers, _, _ = load_checkpoint(checkpoint, precision="nf4")
    close(hidden(molmo, batch), hidden(answers, batch), 2e-2)  # the same four bits
    names = add_adapters(molmo, lora)
    before = codes(molmo)
    assert len(before) == config.decoder.n_layers * (2 + (3 * 8 if kind == "experts" else 2))
    model = Trainable(molmo, PLAIN).train()
    parameters = [molmo.get_parameter(name) for name in names]
    assert {p.dtype for p in parameters} == {torch.float32}
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for step in range(6):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            sums = model(batch)
        losses.append(float(sums.cross_entropy.detach() / sums.weight))
        optimizer.zero_grad()
        sums.cross_entropy.backward()
        if step:  # at first b is zero, and so is the gradient of a
            assert all(p.grad is not None and p.grad.any() for p in parameters)
        optimizer.step()
        if step == 2:  # a validation in between: a processor may not pack the weights for answers
            model.eval()
            with torch.no_grad():
                model(batch)
            model.train()
    assert losses[-1] < 0.8 * losses[0]
    after = codes(molmo)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    if kind == "experts":
        assert sums.expert_load.sum() == sum(batch.lengths) * config.decoder.n_layers * config.decoder.top_k


def test_gradients_flow_through_four_bits(small_checkpoints: dict[str, Path]) -> None:
    """To the connector, as they flow through what the four bits stand for."""
    pytest.importorskip("bitsandbytes")
    checkpoint = small_checkpoints["dense"]
    config, batch = read_config(checkpoint), a_batch(checkpoint)
    four = open_base(config, open_tensors(checkpoint), str(checkpoint), "nf4", CPU)
    wide, _, _ = load_checkpoint(checkpoint)
    for name in adapted(config, LoraConfig(targets=("attention", "ffn"))):
        layer, plain = (
            four.get_submodule(name.removesuffix(".weight")),
            wide.get_submodule(name.removesuffix(".weight")),
        )
        eye = torch.eye(plain.in_features)
        bias = 0 if plain.bias is None else plain.bias
        plain.weight.data = (layer(eye).float() - bias).detach().T.contiguous()
    lora = LoraConfig(rank=3)
    for molmo in (four, wide):
        filled(molmo, lora)
        Trainable(molmo, PLAIN).train()(batch).cross_entropy.backward()
    ours, expected = (molmo.connector.projector.w2.weight.grad.flatten() for molmo in (four, wide))
    assert F.cosine_similarity(ours, expected, dim=0) > 0.99  # activations are bfloat16 on one side
    assert ours.norm() / expected.norm() == pytest.approx(1, abs=0.05)


def test_adapters_over_four_bits_are_merged_into_the_checkpoint_itself(
    small_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    checkpoint = small_checkpoints["experts"]
    config = read_config(checkpoint)
    four = open_base(config, open_tensors(checkpoint), str(checkpoint), "nf4", CPU)
    wide, _, _ = load_checkpoint(checkpoint)
    paths = []
    for i, molmo in enumerate((four, wide)):
        filled(molmo, LoraConfig())
        paths.append(saved(molmo, LoraConfig(), checkpoint, tmp_path / f"{i}.safetensors"))
        merge(checkpoint, paths[i], tmp_path / str(i), "F32")
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert (tmp_path / "0/model.safetensors").read_bytes() == (tmp_path / "1/model.safetensors").read_bytes()


def test_bfloat16_base(small_checkpoints: dict[str, Path]) -> None:
    checkpoint = small_checkpoints["experts"]
    model = build_adapted(checkpoint, a_recipe(), World(0, 1, CPU), LoraConfig(), "bf16")
    kinds = {p.dtype for n, p in model.named_parameters() if n.startswith("molmo.decoder") and not p.requires_grad}
    assert torch.bfloat16 in kinds
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    narrow, _, _ = load_checkpoint(checkpoint)
    narrow.vision.bfloat16()  # as on a GPU
    names = add_adapters(narrow, LoraConfig(whole=("vision",)))
    assert {narrow.get_parameter(name).dtype for name in names} == {torch.float32}
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(a_batch(checkpoint)).cross_entropy.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
