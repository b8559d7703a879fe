"""Training of Molmo2 and MolmoPoint: sequences, masks, losses and gradients, against inference and one by one."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import numpy as np
import pytest
import torch
from molmo2_golden import GOLDEN2, MODELS, picture, tokenizer_of

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.config import MolmoConfig
from molmo_edge.data.examples import Annotation, Example
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.answer_points import in_coords
from molmo_edge.frontend.chatml import chat_ids
from molmo_edge.frontend.crops import cell_patches, image_in_grid, pointable_cells, pointing_grid, select_tiling
from molmo_edge.frontend.grounding_tokens import GroundingIds, decode_grounding, point_target
from molmo_edge.frontend.points import Point, format_count, format_points, parse_points
from molmo_edge.modeling import Molmo, load_checkpoint
from molmo_edge.runtimes.grounding import GroundingInputs
from molmo_edge.runtimes.torch import TorchRuntime
from molmo_edge.training.attention import packed_mask
from molmo_edge.training.encoding import Encoder, Encoding, Sample, collate
from molmo_edge.training.flops import cost
from molmo_edge.training.forward import ForwardConfig, Trainable
from molmo_edge.training.grounding import choice_loss, point_divergence
from molmo_edge.training.regions import PEAK, UNKNOWN

PLAIN = ForwardConfig(answer_dropout=0.0)
POINT = "molmo_point"
CUPS = [(70.0, 20.0), (12.5, 30.0), (55.5, 81.2)]
QUESTIONS = (
    Annotation("demo", ("Point to the cups.", format_points([Point(*xy) for xy in CUPS], "cups"))),
    Annotation("demo", ("What color?", "Red.", "And how many?", format_count([Point(40, 40), Point(41, 40)], "dogs"))),
    Annotation("demo", ("Why?", "Because.")),
)


@functools.cache
def _config(name: str) -> MolmoConfig:
    config = read_config(GOLDEN2 / name)
    return dataclasses.replace(config, image=dataclasses.replace(config.image, max_crops=1))


def _encoder(name: str, **changes: Any) -> Encoder:
    config = _config(name)
    return Encoder(tokenizer_of(name), config.image, Encoding(shuffle=False, **changes), config=config)


def _example(*annotations: Annotation, seed: int = 0) -> Example:
    image = np.random.default_rng(seed).integers(0, 256, (90, 120 + 40 * seed, 3), dtype=np.uint8)
    return Example(image, annotations)


def _sample(name: str, *annotations: Annotation, seed: int = 0) -> Sample:
    return _encoder(name)(_example(*annotations, seed=seed), np.random.default_rng(0))


def _molmo(name: str) -> Molmo:
    return load_checkpoint(GOLDEN2 / name)[0]


def _losses(name: str, samples: list[Sample], **changes: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of one batch, and the gradients of their sum."""
    model = Trainable(_molmo(name), dataclasses.replace(PLAIN, **changes)).train()
    sums = model(collate(samples))
    (sums.cross_entropy + sums.z_loss + sums.point_loss).backward()
    found = [float(v.detach()) for v in (sums.cross_entropy, sums.z_loss, sums.point_loss, sums.weight)]
    return found, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_an_answer_has_the_loss_that_inference_gives_it(name: str) -> None:
    """The sequence is what the SDK asks, and the loss is that of the logits of its runtime."""
    question, answer = "What is it?", "A red cup on it."
    sample = _sample(name, Annotation("vqa2", (question, answer)))
    tokenizer, config, molmo = tokenizer_of(name), _config(name), _molmo(name)
    prompt = chat_ids(tokenizer, [question], style="vqa2")
    ids = [*sample.packed.input_ids.tolist(), int(sample.packed.targets[-1])]
    answer_ids = [*tokenizer.encode(answer), tokenizer.special.eos]
    assert ids[-len(prompt) - len(answer_ids) :] == prompt + answer_ids
    assert sample.packed.loss_weights.nonzero()[0].tolist() == list(range(len(ids) - len(answer_ids) - 1, len(ids) - 1))

    runtime = TorchRuntime.from_model(molmo, threads=1)
    assert sample.pooling is not None
    rows = runtime.embed(sample.packed.input_ids)
    rows[sample.token_index] += runtime.connect(runtime.encode_crops(sample.crops), sample.masks, sample.pooling)
    image = np.isin(sample.packed.input_ids, tokenizer.special.image_block)
    cache = runtime.new_cache(len(rows))
    start = len(rows) - len(answer_ids) + 1
    logits = [runtime.prefill_image(rows[:start], image[:start], cache)]
    logits += [runtime.forward(row[None], cache) for row in rows[start:]]
    scores = torch.log_softmax(torch.from_numpy(np.stack(logits)), dim=-1)
    expected = -float(scores[range(len(answer_ids)), answer_ids].sum())
    (loss, *_), _ = _losses(name, [sample])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert config.decoder.bidirectional_images


