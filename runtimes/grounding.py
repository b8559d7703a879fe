"""Decoding with MolmoPoint's grounding tokens: the logits and the embeddings that depend on the prompt's images.

A `Grounding` belongs to one sequence. The sampling loop passes each new token's text logits and state through it and
embeds tokens with it. It does not depend on an engine. Source: hf_model/modeling_molmo_point.py in allenai/molmo2.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from molmo_edge.config import PointHeadConfig
from molmo_edge.frontend.grounding_tokens import (
    TOKEN,
    TRIPLE,
    UNNUMBERED,
    GroundingIds,
    decode_grounding,
    slot_places,
    with_coordinates,
)
from molmo_edge.frontend.points import Point, format_points, written_absent
from molmo_edge.frontend.totals import TotalWriter
from molmo_edge.runtimes.peaks import CLOSED, Plan, Votes
from molmo_edge.runtimes.protocol import PointRuntime
from molmo_edge.system.lazy import cached_property

Patches = Literal["best", "graded", "shared"]  # see `Grounding.logits`

_CLOSED_TAG = re.compile(r'<(points|tracks)\b.*?"\s*>(?P<label>[^<]*)</\1>', re.DOTALL)
_OPENING = re.compile(r"<(points|tracks)\b")
_LABEL = re.compile(r'"\s*>(.*)', re.DOTALL)
_NUMBER = re.compile(r"> ?[0-9]")  # the number of an object begins
_LAST_TOKEN = re.compile(r">")
# A text ends with the beginning of a point.
_BEGUN = re.compile(r"(?:<POINT_[0-9]+> ?){0,3}(?:<P?O?I?N?T?_?[0-9]*)?\Z")
_RUN = re.compile(r"(?:<POINT_[0-9]+>)+")
_RUN_BEGUN = re.compile(r"(?:<POINT_[0-9]+>)*(?:<P?O?I?N?T?_?[0-9]*)?\Z")  # a text ends with a run that may go on

_OPEN = '<points coords="'

_UNSET = np.float32(-1e5)  # an id that no head has a logit for at this step


@dataclass
class Grounding:
    """The cache of one sequence's grounding tokens, made at prefill."""

    head: PointRuntime
    config: PointHeadConfig
    ids: GroundingIds
    patch_keys: np.ndarray  # float32 [n_patches (+ 1), dim], rotated; the last is "no more points"
    positions: np.ndarray  # int [n_patches]: index of each patch among the selectable ones, -1 before the first
    selectable: np.ndarray  # bool [n_patches (+ 1)]
    slot_features: np.ndarray  # float32 [n_patches, n_slots, feature_dim], zero for missing patches
    slots: np.ndarray  # bool [n_patches, n_slots]: False for missing patches
    features: np.ndarray  # float32 [n_patches, d_model]: the connector's output
    votes: Votes | None = None  # of a head with votes
    history: list[int] = field(default_factory=list)
    # The points that a head with votes chooses, by the length of the history at that choice.
    plans: dict[int, Plan] = field(default_factory=dict)

    def logits(self, text: np.ndarray, state: np.ndarray, patches: Patches = "best") -> np.ndarray:
        """The logits of all ids after the last token of `history`.

        `text`: float32 [ids.first], the language model's logits; `state`: float32 [d_model], the last token's state
        before the final norm. `patches`: which of them get the logit of the patch token: "best", the likeliest one, as
        the model decodes; "graded", each patch, less what its own logit is behind the likeliest one's; "shared", each
        patch plus its log probability among the patches, so that their probabilities add up to the patch token's. In a
        head with votes, they follow from the `Plan` of the list.

        Returns float32 [ids.end], -inf for ids that may not follow in the order of grounding tokens.
        """
        ids, config = self.ids, self.config
        out = np.full(ids.end, _UNSET, np.float32)
        out[: ids.first] = text
        for token in (config.patch_token, config.subpatch_token, config.location_token):
            out[token] = _UNSET
        model = self.head.config
        if model.image.layout == "molmo":  # as everywhere in Molmo v1: ids beyond the vocabulary are no text
            out[model.decoder.vocab_size : ids.first] = _UNSET
        # The first new token is never a grounding token, nor is any after "no more points".
        if self.history and ids.no_more not in self.history:
            patch_query, _, slot_query, location = (part[0] for part in self.head.project(state[None]))
            marker = float(text[config.patch_token])
            out[ids.first : ids.slots] = self._patch_scores(patch_query, state, marker, patches)
            last = self.history[-1]
            if ids.first <= last < ids.first + ids.n_patches:
                out[ids.slots : ids.locations] = self._slot_scores(slot_query, state, last - ids.first)
            elif ids.slots <= last < ids.locations:
                out[ids.locations : ids.end] = location
        allowed = np.full(ids.end, -np.inf, np.float32)
        for start, stop in ids.allowed(self.history) if self.history else [(0, ids.slots)]:
            allowed[start:stop] = out[start:stop]
        return allowed

    def embed(self, token: int) -> np.ndarray:
        """The embedding of the new token `token`, float32 [1, d_model], which becomes the last of `history`."""
        self.history.append(token)
        ids, config = self.ids, self.config
        if token < ids.first:
            return self.head.embed(np.array([token]))
        if ids.slots <= token < ids.locations:
            features = self.slot_features[self._patches()[-1], token - ids.slots]
            return self.head.project_features(features[None])[1]
        row = self.head.embed(np.array([config.patch_token if token < ids.slots else config.location_token]))
        return row + self.features[token - ids.first] if token < ids.first + ids.n_patches else row

    def _patches(self) -> list[int]:
        """The patches in `history`."""
        return [token - self.ids.first for token in self.history if 0 <= token - self.ids.first < self.ids.n_patches]

    def _patch_scores(self, query: np.ndarray, state: np.ndarray, marker: float, patches: Patches) -> np.ndarray:
        """The patches' part of `logits`. `query`: of `state`; `marker`: the logit of the patch token."""
        if self.votes is not None:
            plan, earlier = self._plan(query, state), self._patches()
            if patches == "shared":
                return np.asarray(marker + plan.log_probabilities(earlier), np.float32)
            if patches == "graded":
                return np.asarray(marker - plan.gaps(earlier), np.float32)
            chosen = next(iter(plan.left(earlier)), len(self.selectable) - 1)
            return np.where(np.arange(len(self.selectable)) == chosen, np.float32(marker), _UNSET)
        own = self.patch_logits(query, state)
        if not self.config.numbered:
            own = self._decided(own) if patches != "shared" else self._open(own)
        if patches == "best":
            return np.where(np.arange(len(own)) == own.argmax(), np.float32(marker), _UNSET)
        behind = own - own.max()
        if patches == "shared":
            behind -= np.log(np.exp(behind).sum())
        return np.asarray(marker + behind, np.float32)

    def _open(self, own: np.ndarray) -> np.ndarray:
        """`own` without the patches before the last one, which are closed in training and may not follow."""
        earlier = self._patches()
        return np.where(np.arange(len(own)) < earlier[-1], CLOSED, own) if earlier else own

    def _decided(self, own: np.ndarray) -> np.ndarray:
        """`own` of the open patches; at first, "no more points" wins if it is likelier than all patches together.

        An object extends over several patches, which share the probability that there is one. The reference compares
        "no more points" with the likeliest patch alone, as this does after the first point.
        """
        if not self.config.no_more_class or self._patches():
            return self._open(own)
        all_patches = np.logaddexp.reduce(own[:-1].astype(np.float64))
        return np.append(own[:-1], np.float32(own[:-1].max() + own[-1] - all_patches))

    def _plan(self, query: np.ndarray, state: np.ndarray) -> Plan:
        """The points of the list that `history` is in, or that would begin now, of a head with votes."""
        first, end = self.ids.first, self.ids.first + self.ids.n_patches
        begun = next((at for at, token in enumerate(self.history) if first <= token < end), None)
        at = len(self.history) if begun is None else begun
        if begun is None or at not in self.plans:
            assert self.votes is not None
            scores = self._subpatch_scores(query, state)
            self.plans[at] = Plan(scores, self.votes.places, self.config.peak_distance, self.config.peak_drop)
        return self.plans[at]

    def _slot_scores(self, query: np.ndarray, state: np.ndarray, patch: int) -> np.ndarray:
        """The slots' part of `logits` after `patch`. A patch with several points has their slots, in order."""
        if self.votes is not None:
            plan = self._plan(query, state)
            slot = plan.slot(self._patches())
            if slot is not None:
                scores = plan.scores[patch]
                return np.asarray(-np.abs(scores - scores[slot]), np.float32)
        return self.slot_logits(query, patch)

    def _subpatch_scores(self, query: np.ndarray, state: np.ndarray) -> np.ndarray:
        """The scores of all subpatches, of a head with votes: see `Votes.scores`."""
        assert self.votes is not None
        own = self._own_logits(query)
        return self.votes.scores(self.head.vote_queries(state[None])[0], own[:-1] - own[-1])

    def patch_logits(self, query: np.ndarray, state: np.ndarray) -> np.ndarray:
        """The logits of the patches and of "no more points" -> float32 [n_patches (+ 1)].

        `state`: float32 [d_model], the last token's; `query`: float32 [dim], its query of a patch. In a head with
        votes, the logit of a patch is the best score of its subpatches, and that of "no more points" is 0.
        """
        if self.votes is not None:
            return np.append(self._subpatch_scores(query, state).max(1), np.float32(0))
        return self._own_logits(query)

    def _own_logits(self, query: np.ndarray) -> np.ndarray:
        """`patch_logits` without votes."""
        earlier = self._patches()
        if earlier and self.history[-1] == self.ids.first + earlier[-1]:
            earlier.pop()  # the query is rotated by the last patch before the current token
        if earlier:
            query = rotate(query[None], self.positions[earlier[-1:]], self.config.rope_theta)[0]
        scores = self.patch_keys @ query / np.sqrt(np.float32(len(self.patch_keys)))  # the number of classes
        return np.where(self.selectable, scores, CLOSED)

    def slot_logits(self, query: np.ndarray, patch: int) -> np.ndarray:
        """The logits of the slots of `patch` for a slot query [dim] -> float32 [n_slots]."""
        keys = self.head.project_features(self.slot_features[patch])[0]
        scores = keys @ query / np.sqrt(np.float32(len(query)))
        return np.where(self.slots[patch], scores, _UNSET)


