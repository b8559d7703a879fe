"""One step of the trainer against the reference's numbers, and each of its parts against a second way to say it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from molmo_edge.config import ImageConfig
from molmo_edge.data.examples import Annotation, Example
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.crops import ImageProcessor, load_image
from molmo_edge.modeling import load_checkpoint
from molmo_edge.modeling.decoder import SparseFFN, choose_experts, grouped_mm, mix_experts
from molmo_edge.training.attention import Unpadded, packed_mask
from molmo_edge.training.dropout import residual_dropout
from molmo_edge.training.encoding import Batch, Encoder, Encoding, EncodingError, Sample, collate
from molmo_edge.training.forward import ForwardConfig, Trainable, router_losses
from molmo_edge.training.packing import attention_mask, pack

GOLDEN = Path(__file__).parent / "golden"
PLAIN = ForwardConfig(answer_dropout=0.0)
QUESTIONS = (
    Annotation("pointing", ("Point to the cup.", '<point x="10.0" y="20.0" alt="cup">cup</point>')),
    Annotation("vqa2", ("What color?", "Red.", "And this?", "Blue as the sea.")),
    Annotation("user_qa", ("Why?", "Because.")),
)


def golden_sample(architecture: str) -> Sample:
    directory = GOLDEN / architecture
    _, tokenizer, config = load_checkpoint(directory)
    case = json.loads((directory / "expected.json").read_text())["packing"]
    image = ImageProcessor(config.image, tokenizer.special)(load_image(GOLDEN / case["image"]))
    packed = pack(tokenizer, image.tokens, case["messages"], weighting=case["loss_token_weighting"])
    index = np.where(image.token_index >= 0, image.token_index + 1, -1)
    return Sample(packed, image.crops, image.masks, index, 7)


def encoder(architecture: str = "molmoe", **changes: object) -> Encoder:
    _, tokenizer, config = load_checkpoint(GOLDEN / architecture)
    image = dataclasses.replace(config.image, max_crops=1)
    return Encoder(tokenizer, image, dataclasses.replace(Encoding(shuffle=False), **changes))


def picture(side: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def gradients(model: Trainable) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["molmoe", "qwen", "olmo"])
def test_losses_equal_the_reference(architecture: str) -> None:
    case = json.loads((GOLDEN / architecture / "expected.json").read_text())["packing"]
    molmo, _, _ = load_checkpoint(GOLDEN / architecture)
    model = Trainable(molmo, PLAIN).train()
    with torch.no_grad():
        sums = model(collate([golden_sample(architecture)]))
    expected = load_file(GOLDEN / architecture / "expected.safetensors")
    assert float(sums.weight) == pytest.approx(float(expected["packing.loss_masks"].clip(0).sum()), rel=1e-6)
    assert float(sums.cross_entropy / sums.weight) == pytest.approx(case["cross_entropy_weighted_mean"], rel=1e-4)
    # The reference's golden z-loss is a mean over its weighted tokens as well.
    assert float(sums.z_loss / sums.weight) == pytest.approx(case["z_loss_1e_4"], rel=1e-4)


def test_recomputed_activations_give_the_same_gradients() -> None:
    found = []
    for recompute in (False, True):
        molmo, _, _ = load_checkpoint(GOLDEN / "molmoe")
        model = Trainable(molmo, ForwardConfig(answer_dropout=0.3, recompute=recompute)).train()
        sums = model(collate([golden_sample("molmoe")]))
        (sums.cross_entropy + sums.z_loss).backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-5, atol=1e-7, msg=name)


def test_a_pack_has_the_gradients_of_its_annotations_one_by_one() -> None:
    """Up to weights: a pack's answers weigh 1 / sqrt(3), and sequences are summed."""
    encode = encoder()
    rng = np.random.default_rng(0)

    def step(examples: list[Example], scale: float) -> tuple[dict[str, torch.Tensor], int]:
        molmo, _, _ = load_checkpoint(GOLDEN / "molmoe")
        model = Trainable(molmo, PLAIN).train()
        batches = [collate([encode(example, rng)]) for example in examples]
        for batch in batches:
            sums = model(batch)
            (scale * (sums.cross_entropy + sums.z_loss)).backward()
        return gradients(model), sum(sum(b.lengths) for b in batches)

    untagged = [dataclasses.replace(a, style="demo") for a in QUESTIONS]  # no chance in their prompts
    image = picture()
    together, tokens = step([Example(image, tuple(untagged))], 3**0.5)
    apart, more = step([Example(image, (a,)) for a in untagged], 1.0)
    assert tokens < more / 2, "two images of three are spared"
    for name, grad in together.items():
        torch.testing.assert_close(grad, apart[name], rtol=1e-3, atol=1e-5, msg=name)