@pytest.mark.parametrize("name", MODELS)
def test_a_pack_has_the_losses_and_gradients_of_its_annotations_one_by_one(name: str) -> None:
    encode = _encoder(name, weighting="none")
    rng = np.random.default_rng(0)
    packed = encode(_example(*QUESTIONS), rng)
    together, gradients = _losses(name, [packed])
    alone = [encode(_example(each), rng) for each in QUESTIONS]
    assert len(packed) < sum(map(len, alone)) / 2
    apart = [_losses(name, [each]) for each in alone]
    assert together == pytest.approx(np.sum([losses for losses, _ in apart], axis=0).tolist(), rel=1e-5)
    for parameter, gradient in gradients.items():
        expected = sum(one[parameter] for _, one in apart)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4, msg=parameter)


@pytest.mark.parametrize("name", MODELS)
def test_company_padding_and_recomputation_change_nothing(name: str) -> None:
    samples = [_sample(name, *QUESTIONS[i:], seed=i) for i in range(2)]
    both, gradients = _losses(name, samples)
    apart = [_losses(name, [one], recompute=False) for one in samples]
    assert both == pytest.approx(np.sum([losses for losses, _ in apart], axis=0).tolist(), rel=1e-5)
    for parameter, gradient in gradients.items():
        expected = sum(one[parameter] for _, one in apart)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4, msg=parameter)


def test_a_text_trains_without_an_image() -> None:
    for name in MODELS:
        sample = _encoder(name)(Example(None, (QUESTIONS[2],)), np.random.default_rng(0))
        losses, gradients = _losses(name, [sample])
        assert losses[0] > 0
        assert losses[2] == 0
        assert not gradients["molmo.connector.projector.w1.weight"].any()
    assert {n for n in gradients if "point_head" in n} == {
        f"molmo.point_head.{n}" for n, _ in _molmo(POINT).point_head.named_parameters()
    }, "all ranks take part in the head, whether or not their batch has points"


