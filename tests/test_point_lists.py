"""Lists of points: how a grounding head decides where they are, one after the other or all at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from test_grounded_molmo import D, Discs, untrained

from molmo_edge import Molmo as Sdk
from molmo_edge.frontend.crops import group_patches
from molmo_edge.frontend.grounding_tokens import patch_places, slot_places
from molmo_edge.runtimes.grounding import Grounding
from molmo_edge.runtimes.peaks import Plan, local_maxima


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("start"))


def _without_votes(grounding: Grounding) -> Grounding:
    return dataclasses.replace(grounding, config=dataclasses.replace(grounding.config, votes=0), votes=None)


def test_no_more_points_has_to_be_likelier_than_all_patches_together(start: Path) -> None:
    """An object extends over several patches, none of which may be likelier than that there is no object."""
    with Sdk(start, max_crops=0) as model:
        inputs = model.encode(Discs(1).picture(0)).grounding
        assert inputs is not None
        grounding = _without_votes(inputs.begin(np.zeros((len(inputs.ids), D), np.float32)))
        state, ids, count = np.ones(D, np.float32), grounding.ids, len(grounding.patch_keys)
        text, query = np.zeros(ids.first, np.float32), grounding.head.project(state[None])[0][0]
        unit = query / (query @ query) * np.sqrt(np.float32(count))  # the logit of this key is 1
        for share, chosen in ((0.3, ids.first + 7), (0.7, ids.no_more)):  # of the probability that "no more" has
            logits = np.full(count, -30.0)
            logits[5:8], logits[-1] = np.log((1 - share) * np.array([0.33, 0.33, 0.34])), np.log(share)
            one = dataclasses.replace(grounding, patch_keys=(logits[:, None] * unit).astype(np.float32), history=[1])
            best, graded, shared = (
                one.logits(text, state, patches)[ids.first : ids.slots] for patches in ("best", "graded", "shared")
            )
            assert ids.first + int(best.argmax()) == ids.first + int(graded.argmax()) == chosen
            np.testing.assert_allclose(np.exp(shared), np.exp(logits), atol=1e-4)


def test_a_head_with_votes_chooses_all_points_of_a_list_at_once(start: Path) -> None:
    """Two subpatches of a patch are two objects; scores of later steps do not matter."""
    with Sdk(start, max_crops=0) as model:
        inputs = model.encode(Discs(1).picture(0)).grounding
        assert inputs is not None
        grounding = inputs.begin(np.zeros((len(inputs.ids), D), np.float32))
        ids, votes, state = grounding.ids, grounding.votes, np.ones(D, np.float32)
        assert votes is not None
        near = dataclasses.replace(grounding.config, peak_distance=0.5)
        query = grounding.head.vote_queries(state[None])[0]
        scores = np.full(votes.keys.shape[:2], -9.0)
        scores[1, 0], scores[1, 3], scores[9, 2] = 2.0, 3.0, 6.0
        first = query[: votes.keys.shape[-1]]
        keys = np.zeros_like(votes.keys)
        keys[:, :, 0] = scores[..., None] * first / (first @ first)
        keys[:, :, 1] = -50 * query[len(first) : -1] / (query[len(first) : -1] @ query[len(first) : -1])
        patch_keys = np.zeros_like(grounding.patch_keys)
        own = grounding.head.project(state[None])[0][0]
        patch_keys[-1] = (50 + query[-1]) * own / (own @ own) * np.sqrt(np.float32(len(patch_keys)))  # no more points

        def of_keys(keys: np.ndarray) -> Grounding:
            of_these = dataclasses.replace(votes, keys=keys)
            return dataclasses.replace(
                grounding, config=near, votes=of_these, patch_keys=patch_keys, history=[1], plans={}
            )

        one, text, chosen = of_keys(keys), np.zeros(ids.first, np.float32), list[int]()
        np.testing.assert_allclose(one.patch_logits(own, state)[[0, 1, 9, -1]], [-9, 3, 6, 0], atol=1e-3)
        while ids.no_more not in chosen:
            best, graded = (one.logits(text, state, each)[ids.first : ids.slots] for each in ("best", "graded"))
            assert (best > -1e4).sum() == 1
            assert int(graded.argmax()) == int(best.argmax())
            assert graded.max() == best.max()
            assert (graded[np.isfinite(graded)] > -1e3).all(), (
                "the distance of a choice that rounding may change is finite"
            )
            chosen.append(ids.first + int(best.argmax()))
            one.embed(chosen[-1])
            if chosen[-1] != ids.no_more:
                slots = one.logits(text, state)[ids.slots : ids.locations]
                if chosen[-1] == ids.first + 1:
                    slot, behind = (0, -1) if chosen.count(chosen[-1]) == 1 else (3, -12)
                    assert int(slots.argmax()) == slot
                    assert sorted(slots)[-2] == pytest.approx(behind, abs=1e-3)
                one.embed(ids.slots + int(slots.argmax()))
                one.embed(ids.locations)
            one.votes = dataclasses.replace(votes, keys=-keys)
        assert chosen == [ids.first + 1, ids.first + 1, ids.first + 9, ids.no_more]
        shared = np.exp(of_keys(keys).logits(text, state, "shared")[ids.first : ids.slots].astype(np.float64))
        left, expected = 1.0, []
        for score in of_keys(keys).patch_logits(own, state)[:-1]:  # accepted or refused in turn; none is near another
            accepts = 1 / (1 + np.exp(-float(score)))
            expected.append(left * accepts)
            left *= 1 - accepts
        np.testing.assert_allclose(shared, [*expected, left], atol=1e-5)

        # Another run goes on from the text before the first point: its plan is that of this place.
        again, quiet = of_keys(keys), keys.copy()
        quiet[:, :, 0] = keys[0, :1, 0]
        again.logits(text, state)
        again.embed(2)
        again.votes = dataclasses.replace(votes, keys=quiet)
        assert again.logits(text, state)[ids.no_more] == 0, "no score is above 0"
        del again.history[1:]
        again.embed(ids.first + 1)
        again.embed(ids.slots)
        again.embed(ids.locations)
        assert int(again.logits(text, state)[ids.first : ids.slots].argmax()) == 1, "its second point"


@pytest.mark.parametrize("drop", [0.0, 1.5])
def test_a_peak_is_above_its_neighbors_in_the_same_image(drop: float) -> None:
    rng = np.random.default_rng(0)
    grids = [np.arange(24).reshape(4, 6), 24 + np.arange(16).reshape(4, 4)]
    pooling = np.concatenate([group_patches(grid, 2).reshape(-1, 4) for grid in grids] + [np.full((1, 4), 40)])
    pooling[0, 3] = -1
    places = slot_places(pooling, grids)
    assert places[1].tolist() == [[0, 0, 2], [0, 0, 3], [0, 1, 2], [0, 1, 3]]
    assert places[6].tolist() == [[1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]]
    assert np.isnan(places[0, 3]).all(), "a missing patch"
    assert np.isnan(places[10]).all(), "in no grid"
    means = patch_places(pooling, grids)
    assert means[[1, 6]].tolist() == [[0, 0.5, 2.5], [1, 0.5, 0.5]]
    assert np.isnan(means[10]).all()
    moves = 0
    for _ in range(20):
        scores = np.where(np.isnan(places[..., 0]), -1e8, rng.integers(-3, 4, pooling.shape)).astype(np.float32)
        every = list(np.ndindex(*scores.shape))  # ascending
        expected = []
        for i in every:
            close = [j for j in every if (np.abs(places[i] - places[j]) <= [0, 2, 2]).all()]
            if scores[i] > 0 and max(close, key=lambda j: scores[j]) == i:  # of equal scores, the first
                expected.append(i)
        tops = [scores[places[..., 0] == image].max() for image in (0, 1)]
        expected = [i for i in expected if not drop or scores[i] >= tops[int(places[i][0])] - drop]
        assert [tuple(one) for one in local_maxima(scores, places, 2, drop)] == expected

        exact = np.where(scores > -1e4, scores + rng.uniform(0, 0.3, scores.shape), scores).astype(np.float32)
        plan = Plan(exact, places, 2, drop)
        for patch, margin in enumerate(plan.margins[:10].tolist()):
            assert (margin > 0) == (patch in plan.peaks[:, 0])
            second, best = np.sort(exact[patch])[-2:]
            if second > best - 1.1 * margin:
                continue  # this subpatch would take its place
            for share, flips in ((0.9, False), (1.1, True)):
                moved = exact.copy()
                moved[patch, moved[patch].argmax()] -= share * margin
                moves += 1
                assert ((patch in Plan(moved, places, 2, drop).peaks[:, 0]) == (margin > 0)) != flips
        assert plan.margins[10] < -1e6
        patches = plan.peaks[:, 0].tolist()
        for number in range(len(patches) + 1):
            gaps = plan.gaps(patches[:number])
            following = patches[number] if number < len(patches) else len(scores)
            assert gaps[following] == 0
            assert (gaps[: patches[number - 1] if number else 0] > 1e6).all(), "patches before the last one are closed"
            if number < len(patches):
                assert gaps[-1] == pytest.approx(max(plan.margins[p] for p in patches[number:]))
    assert moves > 100


def test_no_subpatches_have_no_points() -> None:
    plan = Plan(np.zeros((0, 4), np.float32), np.zeros((0, 4, 3), np.float32), 2, 1.0)
    assert plan.peaks.shape == (0, 2)
    assert plan.gaps([]).tolist() == [0]
    assert plan.log_probabilities([]).tolist() == [0]