def test_padding_and_company_change_nothing() -> None:
    """A batch of two, padded, is the sum of two batches of one, dropout included."""
    encode = encoder()
    samples = [encode(Example(picture(48 + 30 * i, i), QUESTIONS[: i + 1]), np.random.default_rng(i)) for i in range(2)]
    molmo, _, _ = load_checkpoint(GOLDEN / "molmoe")
    model = Trainable(molmo, ForwardConfig(residual_dropout=0.1, answer_dropout=0.4)).train()
    both = model(collate(samples, length=1024))
    alone = [model(collate([sample])) for sample in samples]
    for name in ("cross_entropy", "z_loss", "weight", "correct"):
        torch.testing.assert_close(getattr(both, name), sum(getattr(s, name) for s in alone), rtol=1e-5, atol=1e-5)
    assert torch.equal(both.expert_load, sum(s.expert_load for s in alone)), "padding counts for no expert"


def test_texts_train_without_an_image_and_every_part_gets_a_gradient() -> None:
    """So that ranks stay together when one of them has no image in its batch."""
    encode = encoder()
    sample = encode(Example(None, (Annotation("demo", ("Why?", "Because.")),)), np.random.default_rng(0))
    assert sample.packed.positions.tolist() == list(range(len(sample)))
    molmo, _, _ = load_checkpoint(GOLDEN / "molmoe")
    model = Trainable(molmo, PLAIN).train()
    model(collate([sample])).cross_entropy.backward()
    assert torch.count_nonzero(molmo.connector.projector.w1.weight.grad) == 0
    assert molmo.vision.patch_embedding.weight.grad is not None
    assert torch.count_nonzero(molmo.decoder.head.weight.grad)


