"""Calibrated rounding: the algorithm alone, what it is fed with, and what it is worth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exported import ARCHITECTURES, GOLDEN, bundle, case, costs, prompt, runtime
from test_quantize import norm_error
from torch import Tensor

import molmo_edge
from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.config import DecoderConfig, ImageConfig, MolmoConfig, VisionConfig
from molmo_edge.export.bundle_weights import BundleTensors
from molmo_edge.export.source import open_source
from molmo_edge.frontend.image_files import ImageError
from molmo_edge.frontend.prompts import PromptError, text_ids
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling import Molmo, load_checkpoint, save_checkpoint
from molmo_edge.quantize import QuantizeError
from molmo_edge.quantize.calibration import Calibration
from molmo_edge.quantize.calibration_prompts import MAX_PROMPTS, DecoderInput, Prompt, embed_prompts, find_prompts
from molmo_edge.quantize.gptq import gptq
from molmo_edge.quantize.importance import importance
from molmo_edge.quantize.layer_inputs import LayerRunner
from molmo_edge.quantize.rounding import Blocks, nearest

EXPERTS = "model.transformer.blocks.0.mlp.experts"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(n: int, width: int) -> Tensor:
    """Inputs that move together, a few of them large, as those of transformers do."""
    x = drawn(n, width) @ (drawn(width, width, seed=1) / width**0.5 + 0.3 * torch.eye(width))
    x[:, :3] *= 8
    return x


def solved(weight: Tensor, hessian: Tensor, block: int, asymmetric: bool = False) -> np.ndarray:
    codes, scale, zero_point = gptq(weight, hessian, block, asymmetric=asymmetric)
    assert codes.dtype == torch.uint8
    assert codes.max() <= 15
    assert codes.shape == weight.shape
    assert scale.shape == (*weight.shape[:-1], weight.shape[-1] // block)
    assert (zero_point is None) != asymmetric
    return Blocks(codes.numpy(), scale.numpy(), None if zero_point is None else zero_point.numpy()).restored()


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_it_halves_the_error_of_a_product(block: int, asymmetric: bool) -> None:
    """On inputs that it has not seen. Measured: 0.041 to 0.052 against 0.080 to 0.102."""
    weight, x = 0.02 * drawn(96, 256, seed=2), correlated(4000, 256)
    seen, fresh = x[:3000], x[3000:]
    exact = (fresh @ weight.T).numpy()
    ours = solved(weight, seen.T @ seen, block, asymmetric)
    plain = nearest("", weight.numpy(), block, asymmetric).restored()
    assert norm_error(fresh.numpy() @ ours.T, exact) < 0.6 * norm_error(fresh.numpy() @ plain.T, exact)


def test_it_solves_what_is_small_enough_to_be_searched() -> None:
    """One row of one block against many random roundings: none of them is better."""
    x = correlated(500, 16)
    weight = drawn(1, 16, seed=3)
    codes, scale, _ = gptq(weight, x.T @ x, 16)
    exact = x @ weight.T

    def cost(codes: Tensor) -> Tensor:
        return ((x @ ((codes - 8.0) * scale).T - exact) ** 2).sum(dim=0)

    near = (weight / scale + 8).floor()
    tries = (near + torch.randint(0, 2, (5000, 16), generator=torch.Generator().manual_seed(4))).clamp(0, 15)
    assert cost(codes.float()) < cost(tries).min()


def test_inputs_that_do_not_move_together_mean_plain_rounding() -> None:
    weight = drawn(40, 64, seed=5)
    for hessian in (torch.eye(64), torch.zeros(64, 64)):
        ours = solved(weight, hessian, 32)
        assert norm_error(ours, weight.numpy()) <= norm_error(
            nearest("", weight.numpy(), 32, False).restored(), weight.numpy()
        )


def test_matrices_side_by_side() -> None:
    x = correlated(300, 64)
    weights, hessians = drawn(3, 20, 64, seed=6), torch.stack([x.T @ x, x[:90].T @ x[:90], torch.eye(64)])
    together = solved(weights, hessians, 32, asymmetric=True)
    for k in range(3):
        assert norm_error(together[k], solved(weights[k], hessians[k], 32, asymmetric=True)) < 0.02
    zeros = solved(torch.zeros(4, 64), x.T @ x, 32)
    assert not zeros.any()


# What it is fed with.


def causal(rows: np.ndarray) -> DecoderInput:
    return DecoderInput(rows, np.zeros(len(rows), bool))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_the_calibration_sees_what_the_decoder_sees(architecture: str) -> None:
    """Layer by layer with unrounded weights, each matrix gets the inputs that the whole model gives it."""
    model, _, config = load_checkpoint(GOLDEN / architecture)
    rows = prompt(runtime(architecture), case(architecture, "square"))
    seen: dict[str, Tensor] = {}
    for name, module in model.decoder.named_modules():
        if name.endswith(("att_proj", "attn_out", "ff_proj", "ff_out", "ffn")):
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0][0]}))
    model.decoder(torch.from_numpy(rows)[None])
    walk = LayerRunner(config, open_tensors(GOLDEN / architecture), [causal(rows)])
    for layer in range(config.decoder.n_layers):
        walk.advance_to(layer)
        for name, module in walk.block.named_modules():
            exact = seen.get(f"blocks.{layer}.{name}")
            if exact is not None:
                (found,) = walk.inputs(module)
                torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_calibrated_bundles_are_closer_to_fp32(architecture: str) -> None:
    """Measured, mean KL against plain rounding: MolmoE 0.0024 (0.012), Qwen2 0.010 (0.055), OLMo 0.0084 (0.017)."""
    kl, same = costs(architecture, runtime(architecture, "q4", calibrate=GOLDEN))
    plain_kl, plain_same = costs(architecture, runtime(architecture, "q4"))
    print(f"{architecture}: same top token {same:.1%} ({plain_same:.1%}), mean KL {kl:.2g} ({plain_kl:.2g})")
    assert kl < 0.7 * plain_kl
    assert same > plain_same - 0.02


def untouched(weight: np.ndarray) -> np.ndarray:
    """What GPTQ makes of a matrix whose inputs it does not know, as a bundle has it."""
    n_in = weight.shape[1]
    block = 32 if n_in % 32 == 0 else 16
    codes, scale, _ = gptq(torch.from_numpy(weight), torch.zeros(n_in, n_in), block)
    return Blocks(codes.numpy(), scale.numpy().astype(np.float16).astype(np.float32)).restored()


def test_every_matrix_is_calibrated() -> None:
    """None is as it would be without its inputs; and the manifest has the errors of the file."""
    directory = bundle("molmoe", "q4", calibrate=GOLDEN)
    errors = json.loads((directory / "molmo_edge.json").read_text())["components"]["decoder"]["weight_errors"]
    ours, exact = BundleTensors(directory), open_tensors(GOLDEN / "molmoe")
    names = [name for name in exact.names() if name.endswith(("att_proj.weight", "attn_out.weight", "_proj.weight"))]
    names = [name for name in names if "blocks." in name]
    assert len(names) == 2 * (2 + 3 * 8)
    calibrated = {name for name in names if not np.array_equal(ours.get(name), untouched(exact.get(name)))}
    idle = set(names) - calibrated
    assert len(idle) < 6
    assert all("down_proj" in name for name in idle)
    attention = "model.transformer.blocks.0.attn.att_proj"
    found = norm_error(ours.get(f"{attention}.weight"), exact.get(f"{attention}.weight"))
    assert errors[attention][0] == pytest.approx(found, rel=0.01)


@torch.inference_mode()
def test_experts_with_few_tokens_learn_from_all(tmp_path: Path) -> None:
    """On tokens that they have not seen. Measured: 0.89 of the error of plain rounding; mostly from their own 1.21."""
    decoder = DecoderConfig(
        d_model=64, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=64, n_experts=8, top_k=1, vocab_size=500,
        embedding_size=512, additional_vocab_size=16,
    )  # fmt: skip
    image = ImageConfig(crop_size=56, overlap_margins=(0, 0), max_crops=2)
    vision = VisionConfig("openai", 32, 3, 4, 64, n_pos=17, layers=(-2, -3))
    model = Molmo(MolmoConfig(image, vision, decoder, projector_dim=32))
    model.init_weights(std=0.15, generator=torch.Generator().manual_seed(0))
    save_checkpoint(model, GOLDEN / "molmoe" / "tokenizer.json", tmp_path / "checkpoint")
    config, tensors = open_source(tmp_path / "checkpoint")
    x = correlated(1200, 64).numpy()
    calibration = Calibration(config, tensors, [causal(x[:160])])  # 20 tokens for an expert, with 64 inputs
    ffn = LayerRunner(config, tensors, [causal(x[:1])]).block.ffn
    fresh = F.normalize(torch.from_numpy(x[160:]), dim=-1) * 8
    errors: dict[str, list[float]] = {"calibrated": [], "nearest": []}
    for e in range(8):
        exact = ffn.expert(fresh, e)
        for name, rounding in (("calibrated", calibration), ("nearest", nearest)):
            gate, up, down = (
                torch.from_numpy(rounding(f"{EXPERTS}.{e}.{part}_proj", matrix[e].numpy(), 64, False).restored())
                for part, matrix in (("gate", ffn.gate), ("up", ffn.up), ("down", ffn.down))
            )
            found = F.linear(F.silu(F.linear(fresh, gate)) * F.linear(fresh, up), down)
            errors[name].append(norm_error(found.numpy(), exact.numpy()))
    assert np.mean(errors["calibrated"]) < 0.95 * np.mean(errors["nearest"]), errors


@pytest.mark.parametrize("question", ["Point to the cup.", "How many cups are there?"])
def test_points_of_answers_are_the_tokens_that_nano_writes(question: str) -> None:
    molmo, photo = molmo_edge.Molmo(), Path(__file__).parents[1] / "examples" / "coffee.jpg"
    answer, engine = molmo.ask(photo, question), molmo.engine
    assert answer.points
    grounding = engine.scene(photo).grounding
    assert grounding is not None
    (found,) = embed_prompts([Prompt(photo, question, answer.text)], engine.runtime, engine.tokenizer)
    written = [token for token in answer.token_ids if token != engine.tokenizer.special.eos]
    assert found.answer == len(written)
    np.testing.assert_array_equal(found.embeddings[-found.answer :], grounding.embed(np.array(written)))


def test_sequences_hold_image_question_and_answer() -> None:
    tokenizer = Tokenizer.from_file(GOLDEN / "qwen" / "tokenizer.json")
    engine, image = runtime("qwen"), GOLDEN / "coffee.png"
    inputs = embed_prompts([Prompt(image, "What?"), Prompt(image, "What?", "A cup.")], engine, tokenizer)
    assert [one.answer for one in inputs] == [0, len(tokenizer.encode(" A cup."))]
    short, long = (one.embeddings for one in inputs)
    answer = engine.embed(np.array(tokenizer.encode(" A cup.")))
    np.testing.assert_array_equal(long, np.concatenate([short, answer]))
    text = engine.embed(text_ids(tokenizer, ["What?"]))
    np.testing.assert_array_equal(short[-len(text) :], text)
    assert read_config(GOLDEN / "qwen").decoder.d_model == short.shape[1]


# Where its prompts come from.


def test_photos_get_common_questions(tmp_path: Path) -> None:
    for n in range(40):
        shutil.copyfile(GOLDEN / "text.png", tmp_path / f"{n:02}.png")
    (tmp_path / "notes.txt").write_text("no photo")
    found = find_prompts(tmp_path)
    assert len(found) == MAX_PROMPTS
    assert len({entry.image for entry in found}) == MAX_PROMPTS
    assert found[0].image.name == "00.png"
    assert found[-1].image.name > "37"
    assert len({entry.question for entry in found}) == 5


def test_prompts_of_ones_own(tmp_path: Path) -> None:
    shutil.copyfile(GOLDEN / "text.png", tmp_path / "a.png")
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"image": "a.png", "question": "What?", "answer": "This."}\n\n{"image": "a.png", "question": "?"}\n'
    )
    assert find_prompts(tmp_path) == [
        Prompt(tmp_path / "a.png", "What?", "This."),
        Prompt(tmp_path / "a.png", "?"),
    ]
    for line, message in (
        ('{"image": "b.png", "question": "?"}', r"line 1: there is no .*b\.png"),
        ('{"image": "a.png"}', "line 1: expected"),
        ("[]", "line 1: expected"),
        ("not json", "line 1: expected"),
        ('{"image": "a.png", "question": 5}', "line 1: expected .* must be strings"),
        ('{"image": "a.png", "question": "?", "answer": ["x"]}', "line 1: expected .* must be strings"),
    ):
        file.write_text(line)
        with pytest.raises(QuantizeError, match=message):
            find_prompts(tmp_path)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(QuantizeError, match="not in UTF-8"):
        find_prompts(tmp_path)
    file.write_text("")
    with pytest.raises(QuantizeError, match="contains neither calibration photos"):
        find_prompts(tmp_path)
    file.write_text('{"image": "a.png", "question": " "}')
    with pytest.raises(PromptError):
        find_prompts(tmp_path)
    file.unlink()
    (tmp_path / "folder.png").mkdir()
    assert [prompt.image.name for prompt in find_prompts(tmp_path)] == ["a.png"]
    (tmp_path / "a.png").write_bytes(b"no photo")
    with pytest.raises(ImageError):
        find_prompts(tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_importance_is_what_the_inputs_squared_are(architecture: str) -> None:
    """Of a GGUF: recomputed from the whole model's own inputs, for a dense layer and for an expert."""
    model, _, config = load_checkpoint(GOLDEN / architecture)
    rows = prompt(runtime(architecture), case(architecture, "square"))
    seen: dict[str, Tensor] = {}
    for name, module in model.decoder.named_modules():
        if name.endswith(("att_proj", "ff_out", "ffn")):
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0][0]}))
    model.decoder(torch.from_numpy(rows)[None])
    found = importance(config, open_tensors(GOLDEN / architecture), [causal(rows)])
    last = config.decoder.n_layers - 1

    def squares(x: Tensor) -> Tensor:
        return (F.normalize(x, dim=-1) if config.decoder.norm_after else x).square().mean(0)

    exact = squares(seen[f"blocks.{last}.attn.att_proj"])
    torch.testing.assert_close(torch.from_numpy(found[f"blk.{last}.attn_k.weight"]), exact, rtol=1e-3, atol=1e-8)
    if not config.decoder.n_experts:
        exact = squares(seen[f"blocks.{last}.ffn.ff_out"])
        torch.testing.assert_close(torch.from_numpy(found[f"blk.{last}.ffn_down.weight"]), exact, rtol=1e-3, atol=1e-8)
        return
    x, ffn = seen[f"blocks.{last}.ffn"], model.decoder.blocks[last].ffn
    weights, chosen = ffn.route(x)
    e = int(chosen.flatten().mode().values)
    inputs = torch.stack([x[t] * weights[t, k] for t, k in torch.nonzero(chosen == e)]).square().sum(0)
    blended = inputs + 0.1 * inputs.sum() * x.square().mean(0) / x.square().mean(0).sum()
    torch.testing.assert_close(torch.from_numpy(found[f"blk.{last}.ffn_up_exps.weight"][e]), blended, rtol=1e-3, atol=0)