@torch.no_grad()
def test_the_mask_is_a_block_over_the_image_in_both_kernels() -> None:
    segments = torch.tensor([[10000] * 40 + [1] * 30 + [2] * 50 + [-1] * 8, [10000] * 100 + [1] * 28])
    block = segments == 10000
    block[:, 0] = False
    dense = cast(torch.Tensor, packed_mask(segments, "sdpa", block))[0, 0]
    assert dense[1, 39], "an image token sees later ones"
    assert not dense[0, 1], "BOS does not"
    assert not dense[1, 40], "nor does an image token see text"
    assert dense[45, 39]
    assert not dense[80, 45], "annotations do not see each other"
    q, k, v = (torch.randn(2, 4, 128, 16, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    attend = packed_mask(segments, "flex", block)
    assert callable(attend)
    mask = cast(torch.Tensor, packed_mask(segments, "sdpa", block))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(attend(q, k, v), expected, rtol=1e-5, atol=1e-5)


def test_points_are_written_in_the_grammar_of_the_model() -> None:
    text = format_count([Point(*xy) for xy in CUPS], "cups")
    written = in_coords(text)
    assert written == (
        'Counting the <points coords="1 1 125 300 2 555 812 3 700 200">cups</points> shows a total of 3.'
    )
    assert [(p.x, p.y) for p in parse_points(written)] == [(12.5, 30.0), (55.5, 81.2), (70.0, 20.0)]
    assert in_coords(written) == written
    other = in_coords('It is <point x="1.0" y="2.5" alt="a dog">this</point>, <b>not</b> that.')
    assert other == 'It is <points alt="a dog" coords="1 1 010 025">this</points>, <b>not</b> that.'
    two = in_coords('<point x="1.0" y="2.5" alt="a dog">it</point>, <point x="4.0" y="5.0" alt="a cat">it</point>')
    assert (
        two
        == '<points alt="a dog" coords="1 1 010 025">it</points>, <points alt="a cat" coords="1 1 040 050">it</points>'
    )
    assert in_coords("There are none.") == "There are none."
    sample = _sample("molmo2_qwen3", QUESTIONS[0])
    assert 'coords="1 1 125 300' in tokenizer_of("molmo2_qwen3").decode(sample.packed.input_ids)


# --- grounding tokens -------------------------------------------------------------------------------------------------


def test_points_become_grounding_tokens_in_their_order() -> None:
    config, tokenizer = _config(POINT), tokenizer_of(POINT)
    sample, one = _sample(POINT, QUESTIONS[0]), config.point_head
    assert sample.points is not None
    assert one is not None
    ids = sample.packed.input_ids.tolist()
    start = len(ids) - ids[::-1].index(one.patch_token) - 1
    assert ids[start - 12 : start + 1] == [
        token
        for number in "123"
        for token in (one.patch_token, one.subpatch_token, one.location_token, *tokenizer.encode(number))
    ] + [one.patch_token], "the last is no more points"
    targets = sample.points.patch_targets[:, 1].tolist()
    assert targets[:3] == sorted(targets[:3])
    assert targets[3] == len(sample.points.turns)
    assert sample.points.chosen[targets[:3]].all()
    assert (sample.points.patch_targets[1:, 3] == targets[:3]).all(), "patches before the last one are closed"
    assert (sample.points.patch_targets[:, 2] == [0, *sample.points.turns[targets[:3]]]).all()


@pytest.mark.parametrize("max_crops", [1, 8])
def test_a_point_decodes_to_where_it_is(max_crops: int) -> None:
    image = dataclasses.replace(_config(POINT).image, max_crops=max_crops)
    tiling = select_tiling(500, 900, image)
    pooling, grid = cell_patches(image, tiling), pointing_grid(image, tiling)
    ids = GroundingIds(1000, *pooling.shape)
    points = np.random.default_rng(0).random((200, 2))
    text = ""
    for number, (x, y) in enumerate([*points.tolist(), (0.0, 0.0), (1.0, 1.0)]):
        patch, slot, location = point_target(x, y, pooling, grid, image_in_grid(image, tiling, 500, 900))
        assert pointable_cells(image, tiling)[patch]
        text += "".join(map(ids.token, (ids.first + patch, ids.slots + slot, ids.locations + location))) + str(number)
    found = np.array([(p.x, p.y) for p in decode_grounding(text, pooling, [grid])])
    # Half a location, and what the reference's step of 0.33 leaves of a third.
    assert np.abs((found[:200] - points) * grid.shape[::-1]).max() < 1 / 6 + 0.01
    assert found[200:].round().tolist() == [[0, 0], [1, 1]]


def test_losses_of_grounding_tokens_are_those_of_the_runtimes_logits() -> None:
    """The choices of each step, made by the runtime along the answer, have the loss of training."""
    tokenizer, molmo = tokenizer_of(POINT), _molmo(POINT)
    config = molmo.config
    encode = Encoder(tokenizer, _config(POINT).image, Encoding(shuffle=False), config=config)
    sample = encode(_example(QUESTIONS[0]), np.random.default_rng(0))
    assert sample.points is not None
    assert sample.pooling is not None
    runtime = TorchRuntime.from_model(molmo, threads=1)
    patches = runtime.encode_crops(sample.crops)
    features = runtime.connect(patches, sample.masks, sample.pooling)
    ids = sample.packed.input_ids
    start = int(sample.packed.answer_starts[0])
    rows = runtime.embed(ids[:start])
    rows[sample.token_index] += features
    cache = runtime.new_cache(len(ids) + 1)
    text = runtime.prefill_image(rows, np.isin(ids[:start], tokenizer.special.image_block), cache)
    assert cache.states is not None
    point = config.point_head
    assert point is not None
    inputs = GroundingInputs(
        runtime, ids[:start], sample.token_index, tokenizer.special.im_patch,
        patches.reshape(-1, patches.shape[-1]), sample.pooling, features, (),
    )  # fmt: skip
    grounding = inputs.begin(cache.states)
    answer = _unmarked(sample, inputs.token_ids)
    total, text_total = 0.0, 0.0
    for at, token in enumerate(answer):
        state, name = cache.states[-1], int(sample.packed.targets[start - 1 + at])
        text_total -= float(torch.log_softmax(torch.from_numpy(np.asarray(text).reshape(-1)), 0)[name])
        query, _, slot_query, location = (part[0] for part in runtime.project(state[None]))
        logits: np.ndarray | None = None
        if token == inputs.token_ids.no_more or inputs.token_ids.first <= token < inputs.token_ids.slots:
            logits, chosen = grounding.patch_logits(query, state), token - inputs.token_ids.first
            earlier = [
                t - inputs.token_ids.first for t in answer[:at] if 0 <= t - inputs.token_ids.first < len(features)
            ]
            logits[: max(earlier, default=0)] = -1e8
        elif inputs.token_ids.slots <= token < inputs.token_ids.locations:
            logits = grounding.slot_logits(slot_query, answer[at - 1] - inputs.token_ids.first)
            chosen = token - inputs.token_ids.slots
        elif token >= inputs.token_ids.locations:
            logits, chosen = location, token - inputs.token_ids.locations
        if logits is not None:
            total -= float(torch.log_softmax(torch.from_numpy(logits), 0)[chosen])
        text = runtime.forward(grounding.embed(token), cache)
    with torch.no_grad():
        sums = Trainable(molmo, PLAIN).eval()(collate([sample]))
    assert float(sums.point_loss) == pytest.approx(total, rel=1e-5)
    assert float(sums.cross_entropy) == pytest.approx(text_total, rel=1e-5)


def test_votes_of_a_batch_are_those_of_its_sequences() -> None:
    """Each sequence votes for its own patches only, whatever stands before and after it."""
    model = Trainable(_with_head(votes=2, vote_dim=4), PLAIN).eval()
    samples = [_sample(POINT, *QUESTIONS[i:], seed=i) for i in range(2)]
    with torch.no_grad():
        together = model(collate(samples)).point_loss
        apart = [model(collate([sample])).point_loss for sample in samples]
    assert all(loss > 0 for loss in apart)
    torch.testing.assert_close(together, sum(apart), rtol=1e-5, atol=1e-5)


def test_the_patches_of_a_list_are_learned_at_its_first_choice() -> None:
    """The loss of the runtime's scores, written out patch by patch."""
    distance = 2.5
    molmo, tokenizer = _with_head(peak_distance=distance, votes=2, vote_dim=4), tokenizer_of(POINT)
    sample = _sample(POINT, QUESTIONS[0])
    assert sample.points is not None
    assert sample.pooling is not None
    with torch.no_grad():
        run = Trainable(molmo, PLAIN).eval().run(collate([sample]))
    assert run.points is not None
    assert run.points.begins is not None
    assert run.points.begins.tolist() == [0], "three points, then no more"
    targets, places = sample.points.patch_targets[:3, 1], sample.points.places

    runtime = TorchRuntime.from_model(molmo, threads=1)
    grid = np.arange(sample.masks.size)[None]  # what the image shows is not asked about here
    inputs = GroundingInputs(
        runtime, sample.packed.input_ids, sample.token_index, tokenizer.special.im_patch,
        run.features.flatten(0, 1).numpy(), sample.pooling, run.tokens.numpy(), (grid,),
    )  # fmt: skip
    state = run.states[sample.points.patch_targets[0, 0]].numpy()
    grounding = inputs.begin(run.states.numpy())
    grounding.history = [0]
    logits = grounding.patch_logits(runtime.project(state[None])[0][0], state)
    assert logits[-1] == 0
    expected = 0.0
    for patch, p in enumerate(torch.from_numpy(logits[:-1]).double().sigmoid().tolist()):
        if patch in targets:
            expected -= (1 - p) ** 2 * np.log(p)
        elif sample.points.chosen[patch] and not any(
            (np.abs(places[patch] - places[t]) <= [0, distance, distance]).all() for t in targets
        ):
            expected -= p**2 * np.log(1 - p)
    weights, none = torch.ones(len(run.states)), run.points.patches[:0]
    others = run.points._replace(
        begins=None, lists=None, patches=none, patch_targets=none[:, 0].long(), patch_at=none[:, 0].long()
    )
    assert float(choice_loss(run.points, weights) - choice_loss(others, weights)) == pytest.approx(expected, rel=1e-4)


def test_lists_are_distilled_patch_by_patch_at_their_first_choice() -> None:
    batch = collate([_sample(POINT, QUESTIONS[0])])
    found = []
    for seed in range(2):
        molmo = _with_head(votes=2, vote_dim=4)
        assert molmo.point_head is not None
        with torch.no_grad():
            molmo.point_head.vote_q.bias += torch.randn(9, generator=torch.Generator().manual_seed(seed))
            run = Trainable(molmo, PLAIN).eval().run(batch)
        assert run.points is not None
        found.append(run.points)
    weights = torch.ones(batch.ids.numel())
    ours, theirs = found
    teacher = [rows for rows, _, _ in theirs.kinds]
    itself = [rows for rows, _, _ in ours.kinds]
    assert float(point_divergence(ours, itself, weights)) == pytest.approx(0, abs=1e-4)
    logits = [points.patches[0, :-1].double() for points in (theirs, ours)]
    chosen = logits[0] > -1e7
    (p, p_log, none_log), (_, q_log, q_none_log) = (
        (z.sigmoid(), torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z)) for z in logits
    )
    kl = p * (p_log - q_log) + (1 - p) * (none_log - q_none_log)
    alone = float(point_divergence(ours, [teacher[0], *itself[1:]], weights))
    assert alone == pytest.approx(float(kl[chosen].sum()), rel=1e-3)
    assert alone > 0.01


def test_every_parameter_of_a_head_with_votes_has_a_gradient_without_points() -> None:
    model = Trainable(_with_head(votes=2, vote_dim=4), PLAIN)
    answer = Annotation("pixmo_ask_model_anything", ("What is it?", "A cup."))
    model(collate([_sample(POINT, answer)])).point_loss.backward()
    assert model.molmo.point_head is not None
    head = dict(model.molmo.point_head.named_parameters())
    assert {"vote_q.weight", "vote_k.weight", "patch_q.weight", "no_more"} <= head.keys()
    trained = {name for name, parameter in head.items() if parameter.grad is not None}
    assert head.keys() - trained <= {"patch_embedding.weight", "patch_embedding.bias"}


def test_a_truncated_list_says_nothing_about_later_patches() -> None:
    molmo = _with_head(peak_distance=2.5, votes=2, vote_dim=4)
    whole = _sample(POINT, QUESTIONS[0])
    assert whole.points is not None
    cut = dataclasses.replace(
        whole, points=dataclasses.replace(whole.points, patch_targets=whole.points.patch_targets[:2])
    )
    lists = []
    for sample in (whole, cut):
        with torch.no_grad():
            points = Trainable(molmo, PLAIN).eval().run(collate([sample])).points
        assert points is not None
        assert points.lists is not None
        lists.append(points.lists[0].numpy())
    second, third = whole.points.patch_targets[1:3, 1]
    assert lists[0][third] == PEAK
    assert (lists[1][second + 1 :] == UNKNOWN).all()
    far = np.abs(whole.points.places[:second] - whole.points.places[third]).max(1) > 2.5
    assert (lists[0][:second][far] == lists[1][:second][far]).all()
    assert 0 in lists[1]


def _with_head(**changes: Any) -> Molmo:
    """The golden MolmoPoint with another grounding head; what that has in addition is random."""
    before, config = _molmo(POINT), _config(POINT)
    assert config.point_head is not None
    changed = dataclasses.replace(config, point_head=dataclasses.replace(config.point_head, **changes))
    molmo = Molmo(changed).init_weights(std=0.1, generator=torch.Generator().manual_seed(0))
    molmo.load_state_dict(before.state_dict(), strict=False)
    return molmo


def _unmarked(sample: Sample, ids: GroundingIds) -> list[int]:
    """The answer with grounding ids in place of their markers."""
    points = sample.points
    assert points is not None
    answer = sample.packed.targets.astype(np.int64)
    answer[points.patch_targets[:, 0]] = ids.first + points.patch_targets[:, 1]
    answer[points.slot_targets[:, 0]] = ids.slots + points.slot_targets[:, 2]
    answer[points.location_targets[:, 0]] = ids.locations + points.location_targets[:, 1]
    return answer[sample.packed.answer_starts[0] - 1 :].tolist()


def test_gradients_reach_every_part_of_the_pointing() -> None:
    _, gradients = _losses(POINT, [_sample(POINT, *QUESTIONS)])
    parts = ("x_norm", "patch_q", "patch_k", "subpatch_q", "subpatch_k", "location", "patch_embedding")
    for name in [*(f"point_head.{part}.weight" for part in parts), "point_head.no_more"]:
        assert gradients[f"molmo.{name}"].any(), name
    for name in ("connector.projector.w1.weight", "vision.blocks.0.attention.wq.weight", "decoder.new_head.weight"):
        assert gradients[f"molmo.{name}"].any(), name


def test_what_cannot_be_trained_is_refused() -> None:
    from molmo_edge.training.attention_loss import AttentionLoss

    with pytest.raises(MolmoEdgeError, match="digits of Molmo v1"):
        Trainable(_molmo(POINT), ForwardConfig(attention_loss=AttentionLoss(1.0, 0, 1)))
    config = _config(POINT)
    image = dataclasses.replace(config.image, max_crops=0)
    encode = Encoder(tokenizer_of(POINT), image, Encoding(), config=config)
    with pytest.raises(MolmoEdgeError, match="raise max_crops"):
        encode(_example(QUESTIONS[0]), np.random.default_rng(0))
    assert picture("synth_300x200").shape == (200, 300, 3)
    batch = collate([_sample("molmo2_qwen3", *QUESTIONS)])
    assert cost(config).forward(batch) > 0
