"""Drafting: what the grammar of points makes near-certain is verified in one run of the decoder, not token by token.

A run of [token, draft...] gives the logits after each of them. The sampling loop takes them in order, and what it
chooses decides: the first id that differs from the draft ends it, and the cache forgets the positions after. The loop
draws as many random numbers as without drafts.

Ids are equal to those without drafts if a row of such a run has the bits that a run of its own would have. That depends
on the engine's kernels, so it is checked on this machine (`Trust`) wherever drafting was not asked for.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from molmo_edge.errors import EngineError
from molmo_edge.frontend.points_ahead import text_ahead
from molmo_edge.frontend.tokenizer import StreamDecoder, Tokenizer
from molmo_edge.runtimes.protocol import DRAFT_ROWS
from molmo_edge.system.log import logger

if TYPE_CHECKING:
    from molmo_edge.runtimes.protocol import Cache, DraftRuntime, Runtime

_ENOUGH = 8  # rows that are compared before runs of several positions are trusted


class PointDrafter:
    """Drafts the ids of an answer's points, see molmo_edge.frontend.points_ahead."""

    def __init__(self, tokenizer: Tokenizer, label: str = "") -> None:
        """`label`: what the question asks for, if that is known."""
        self._tokenizer, self._label = tokenizer, label
        self._decoder, self._text = StreamDecoder(tokenizer), ""

    def feed(self, token: int) -> None:
        """Add an id of the answer."""
        self._text += self._decoder.feed(token)

    def draft(self, most: int) -> list[int]:
        """Up to `most` ids that likely follow."""
        ahead = text_ahead(self._text, self._label, coords=self._tokenizer.special.chat_markup)
        if not ahead or most < 1:
            return []
        # Encoded with the last word, because "x" has another token after a space.
        last = self._text[max(self._text.rfind(" "), 0) :]
        ids, left = self._tokenizer.encode(last + ahead), len(last.encode())
        while ids and left > 0:
            left -= len(self._tokenizer.token_bytes(ids.pop(0)))
        return ids[:most] if left == 0 else []  # otherwise a token reaches across the end of the text


class Trust:
    """Whether runs of several positions may be used, for all answers of a model. Threads may share it."""

    def __init__(self, *, checked: bool) -> None:
        """`checked`: use them only if they give the bits of single runs on this machine."""
        self.allowed = True
        self._open = _ENOUGH if checked else 0  # rows that are still to be compared

    @property
    def complete(self) -> bool:
        """Whether nothing has to be compared any more."""
        return self._open <= 0

    def compare(self, row: np.ndarray, single: np.ndarray) -> None:
        """Compare logits [n] of a run of several positions with those of a single run."""
        if np.array_equal(row, single):
            self._open -= 1
        elif self.allowed:
            self.allowed = False
            logger.info("drafting is off: runs of several positions round differently from single ones here")


def choose_trust(runtime: Runtime, draft: bool | None) -> Trust | None:
    """Return how far the drafts of `runtime` are used; None: not at all.

    `draft`: None for models whose ids are equal with and without, True for all that can, False for none. Raises
    EngineError for True and a model that cannot.
    """
    if draft not in (None, True, False):
        raise EngineError(f"draft must be True, False or None, not {draft!r}")
    kind = getattr(runtime, "drafts", "")
    if draft and not kind:
        if runtime.config.point_head is not None:
            raise EngineError("this model points by grounding tokens, which cannot be drafted: leave draft out")
        raise EngineError(
            "this model's decoder cannot verify drafts: export the bundle with --drafting, or leave draft out"
        )
    return Trust(checked=draft is None) if draft or (draft is None and kind == "exact") else None


class Drafts:
    """The drafts of one answer."""

    def __init__(self, drafter: PointDrafter, trust: Trust) -> None:
        self.accepted = 0  # ids that were drafted and chosen, each of which saved a run
        self._drafter, self._trust = drafter, trust
        self._ids: deque[int] = deque()  # drafted ids that are still to be chosen
        self._rows: deque[np.ndarray] = deque()  # the logits after each of them
        self._length = 0  # positions of the cache up to the last id that was chosen
        self._trial = False  # whether the rows are compared instead of used

    def after(self, token: int, runtime: DraftRuntime, cache: Cache, most: int) -> np.ndarray:
        """Return the logits [embedding_size] after `token`, the newest id of the answer.

        Runs it, and the draft of what follows, unless it was drafted itself. `most`: further ids that may run.
        """
        self._drafter.feed(token)
        if self._ids and self._ids[0] == token:
            self._ids.popleft()
            row = self._rows.popleft()
            if self._trial:
                return self._compared(row, token, runtime, cache)
            self.accepted += 1
            self._length += 1
            return row
        self.end(cache)
        draft = self._drafter.draft(min(most, DRAFT_ROWS - 1)) if self._trust.allowed else []
        if not draft:
            return runtime.forward(runtime.embed(np.array([token], np.int64)), cache)
        start, self._trial = cache.length, not self._trust.complete
        rows = runtime.forward_each(runtime.embed(np.array([token, *draft], np.int64)), cache)
        self._ids, self._rows, self._length = deque(draft), deque(rows[1:]), start + 1
        if self._trial:
            cache.length = start
            return self._compared(rows[0], token, runtime, cache)
        first: np.ndarray = rows[0]
        return first

    def end(self, cache: Any) -> None:
        """Let `cache` forget the positions whose ids were not chosen."""
        if self._ids and not self._trial:
            cache.length = self._length
        self._ids.clear()
        self._rows.clear()

    def _compared(self, row: np.ndarray, token: int, runtime: DraftRuntime, cache: Cache) -> np.ndarray:
        single = runtime.forward(runtime.embed(np.array([token], np.int64)), cache)
        self._trust.compare(row, single)
        return single
