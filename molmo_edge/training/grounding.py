"""Training of MolmoPoint's grounding tokens: their inputs, their targets and their losses.

In a sequence a grounding token is one of three marker tokens, which the language model predicts as text. The heads
choose among the patches, slots and locations that the marker stands for; each choice is one more cross entropy, with
the weight of its token. Reference: olmo/models/molmo_point/molmo_point.py of allenai/molmo2, with its released settings
(mask_patches "always", mask_subpatches "inference"). Where its training and its inference differ, this follows
inference: the input of a slot is its feature alone, without the marker's embedding; a location is chosen from the
unnormalised state; and the patch logits are divided by the root of the number of the example's own patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from molmo_edge.config import PointHeadConfig
from molmo_edge.frontend.grounding_tokens import GroundingIds
from molmo_edge.modeling.decoder import apply_rotary
from molmo_edge.modeling.point_head import PointHead
from molmo_edge.training.distill_loss import choice_divergence
from molmo_edge.training.packing import Packed
from molmo_edge.training.regions import PEAK, UNKNOWN, heat_losses

_CLOSED = -1e8  # a patch that cannot be chosen, as in the reference


@dataclass(frozen=True, eq=False)
class PointTokens:
    """The grounding tokens of a sequence, as int64 arrays. A position is that of the token that is the input."""

    turns: np.ndarray  # [n_patches]: the rotary position of each patch
    chosen: np.ndarray  # bool [n_patches]: which patches can be chosen
    places: np.ndarray  # float32 [n_patches, 3] of `grounding_tokens.patch_places`
    patch_inputs: np.ndarray  # [., 2]: position, patch
    slot_inputs: np.ndarray  # [., 3]: position, patch, slot
    # [., 5]: position, target, rotary position of the query, first patch that is open, whether it begins a list
    patch_targets: np.ndarray
    slot_targets: np.ndarray  # [., 3]: position, patch, target
    location_targets: np.ndarray  # [., 2]: position, target


def mark(
    packed: Packed, ids: GroundingIds, config: PointHeadConfig, chosen: np.ndarray, places: np.ndarray
) -> tuple[Packed, PointTokens]:
    """Replace the grounding tokens of a sequence by their markers, and list what they stand for.

    chosen: bool [n_patches], see `crops.pointable_cells`; places: float32 [n_patches, 3], see
    `grounding_tokens.patch_places`. The target of "no more points" is n_patches.
    """
    turns = np.maximum(np.cumsum(chosen) - 1, 0)
    inputs, targets = packed.input_ids, packed.targets
    patch_inputs, slot_inputs, patch_targets, slot_targets, location_targets = ([] for _ in range(5))
    patch, segment = -1, -1  # the last patch of this group of points
    for at in np.flatnonzero((inputs >= ids.first) | ((targets >= ids.first) & (packed.loss_weights != 0))).tolist():
        token, target = int(inputs[at]), int(targets[at])
        if packed.segments[at] != segment:
            patch, segment = -1, packed.segments[at]
        if token == ids.no_more:
            patch = -1
        elif ids.first <= token < ids.slots:
            patch = token - ids.first
            patch_inputs.append((at, patch))
        elif ids.slots <= token < ids.locations:
            slot_inputs.append((at, patch, token - ids.slots))
        if not packed.loss_weights[at] or target < ids.first:
            continue
        if target < ids.slots:
            wanted = target - ids.first
            # Patches ascend within a group of points: a smaller one begins another.
            before = patch if patch <= wanted else -1
            turn = int(turns[before]) if before >= 0 else 0
            patch_targets.append((at, wanted, turn, max(before, 0), before < 0))
        elif target < ids.locations:
            slot_targets.append((at, patch, target - ids.slots))
        else:
            location_targets.append((at, target - ids.locations))
    found = PointTokens(
        turns,
        chosen,
        places,
        _rows(patch_inputs, 2),
        _rows(slot_inputs, 3),
        _rows(patch_targets, 5),
        _rows(slot_targets, 3),
        _rows(location_targets, 2),
    )
    return replace(packed, input_ids=_marked(inputs, ids, config), targets=_marked(targets, ids, config)), found


def _rows(found: Sequence[tuple[int, ...]], columns: int) -> np.ndarray:
    return np.array(found, np.int64).reshape(-1, columns)


def _marked(tokens: np.ndarray, ids: GroundingIds, config: PointHeadConfig) -> np.ndarray:
    marked = np.where(tokens >= ids.locations, config.location_token, config.subpatch_token)
    marked = np.where(tokens < ids.slots, config.patch_token, marked)
    return np.where(tokens < ids.first, tokens, marked).astype(tokens.dtype)


class PointBatch(NamedTuple):
    """The grounding tokens of a batch: patches of all sequences concatenated, positions in the b * n tokens."""

    turns: Tensor
    chosen: Tensor
    places: Tensor
    patch_inputs: Tensor
    slot_inputs: Tensor
    patch_targets: Tensor  # int64 [., 7]: as `PointTokens`, then the first patch after the sequence's, their number
    slot_targets: Tensor
    location_targets: Tensor


def join_points(found: Sequence[PointTokens | None], n: int) -> PointBatch | None:
    """The grounding tokens of a batch whose sequences have n tokens; None for a model without them."""
    if not any(found):
        return None
    known = [one for one in found if one is not None]
    columns: dict[str, list[np.ndarray]] = {name: [] for name in PointBatch._fields}
    first, total = 0, sum(len(one.turns) for one in known)
    for row, one in enumerate(found):
        if one is None:
            continue
        count, at = len(one.turns), row * n
        columns["turns"].append(one.turns)
        columns["chosen"].append(one.chosen)
        columns["places"].append(one.places)
        columns["patch_inputs"].append(one.patch_inputs + np.array([at, first]))
        columns["slot_inputs"].append(one.slot_inputs + np.array([at, first, 0]))
        queries = one.patch_targets + np.array([at, first, 0, first, 0])
        queries[one.patch_targets[:, 1] == count, 1] = total  # "no more points", after all patches
        own = np.broadcast_to([first + count, count], (len(queries), 2))
        columns["patch_targets"].append(np.concatenate([queries, own], axis=1))
        columns["slot_targets"].append(one.slot_targets + np.array([at, first, 0]))
        columns["location_targets"].append(one.location_targets + np.array([at, 0]))
        first += count
    return PointBatch(*(torch.from_numpy(np.concatenate(columns[name])) for name in PointBatch._fields))


def gather_slots(features: Tensor, pooling: Tensor) -> Tensor:
    """features [c, patches, feature_dim], pooling int [m, n_slots] -> [m, n_slots, feature_dim], zero for -1."""
    there = (pooling >= 0)[..., None].to(features.dtype)
    return features.flatten(0, 1)[pooling.clamp(min=0)] * there


def embed_points(
    x: Tensor, head: PointHead, points: PointBatch, features: Tensor, pooling: Tensor, cells: Tensor
) -> Tensor:
    """The inputs of grounding tokens: x [tokens, d], the markers' embeddings -> the same shape.

    features [c, patches, feature_dim] of the towers; pooling int [k, n_slots] and cells [k, d] of the image tokens.
    """
    at, patch = points.patch_inputs.unbind(1)
    x = x.index_add(0, at, cells.index_select(0, patch).to(x.dtype))
    at, patch, slot = points.slot_inputs.unbind(1)
    rows = gather_slots(features, pooling[patch, slot][:, None])[:, 0]
    return x.index_copy(0, at, head.patch_embedding(rows).to(x.dtype))


class PointScores(NamedTuple):
    """The scores of all choices of a batch, float32, with the right choice and the position of its token."""

    patches: Tensor  # [., patches + 1], the last one "no more points" if the head has it
    patch_targets: Tensor
    patch_at: Tensor
    slots: Tensor  # [., n_slots]
    slot_targets: Tensor
    slot_at: Tensor
    locations: Tensor  # [., n_locations]
    location_targets: Tensor
    location_at: Tensor
    # Of a head with votes: which rows of `patches` begin a list, int64 [g], and the patches of the whole list,
    # int8 [g, patches]: PEAK, UNKNOWN next to one and where it cannot be chosen, else 0.
    begins: Tensor | None = None
    lists: Tensor | None = None

    @property
    def kinds(self) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
        """Scores, targets and positions of patches, of slots and of locations."""
        return self[0:3], self[3:6], self[6:9]


def point_scores(
    head: PointHead,
    config: PointHeadConfig,
    points: PointBatch,
    states: Tensor,
    images: Tensor,
    features: Tensor,
    pooling: Tensor,
) -> PointScores:
    """The scores of the choices that grounding tokens stand for.

    states [tokens, d] before the final norm; images int [k]: the positions of the image tokens; the rest as in
    `embed_points`. Every parameter of the head takes part, also in a batch without points.
    """
    keys = rotated(head.patch_k(head.x_norm(states.index_select(0, images))), points.turns, config.rope_theta)
    at, target, turn, lowest, begins, end, count = points.patch_targets.unbind(1)
    query = rotated(head.patch_q(head.x_norm(states.index_select(0, at))), turn, config.rope_theta)
    number = torch.arange(len(keys), device=keys.device)
    is_open = points.chosen & (number >= lowest[:, None]) & (number < end[:, None])
    scores = query @ keys.T
    if config.no_more_class:
        scores = torch.cat([scores, query @ head.no_more.to(query.dtype)[:, None]], dim=1)
    scores = scores.float() / (count + int(config.no_more_class)).float().sqrt()[:, None]
    if config.votes:
        own = scores[:, :-1] - scores[:, -1:]
        voting = head.vote_queries(states.index_select(0, at))
        best = _best_subpatches(head, config, voting, own, end, count, features, pooling)
        scores = torch.cat([best, torch.zeros_like(best[:, :1])], dim=1)
    is_choice = F.pad(is_open, (0, 1), value=True) if config.no_more_class else is_open
    patches = scores.masked_fill(~is_choice, _CLOSED), target, at
    first = begins.nonzero()[:, 0]
    lists = _lists(points, is_open, first, config.peak_distance) if config.votes else None

    at, patch, target = points.slot_targets.unbind(1)
    query = head.subpatch_q(head.x_norm(states.index_select(0, at)))
    slots = head.subpatch_k(gather_slots(features, pooling.index_select(0, patch)))
    scores = (slots @ query[..., None].to(slots.dtype))[..., 0] / query.shape[-1] ** 0.5
    chosen = scores.float(), target, at

    at, target = points.location_targets.unbind(1)
    locations = head.location(states.index_select(0, at)).float(), target, at
    return PointScores(*patches, *chosen, *locations, None if lists is None else first, lists)


def _lists(points: PointBatch, is_open: Tensor, begins: Tensor, distance: float) -> Tensor:
    """`PointScores.lists`. is_open bool [., patches]: of each choice; begins int64 [g]: those that begin a list."""
    at, target = points.patch_targets[:, 0], points.patch_targets[:, 1]
    n = len(points.turns)
    number = torch.searchsorted(begins, torch.arange(len(at), device=at.device), right=True) - 1  # of the list
    lists = torch.where(is_open[begins], 0, UNKNOWN).to(torch.int8)  # [g, patches]
    ended = torch.zeros(len(begins), dtype=torch.bool, device=at.device).index_fill(0, number[target == n], True)
    last = torch.zeros(len(begins), dtype=torch.long, device=at.device)
    last = last.scatter_reduce(0, number[target < n], target[target < n], "amax")
    after = torch.arange(n, device=at.device) > last[:, None]
    lists = lists.masked_fill(after & ~ended[:, None], UNKNOWN)  # the sequence was truncated within the list
    number, target = number[target < n], target[target < n]
    apart = (points.places[target][:, None] - points.places).abs()  # [., patches, 3]
    close = (apart[..., 0] == 0) & (apart[..., 1:] <= distance).all(-1)
    beside = torch.zeros(lists.shape, dtype=torch.int, device=at.device).index_add(0, number, close.int()) > 0
    return lists.masked_fill(beside, UNKNOWN).index_put((number, target), torch.tensor(PEAK).to(lists))


def _best_subpatches(
    head: PointHead,
    config: PointHeadConfig,
    queries: Tensor,
    own: Tensor,
    ends: Tensor,
    counts: Tensor,
    features: Tensor,
    pooling: Tensor,
) -> Tensor:
    """The best scores of the subpatches of each patch, float32 [n, patches]; see `runtimes.peaks.Votes.scores`.

    queries [n, votes * vote_dim + 1], in the order of their sequences; own [n, patches]: the patches' own scores; ends
    and counts int [n]: the patches of their sequences. Patches of other sequences have the score 0.
    """
    slots = pooling.shape[1]
    keys = head.vote_keys(gather_slots(features, pooling)).unflatten(-1, (config.votes, config.vote_dim))
    keys = keys.flatten(0, 1).transpose(0, 1)  # [votes, patches * slots, vote_dim]
    missing = (pooling < 0)[None]  # [1, patches, slots]
    found = []
    (sequences, lengths), total = ends.unique_consecutive(return_counts=True), len(pooling)
    firsts, parts = sequences - counts[lengths.cumsum(0) - 1], lengths.tolist()
    votes_of = queries[:, :-1].unflatten(-1, (config.votes, config.vote_dim)).transpose(0, 1).split(parts, dim=1)
    own_of = (own + queries[:, -1:]).split(parts)
    for query, alone, first, end in zip(votes_of, own_of, firsts.tolist(), sequences.tolist(), strict=True):
        votes = query @ keys[:, first * slots : end * slots].transpose(1, 2)  # [votes, n, patches * slots]
        votes = votes.logsumexp(0).unflatten(-1, (end - first, slots)).float()
        scores = torch.logaddexp(votes, alone[:, first:end, None].float())
        found.append(F.pad(scores.masked_fill(missing[:, first:end], _CLOSED).amax(-1), (first, total - end)))
    return torch.cat(found) if found else (own + queries[:, -1:] + keys.sum() + queries.sum()).float()


def choice_loss(scores: PointScores, weights: Tensor) -> Tensor:
    """The weighted sum of the losses of all choices. weights [tokens]

    Those of patches are cross entropies, or in a head with votes the focal losses of all patches at the first choice of
    each list (CenterNet, see `regions.heat_loss`), in which the score of "no more points" is the threshold.
    """
    total, kinds = torch.zeros((), device=weights.device), scores.kinds
    if scores.begins is not None and scores.lists is not None:
        rows = scores.patches.index_select(0, scores.begins)
        losses = heat_losses(rows[:, :-1] - rows[:, -1:], scores.lists).sum(1)
        total = total + (losses * weights.index_select(0, scores.patch_at[scores.begins])).sum()
        kinds = kinds[1:]
    for rows, targets, at in kinds:
        total = total + (F.cross_entropy(rows, targets, reduction="none") * weights.index_select(0, at)).sum()
    return total


def point_divergence(
    scores: PointScores, teacher: Sequence[Tensor], weights: Tensor, temperature: float = 1.0, reverse: float = 0.0
) -> Tensor:
    """The weighted sum of the divergences of all choices from the teacher's scores of the same choices.

    teacher: scores of patches, slots and locations. weights [tokens]. In a head with votes, that of patches is the
    divergence of the probabilities sigmoid(score) of all patches at the first choice of each list.
    """
    total = torch.zeros((), device=weights.device)
    for (rows, _, at), theirs in zip(scores.kinds, teacher, strict=True):
        if rows is scores.patches and scores.begins is not None:
            pairs = (x.index_select(0, scores.begins) for x in (rows, theirs.to(rows)))
            ours, wanted = (torch.stack([x[:, :-1], x[:, -1:].expand_as(x[:, :-1])], dim=-1) for x in pairs)
            first = at.index_select(0, scores.begins)
            found = choice_divergence(ours, wanted, temperature, reverse).sum(1) * weights.index_select(0, first)
        else:
            found = choice_divergence(rows, theirs, temperature, reverse) * weights.index_select(0, at)
        total = total + found.sum()
    return total


def rotated(x: Tensor, turns: Tensor, theta: float) -> Tensor:
    """x [n, dim] rotated to the integer positions `turns` [n], as `runtimes.grounding.rotate`."""
    half = torch.arange(0, x.shape[-1], 2, dtype=torch.float32, device=x.device)
    angles = turns[:, None].float() * theta ** -(half / x.shape[-1])
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return apply_rotary(x[:, None], angles.cos(), angles.sin())[:, 0]