@dataclass(frozen=True, eq=False)
class GroundingInputs:
    """The inputs of a prompt's grounding tokens. `begin` creates the cache after the prompt has run."""

    head: PointRuntime
    ids: np.ndarray  # int [n], from the beginning of the prompt to its last image
    positions: np.ndarray  # int [n_patches]: of the image tokens in `ids`
    indexable: int  # the id of those that can be chosen, `<im_patch>`
    patch_features: np.ndarray  # float32 [crops * patches, feature_dim] of the ViT
    pooling: np.ndarray  # int [n_patches, n_slots], the patches of each image token, -1 for none
    features: np.ndarray  # float32 [n_patches, d_model] of the connector
    grids: tuple[np.ndarray, ...]  # of each image or frame int [rows, cols], the patches that tile it
    times: tuple[float, ...] | None = None  # of the frames of a video, seconds; None: `grids` are images
    frames: tuple[Sequence[float], ...] = ()  # of each image, its place in its grid, see `decode_grounding`
    pointable: np.ndarray | None = None  # bool [n_patches], which can be chosen; None: those whose id is `indexable`
    states: np.ndarray | None = None  # float32 [n, d_model] before the final norm, once `ids` have run
    # int [n_patches]: the rows of `states` of the image tokens, -1 for those that were left out and cannot be chosen.
    # None: `positions`
    rows: np.ndarray | None = None

    @property
    def token_ids(self) -> GroundingIds:
        """The ids of the grounding tokens."""
        config, (patches, slots) = self._config, self.pooling.shape
        first = self.head.config.decoder.n_logits
        return GroundingIds(first, patches, slots, config.n_locations, config.no_more_class, config.numbered)

    @property
    def writes_digits(self) -> bool:
        """Whether an answer's text has the grammar of Molmo v1 instead of the grounding tokens."""
        return self.head.config.image.layout == "molmo"

    @property
    def numbered(self) -> bool:
        """Whether text with the object's number follows each point."""
        return self._config.numbered

    @property
    def _config(self) -> PointHeadConfig:
        config = self.head.config.point_head
        assert config is not None
        return config

    def begin(self, states: np.ndarray) -> Grounding:
        """`states`: float32 [n, d_model] of `ids` and more, before the final norm, if `self.states` is None."""
        config, there = self._config, self.pooling >= 0
        states = states if self.states is None else self.states
        chosen = self.ids[self.positions] == self.indexable if self.pointable is None else self.pointable
        positions = np.cumsum(chosen) - 1
        rows = self.positions if self.rows is None else self.rows
        keys = rotate(self.head.project(states[np.maximum(rows, 0)])[1], positions, config.rope_theta)
        chosen = chosen & (rows >= 0)
        if config.no_more_class:
            keys, chosen = np.concatenate([keys, self.head.no_more[None]]), np.append(chosen, True)
        slot_features = self.patch_features[np.maximum(self.pooling, 0)] * there[..., None]
        return Grounding(
            self.head,
            config,
            self.token_ids,
            keys,
            positions,
            chosen,
            slot_features,
            there,
            self.features,
            self._votes if config.votes else None,
        )

    @cached_property
    def _votes(self) -> Votes:
        """What votes are computed from, which all questions about the images share."""
        keys = self.head.vote_keys(self.patch_features)[np.maximum(self.pooling, 0)]
        keys = keys.reshape(*self.pooling.shape, self._config.votes, self._config.vote_dim)
        return Votes(keys, slot_places(self.pooling, self.grids))

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """The embeddings of an answer's tokens, int [n] -> float32 [n, d_model]. They do not depend on any states."""
        decoder = self.head.config.decoder
        grounding = self.begin(np.zeros((len(self.ids), decoder.d_model), np.float32))
        rows = [grounding.embed(int(token)) for token in tokens]
        return np.concatenate([np.zeros((0, decoder.d_model), np.float32), *rows])

    def points(self, text: str) -> list[Point]:
        """The points of the grounding tokens in `text`, in order, with the labels of their tags."""
        found: list[Point] = []
        tags = [*_closed_tags(text), (len(text), len(text), "")]
        position = 0
        for start, end, label in tags:
            found += self._untagged_points(text[position:start])
            found += [replace(point, label=label) for point in self.unlabelled_points(text[start:end])]
            position = end
        return found

    def _untagged_points(self, text: str) -> list[Point]:
        """The points of text between the tags that close, in the order in which `DigitWriter` writes them."""
        if not self.writes_digits:
            return self.unlabelled_points(text)
        before, tag, rest = text.partition(_OPEN)
        runs = [*_RUN.findall(before), tag + rest]
        return [point for run in runs for point in self.unlabelled_points(run)]

    def unlabelled_points(self, text: str) -> list[Point]:
        """The points of the grounding tokens in `text`, whether their tag closes or not."""
        found = decode_grounding(
            text,
            self.pooling,
            self.grids,
            frames=self.frames,
            no_more_class=self._config.no_more_class,
            numbered=self.numbered,
        )
        if self.writes_digits:  # in the order of the text
            points = [Point(100 * p.x, 100 * p.y) for p in found]
            return sorted(points, key=lambda p: (round(p.x, 1), round(p.y, 1)))
        if self.times is not None:
            return [Point(100 * p.x, 100 * p.y, time=self.times[p.frame]) for p in found]
        return [Point(100 * p.x, 100 * p.y, image=p.frame + 1) for p in found]

    def with_coordinates(self, text: str) -> str:
        """An answer with coordinates in place of its grounding tokens, in the grammar that the model writes points in.

        It can be read without the images: by scores, and by the model as an earlier answer. A text without grounding
        tokens is returned unchanged.
        """
        if not TOKEN.search(text):
            return text
        if self.writes_digits:
            writer = DigitWriter(self)
            return writer.feed(text) + writer.close()
        return with_coordinates(text, self.points, numbered=self.numbered)


