"""Packing against the reference's own arrays, and a pack against its annotations one by one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from molmo_edge.frontend.crops import ImageProcessor, load_image
from molmo_edge.modeling import load_checkpoint
from molmo_edge.training.packing import IMAGE_SEGMENT, attention_mask, pack

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("architecture", ["molmoe", "qwen", "olmo"])
@torch.no_grad()
def test_packing_equals_the_reference(architecture: str) -> None:
    directory = GOLDEN / architecture
    model, tokenizer, config = load_checkpoint(directory)
    case = json.loads((directory / "expected.json").read_text())["packing"]
    expected = load_file(directory / "expected.safetensors")
    image = ImageProcessor(config.image, tokenizer.special)(load_image(GOLDEN / case["image"]))
    packed = pack(tokenizer, image.tokens, case["messages"], weighting=case["loss_token_weighting"])
    np.testing.assert_array_equal(packed.input_ids, expected["packing.input_tokens"])
    np.testing.assert_array_equal(packed.targets, expected["packing.target_tokens"])
    np.testing.assert_array_equal(packed.positions, expected["packing.position_ids"])
    np.testing.assert_array_equal(packed.segments, expected["packing.subsegment_ids"])
    np.testing.assert_allclose(packed.loss_weights, expected["packing.loss_masks"], rtol=1e-6)

    index = torch.from_numpy(np.where(image.token_index >= 0, image.token_index + 1, -1))[None]
    crops, masks = torch.from_numpy(image.crops)[None], torch.from_numpy(image.masks)[None]
    mask = torch.from_numpy(attention_mask(packed.segments))[None, None]
    ids, positions = (torch.from_numpy(a).long()[None] for a in (packed.input_ids, packed.positions))
    logits = model.decoder.logits(model(ids, crops, masks, index, positions, mask))[0]
    reference = torch.from_numpy(expected["packing.logits_tail"])
    assert (logits[-40:] - reference).abs().max() <= 1e-4 * reference.abs().max()
    answered = packed.loss_weights > 0
    weights = torch.from_numpy(packed.loss_weights[answered])
    targets = torch.from_numpy(packed.targets[answered]).long()
    losses = torch.nn.functional.cross_entropy(logits[torch.from_numpy(answered)], targets, reduction="none")
    mean = float((losses * weights).sum() / weights.sum())
    assert mean == pytest.approx(case["cross_entropy_weighted_mean"], rel=1e-4)


@torch.no_grad()
def test_a_pack_equals_its_annotations_one_by_one() -> None:
    model, tokenizer, _ = load_checkpoint(GOLDEN / "molmoe")
    image = np.full(9, tokenizer.special.im_patch, np.int32)
    annotations = [
        [" User: a Assistant:", " one"],
        [" User: b Assistant:", " two two", " User: c Assistant:", " three"],
    ]

    def losses(chosen: list[list[str]]) -> torch.Tensor:
        packed = pack(tokenizer, image, chosen, weighting="none")
        ids, positions = (torch.from_numpy(a).long()[None] for a in (packed.input_ids, packed.positions))
        mask = torch.from_numpy(attention_mask(packed.segments))[None, None]
        logits = model.decoder.logits(model(ids, positions=positions, mask=mask))[0]
        answered = torch.from_numpy(packed.loss_weights) > 0
        targets = torch.from_numpy(packed.targets).long()
        return torch.nn.functional.cross_entropy(logits[answered], targets[answered], reduction="none")

    together = losses(annotations)
    apart = torch.cat([losses([a]) for a in annotations])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_answer_starts_point_at_the_last_answer() -> None:
    _, tokenizer, _ = load_checkpoint(GOLDEN / "molmoe")
    packed = pack(tokenizer, np.zeros(3, np.int32), [[" q", " a b"], [" q", " x", " r", " y z"]])
    for start, answer in zip(packed.answer_starts, (" a b", " y z"), strict=True):
        tokens = tokenizer.encode(answer)
        assert packed.input_ids[start : start + len(tokens)].tolist() == tokens


def test_text_never_sees_another_annotation() -> None:
    segments = np.array([IMAGE_SEGMENT] * 2 + [1] * 2 + [2] * 2)
    mask = attention_mask(segments)
    assert mask[2:, :2].all(), "every annotation sees the image"
    assert not mask[4:, 2:4].any(), "the second does not see the first"
    assert not np.triu(mask, 1).any(), "nothing sees the future"
