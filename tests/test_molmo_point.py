"""MolmoPoint in PyTorch against golden values: the grounding head, its cache, and greedy answers that point."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from molmo2_golden import GOLDEN2, inputs_of, read
from safetensors.numpy import load_file

pytest.importorskip("torch")

import torch

from molmo_edge.frontend.crops import stitched_patches
from molmo_edge.frontend.grounding_tokens import decode_grounding
from molmo_edge.modeling import KVCache, Molmo, load_checkpoint
from molmo_edge.modeling.decoder import image_attention_mask
from molmo_edge.runtimes.grounding import Grounding, make_grounding

NAME = "molmo_point"
EXPECTED = read(f"{NAME}/expected.json")
TENSORS = load_file(GOLDEN2 / NAME / "expected.safetensors")
TOLERANCE = 5e-5


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@functools.cache
def _model() -> Any:
    return load_checkpoint(GOLDEN2 / NAME)


@dataclass
class Head:
    """The projections of the PyTorch model as numpy functions."""

    model: Molmo

    def project(self, states: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(part.numpy() for part in self.model.point_head.project(torch.from_numpy(states)))

    def project_features(self, features: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(part.numpy() for part in self.model.point_head.project_features(torch.from_numpy(features)))

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        return self.model.decoder.embed(torch.from_numpy(token_ids).long()).numpy()


@dataclass
class Run:
    """A prompt, prefilled, and what follows."""

    grounding: Grounding
    pooling: np.ndarray
    grids: list[np.ndarray]
    cache: KVCache
    state: np.ndarray  # of the last position, before the final norm


def _prefill(name: str) -> Run:
    model, tokenizer, config = _model()
    inputs, grids = inputs_of(NAME, name), []
    assert inputs.crops is not None
    assert inputs.pooling is not None
    if inputs.video:
        side = config.image.patches
        grids = [np.arange(side * side).reshape(side, side) + side * side * n for n in range(len(inputs.crops))]
    offset = 0
    for image in inputs.images:
        grids.append(stitched_patches(config.image, image.tiling) + offset)
        offset += image.crops.shape[0] * image.crops.shape[1]
    patches = model.vit_features(torch.from_numpy(inputs.crops))
    index = inputs.pooling
    cells = model.connector(patches, torch.empty(0), torch.from_numpy(index).long())
    rows = model.decoder.embed(torch.from_numpy(inputs.ids).long()[None])
    rows[0, torch.from_numpy(inputs.positions).long()] += cells
    cache = KVCache.empty(config.decoder, 1, len(inputs.ids) + 60, rows)
    mask = image_attention_mask(torch.from_numpy(inputs.block)[None])
    states = model.decoder.states(rows, mask=mask, cache=cache)[0].numpy()
    assert _relative(cells[::23].numpy(), TENSORS[f"{name}.image_features"]) < TOLERANCE
    grounding = make_grounding(
        Head(model),
        config.point_head,
        model.point_head.no_more.numpy(),
        config.decoder.n_logits,
        inputs.ids,
        inputs.positions,
        tokenizer.special.im_patch,
        states,
        patches.flatten(0, 1).numpy(),
        index,
        cells.numpy(),
    )
    return Run(grounding, index, grids, cache, states[-1])


def _relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def _text_logits(run: Run) -> np.ndarray:
    model = _model()[0]
    return model.decoder.logits(model.decoder.ln_f(torch.from_numpy(run.state))).numpy()


def _step(run: Run, token: int) -> None:
    model = _model()[0]
    row = torch.from_numpy(run.grounding.embed(token))
    run.state = model.decoder.states(row[None], cache=run.cache)[0, -1].numpy()


CASES = list(EXPECTED["cases"])


@pytest.mark.parametrize("name", CASES)
def test_greedy_answers_are_those_of_the_reference(name: str) -> None:
    case, run = EXPECTED["cases"][name], _prefill(name)
    ids: list[int] = []
    logits = []
    for _ in case["generated_ids"]:
        text = _text_logits(run)
        logits.append(text)
        ids.append(int(run.grounding.logits(text, run.state).argmax()))
        _step(run, ids[-1])
    assert ids == case["generated_ids"]
    assert _relative(np.stack(logits)[:, ::17], TENSORS[f"{name}.greedy.text_logits"]) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in CASES if "forced" in EXPECTED["cases"][name]])
def test_logits_after_given_tokens_are_those_of_the_reference(name: str) -> None:
    forced, run = EXPECTED["cases"][name]["forced"], _prefill(name)
    ids, slots, locations = run.grounding.ids, [], []
    for number, token in enumerate(forced["ids"]):
        logits = run.grounding.logits(_text_logits(run), run.state)
        allowed = [(start, stop) for start, stop in forced["allowed_id_intervals_per_step"][number]]
        inside = np.zeros(len(logits), bool)
        for start, stop in allowed:
            inside[start:stop] = True
        assert (np.isfinite(logits) == inside).all(), number
        last = run.grounding.history[-1] if run.grounding.history else 0
        if ids.first <= last < ids.slots and last != ids.no_more:
            slots.append(run.grounding.slot_logits(run.state))
        elif ids.slots <= last < ids.locations:
            locations.append(logits[ids.locations :])
        _step(run, token)
    logits = run.grounding.logits(_text_logits(run), run.state)
    assert int(logits.argmax()) == forced["next_id_after"]
    open_slots = TENSORS[f"{name}.forced.subpatch_logits"] > -1e4
    np.testing.assert_array_equal(np.stack(slots) > -1e4, open_slots)
    got, expected = np.stack(slots)[open_slots], TENSORS[f"{name}.forced.subpatch_logits"][open_slots]
    assert _relative(got, expected) < TOLERANCE
    assert _relative(np.stack(locations), TENSORS[f"{name}.forced.location_logits"]) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_the_cache_of_the_head_is_that_of_the_reference(name: str) -> None:
    grounding = _prefill(name).grounding
    positions, keys = TENSORS[f"{name}.image_pos_ids"], TENSORS[f"{name}.patch_k"]
    np.testing.assert_array_equal(grounding.positions[::17], positions)
    assert _relative(grounding.patch_keys[::17][: len(keys)], keys) < TOLERANCE
    assert _relative(grounding.slot_features[::197], TENSORS[f"{name}.vit_features"]) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_points_are_those_of_the_reference(name: str) -> None:
    case, run = EXPECTED["cases"][name], _prefill(name)
    tokenizer, ids = _model()[1], run.grounding.ids
    text = "".join(ids.token(i) if i >= ids.first else tokenizer.decode([i]) for i in case["generated_ids"])
    points = list(decode_grounding(text, run.pooling, run.grids))
    if "video" in case:
        width, height, fps = (case["video"][key] for key in ("width", "height", "fps"))
        got = [[p.id, p.frame / fps, p.x * width, p.y * height] for p in points]
    else:
        sizes = case["image_sizes"]
        got = [[p.id, p.frame, p.x * sizes[p.frame][0], p.y * sizes[p.frame][1]] for p in points]
    np.testing.assert_allclose(np.reshape(got, (-1, 4)), np.reshape(case["points"], (-1, 4)), rtol=0, atol=1e-6)