@pytest.mark.parametrize("pad", [0, 37])
def test_masks_say_the_same(pad: int) -> None:
    segments = golden_sample("molmoe").packed.segments
    n = len(segments)
    padded = torch.from_numpy(np.pad(segments, (0, pad), constant_values=-1)).long()[None]
    dense = packed_mask(padded, "sdpa")
    assert isinstance(dense, torch.Tensor)
    assert torch.equal(dense[0, 0, :n, :n], torch.from_numpy(attention_mask(segments)))
    assert dense.any(-1).all(), "no row is empty"


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flex_attention_equals_sdpa(kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    segments = torch.tensor([[10000] * 40 + [1] * 30 + [2] * 50 + [-1] * 8, [10000] * 100 + [1] * 28])
    q, k, v = (torch.randn(2, heads, 128, 16, generator=generator) for heads in (4, kv_heads, kv_heads))
    attend = packed_mask(segments, "flex")
    assert callable(attend)
    wide = [t.repeat_interleave(4 // kv_heads, dim=1) for t in (k, v)]
    dense = packed_mask(segments, "sdpa")
    expected = torch.nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=dense)
    torch.testing.assert_close(attend(q, k, v), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("blocks", [False, True])
def test_attention_without_padding_equals_sdpa(kv_heads: int, blocks: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    segments = torch.tensor(
        [[10000] * 40 + [1] * 30 + [2] * 50 + [-1] * 8, [10000] * 128, [10000] + [1] * 100 + [-1] * 27]
    )
    block = None
    if blocks:
        block = segments == 10000
        block[:, 0] = False
    q, k, v = (torch.randn(3, heads, 128, 16, generator=generator) for heads in (4, kv_heads, kv_heads))
    wide = [t.repeat_interleave(4 // kv_heads, dim=1) for t in (k, v)]
    mask = packed_mask(segments, "sdpa", block)
    expected = torch.nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=mask)
    unpadded = Unpadded.of(segments, [120, 128, 101], block)
    one_row = [t.transpose(1, 2).flatten(0, 1)[unpadded.tokens].transpose(0, 1)[None] for t in (q, k, v)]
    found = unpadded(*one_row)[0].transpose(0, 1)
    torch.testing.assert_close(found, expected.transpose(1, 2).flatten(0, 1)[unpadded.tokens], rtol=1e-5, atol=1e-5)


def test_a_batch_without_padding_has_the_same_losses_and_gradients() -> None:
    encode = encoder()
    samples = [encode(Example(picture(48 + 30 * i, i), QUESTIONS[: i + 1]), np.random.default_rng(i)) for i in range(2)]
    samples.append(encode(Example(None, (QUESTIONS[2],)), np.random.default_rng(0)))
    results = []
    for kind in ("sdpa", "unpadded"):
        molmo, _, _ = load_checkpoint(GOLDEN / "molmoe")
        config = dataclasses.replace(PLAIN, attention=kind, balance_loss=0.1, router_z_loss=0.1)
        model = Trainable(molmo, config).train()
        sums = model(collate(samples))
        (sums.cross_entropy + sums.z_loss + sums.router_loss).backward()
        results.append((sums, gradients(model)))
    (dense, wanted), (unpadded, found) = results
    for name, one, other in zip(dense._fields, dense, unpadded, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=name)
    largest = max(grad.abs().max() for grad in wanted.values())
    for name, grad in wanted.items():  # that of a key's bias is zero up to rounding
        assert (grad - found[name]).abs().max() <= 1e-5 * grad.abs().max() + 1e-7 * largest, name


@pytest.mark.parametrize("config", [ForwardConfig(), ForwardConfig(answer_dropout=0.0, residual_dropout=0.1)])
def test_dropout_needs_padding(config: ForwardConfig) -> None:
    molmo, _, _ = load_checkpoint(GOLDEN / "molmoe")
    with pytest.raises(MolmoEdgeError, match="not possible with dropout"):
        Trainable(molmo, dataclasses.replace(config, attention="unpadded"))


def test_dropout_drops_what_it_says() -> None:
    n, d = 400, 64
    weights = torch.zeros(2, n)
    weights[:, 200:300] = 0.5
    batch = Batch(
        *([torch.zeros(0)] * 2), weights, *([torch.zeros(0)] * 7), lengths=[n, 300], seeds=[1, 2], crop_counts=[0, 0]
    )
    drop = residual_dropout(batch, 0.1, 0.4)
    assert drop is not None
    out = drop(torch.ones(2, n, d), 3)
    assert out[1, 300:].abs().max() == 0, "padding"
    assert (out[0, :200] == 0).float().mean() == pytest.approx(0.1, abs=0.01)
    assert (out[0, 200:300] == 0).float().mean() == pytest.approx(0.4, abs=0.02)
    assert out[0, 200:300].unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert out[0].mean() == pytest.approx(1.0, abs=0.02), "the expectation is kept"
    assert torch.equal(out, drop(torch.ones(2, n, d), 3)), "activations that are computed again meet the same"
    assert not torch.equal(out, drop(torch.ones(2, n, d), 4)), "another branch, another mask"
    assert not torch.equal(out[0, :300], out[1, :300]), "another sequence, another mask"
    everywhere = residual_dropout(batch, 0.2, 0.0)
    assert everywhere is not None
    assert (everywhere(torch.ones(2, n, d), 0)[0] == 0).float().mean() == pytest.approx(0.2, abs=0.01)
    assert residual_dropout(batch, 0.0, 0.0) is None


needs_grouped_mm = pytest.mark.skipif(grouped_mm is None, reason="torch.nn.functional.grouped_mm came in PyTorch 2.10")


@needs_grouped_mm
@pytest.mark.parametrize("tokens", [1, 37])
def test_grouped_experts_have_the_loops_gradients(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (8, 16, 32), "up": (8, 16, 32), "down": (8, 32, 16)}
    matrices = tuple((torch.randn(s, generator=generator) * 0.2).bfloat16().requires_grad_() for s in shapes.values())
    x = torch.randn(tokens, 32, generator=generator, requires_grad=True)
    weights, experts = choose_experts(torch.randn(tokens, 8, generator=generator), 2)
    results = []
    for kernel in ("loop", "grouped"):
        out = mix_experts(x, weights, experts, matrices, kernel)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *matrices])])
    for name, one, other in zip(("out", "x", *shapes), *results, strict=True):
        assert (one - other).abs().max() <= 0.02 * one.abs().max(), name


@needs_grouped_mm
def test_autocast_reaches_grouped_experts() -> None:
    """Weights stay float32, products are bfloat16: what a GPU trains with."""
    molmo, _, _ = load_checkpoint(GOLDEN / "molmoe")
    batch = collate([golden_sample("molmoe")])
    with torch.no_grad():
        exact = Trainable(molmo, PLAIN)(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = Trainable(molmo, dataclasses.replace(PLAIN, experts="grouped")).train()(batch)
    rounded.cross_entropy.backward()
    assert float(rounded.cross_entropy.detach()) == pytest.approx(float(exact.cross_entropy), rel=0.02)
    assert float(rounded.cross_entropy.detach()) != float(exact.cross_entropy)
    assert molmo.decoder.blocks[0].ffn.gate.grad.dtype == torch.float32


def test_grouped_experts_need_a_pytorch_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molmo_edge.modeling.decoder.grouped_mm", None)
    molmo, _, _ = load_checkpoint(GOLDEN / "molmoe")
    with pytest.raises(MolmoEdgeError, match=r"need PyTorch 2\.10"):
        Trainable(molmo, dataclasses.replace(PLAIN, experts="grouped"))


def test_router_losses() -> None:
    even = torch.zeros(64, 8)
    balance, z = router_losses(even, torch.arange(128).view(64, 2) % 8, torch.arange(64) < 60)
    assert float(balance) == pytest.approx(1.0)
    assert float(z) == pytest.approx(np.log(8) ** 2, rel=1e-5)
    greedy = torch.zeros(64, 8)
    greedy[:, 0] = 50.0
    everyone = torch.ones(64, dtype=torch.bool)
    balance, _ = router_losses(greedy, torch.zeros(64, 1, dtype=torch.long), everyone)
    assert float(balance) == pytest.approx(8.0), "everything to one expert"
    molmo, _, _ = load_checkpoint(GOLDEN / "molmoe")
    model = Trainable(molmo, dataclasses.replace(PLAIN, balance_loss=0.01, router_z_loss=0.001)).train()
    model(collate([golden_sample("molmoe")])).router_loss.backward()
    ffn = molmo.decoder.blocks[0].ffn
    assert isinstance(ffn, SparseFFN)
    assert torch.count_nonzero(ffn.router.weight.grad)


# --- encoding ---------------------------------------------------------------------------------------------------------


def test_a_sequence_is_cut_and_says_so_when_nothing_is_left() -> None:
    whole = encoder()(Example(picture(), QUESTIONS), np.random.default_rng(0))
    cut = encoder(sequence=len(whole) - 20)(Example(picture(), QUESTIONS), np.random.default_rng(0))
    assert len(cut) == len(whole) - 20
    assert np.array_equal(cut.packed.input_ids, whole.packed.input_ids[:-20])
    with pytest.raises(EncodingError, match="no room for an answer"):
        encoder(sequence=64)(Example(picture(), QUESTIONS), np.random.default_rng(0))


def test_weights_separators_and_styles() -> None:
    heavy = tuple(dataclasses.replace(a, weight=w) for a, w in zip(QUESTIONS, (2.0, 1.0, 0.5), strict=True))
    encode = encoder(separator=True)
    special = encode.tokenizer.special
    packed = encode(Example(picture(), heavy), np.random.default_rng(0)).packed
    shares = [np.unique(packed.loss_weights[(packed.segments == k) & (packed.loss_weights > 0)]) for k in (1, 2, 3)]
    np.testing.assert_allclose(np.concatenate(shares), np.array([2.0, 1.0, 0.5]) / 3**0.5, rtol=1e-6)
    ends = np.flatnonzero((packed.input_ids == special.im_end) & (packed.segments < 10000))
    assert packed.segments[ends].tolist() == [1, 2], "between annotations, not behind the last"
    assert not packed.loss_weights[ends - 1].any(), "a separator is not to be predicted"
    text = encode.tokenizer.decode(packed.input_ids[packed.segments == 2].tolist())
    assert text.startswith(" User: vqa2: What color? Assistant: Red.")

    caption = Example(picture(), (Annotation("long_caption", ("Describe.", "A cup " * 20)),))
    packed = encoder(style="caption", weighting="none")(caption, np.random.default_rng(0)).packed
    text = encode.tokenizer.decode(packed.input_ids[packed.segments == 1].tolist())
    assert "User" not in text
    assert text.startswith(" long_caption ")
    length = int(text.split()[1].rstrip(":"))
    assert abs(length - 120 // 15) <= 5, "the wanted length, with noise"


def test_larger_windows_can_be_trained() -> None:
    """The variant of public summaries: windows of about 512 pixels, a third of them shared."""
    config = ImageConfig(crop_size=504, overlap_margins=(6, 6))
    assert config.patches == 36
    assert sum(config.overlap_margins) / config.patches == pytest.approx(1 / 3)
    _, tokenizer, _ = load_checkpoint(GOLDEN / "molmoe")
    sample = Encoder(tokenizer, config, Encoding())(Example(picture(600), QUESTIONS), np.random.default_rng(0))
    assert sample.crops.shape[1:] == (36 * 36, 588)
    assert (sample.token_index >= 0).sum() == (sample.packed.input_ids == tokenizer.special.im_patch).sum()


# --- what a step costs ------------------------------------------------------------------------------------------------


def test_counted_flops_are_those_that_torch_counts() -> None:
    """All products but attention's scores, of which a dense mask computes twice as many as are counted."""
    from torch.utils.flop_counter import FlopCounterMode

    from molmo_edge.training.flops import cost, passes

    molmo, _, config = load_checkpoint(GOLDEN / "qwen")
    batch = collate([golden_sample("qwen")], length=len(golden_sample("qwen")))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Trainable(molmo, PLAIN)(batch)
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in counted.items() if "attention" not in op)
    ours = cost(config)
    v, patches = config.vision, config.image.patches**2
    scores = 4 * (v.last_layer + 1) * (patches + 1) ** 2 * v.d_model
    own = dataclasses.replace(ours, pair=0, crop=ours.crop - scores).forward(batch)
    assert own == pytest.approx(products, rel=0.01)
    pairs = dataclasses.replace(ours, token=0, answer=0, crop=0, cells=0).forward(batch)
    seen = int(attention_mask(golden_sample("qwen").packed.segments).sum())
    assert pairs == 4 * config.decoder.n_layers * config.decoder.d_model * seen
    assert passes(molmo) == pytest.approx(3.0)
    molmo.requires_grad_(False)
    assert passes(molmo) == pytest.approx(2.0)