def _closed_tags(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, label) of the tags in `text` that close."""
    position, unclosed = 0, set()
    while tag := _OPENING.search(text, position):
        position, closing = tag.end(), f"</{tag[1]}>"
        at = tag.end() if tag[1] not in unclosed else -1
        while at >= 0 and (at := text.find(closing, at)) >= 0:
            before = max(tag.end(), text.rfind("<", 0, at) + 1)  # a label has no "<"
            if label := _LABEL.search(text[before:at]):
                position = at + len(closing)
                yield tag.start(), position, html.unescape(label[1].strip())
                break
            at += len(closing)
        else:
            unclosed.add(tag[1])


class GroundedParser:
    """Finds the points of grounding tokens in text that arrives in pieces, as `StreamParser` those of text.

    A point comes with the first digit of its object's number, which more digits would not move, or with its last token
    if no number follows. It has no label yet: `GroundingInputs.points` of the whole text has the same points with their
    labels. If the answer's text has sorted coordinates instead (`writes_digits`), the points come as their tag closes.
    """

    def __init__(self, inputs: GroundingInputs) -> None:
        self._inputs = inputs
        self._pattern, self._last = (TRIPLE, _NUMBER) if inputs.numbered else (UNNUMBERED, _LAST_TOKEN)
        self._pending: list[str] = []  # text that may be the beginning of a point
        self._end = ""  # the last two characters

    def feed(self, piece: str) -> list[Point]:
        """Add a piece of text; return the points that it completes."""
        self._pending.append(piece)
        if self._inputs.writes_digits:
            return self._closed() if ">" in piece else []
        recent = self._end + piece
        self._end = recent[-2:]
        if not self._last.search(recent):
            return []
        text, end = "".join(self._pending), 0
        triples = []
        for triple in self._pattern.finditer(text):
            triples.append(triple[0])
            end = triple.end()
        begun = _BEGUN.search(text, end)
        self._pending = [text[begun.start() :] if begun else ""]
        return self._inputs.unlabelled_points("".join(triples))

    def close(self) -> list[Point]:
        """End the text; return the points of a tag that did not close, if the others came as their tags closed."""
        text, self._pending = "".join(self._pending), []
        return [replace(point, label="") for point in self._inputs.points(text)] if self._inputs.writes_digits else []

    def _closed(self) -> list[Point]:
        text = "".join(self._pending)
        end = max((stop for _, stop, _ in _closed_tags(text)), default=0)
        self._pending = [text[end:]]
        return [replace(point, label="") for point in self._inputs.points(text[:end])]


class DigitWriter:
    """Rewrites text that arrives in pieces: tags of grounding tokens become those of Molmo v1, `<point x= y=>`.

    So do grounding tokens outside of any tag, as a weak model may give them: a tag without a label. For a tag without
    points see `points.written_absent`. "shows a total of" after a tag is followed by the number of its points.
    """

    def __init__(self, inputs: GroundingInputs) -> None:
        self._inputs, self._held, self._begun = inputs, "", False
        self._totals = TotalWriter()

    def feed(self, piece: str) -> str:
        """The text that this piece completes. A tag is held back until it is closed, because it begins with a count."""
        self._held += piece
        done = ""
        while tag := _CLOSED_TAG.search(self._held):
            done += self._totals.feed(self._outside(self._held[: tag.start()]))
            points, label = self._inputs.unlabelled_points(tag[0]), tag["label"].strip()
            alone = not (self._begun or done.strip())
            text = format_points(points, label) if points else written_absent(label, alone=alone)
            done += self._totals.tag(text, len(points))
            self._held = self._held[tag.end() :]
        start = self._held.find(_OPEN)
        if start < 0:  # it may begin at the end, or a run of tokens may go on
            start = next((at for at in range(len(self._held)) if _OPEN.startswith(self._held[at:])), len(self._held))
            if run := _RUN_BEGUN.search(self._held):
                start = min(start, run.start())
        done += self._totals.feed(self._outside(self._held[:start]))
        self._held = self._held[start:]
        self._begun = self._begun or bool(done.strip())
        return done

    def close(self) -> str:
        """The rest of a truncated answer, with the points of a tag that it left open."""
        held, self._held = self._held, ""
        rest = self._written(held) if held.startswith(_OPEN) else self._outside(held)
        return self._totals.feed(rest) + self._totals.close()

    def _outside(self, text: str) -> str:
        return _RUN.sub(lambda run: self._written(run[0]), text)

    def _written(self, tag: str) -> str:
        points = self._inputs.unlabelled_points(tag)
        return format_points(points, "") if points else ""


def rotate(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """Rotary embedding of x, float32 [n, dim], in the rotate-half layout."""
    dim = x.shape[-1]
    frequency = np.float32(theta) ** -(np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    angles = positions[:, None].astype(np.float32) * frequency
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = x[:, : dim // 2], x[:, dim // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
