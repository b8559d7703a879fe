"""A conversation about one image: keys and values of the image and of earlier turns stay in one cache.

A turn runs its own tokens only. What the model sees is the reference's format of a conversation
(molmo_edge.frontend.prompts),
with the answers as the ids that were generated.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from molmo_edge.answer import Answer, Seconds
from molmo_edge.frontend.prompts import text_ids
from molmo_edge.molmo import MAX_NEW_TOKENS, _checked
from molmo_edge.runtimes import forks
from molmo_edge.runtimes.generate import GenerationError, Sampling, most_new_tokens
from molmo_edge.sdk.process_bound import NotCopied
from molmo_edge.sdk.streaming import Stream, finished, generate_pieces

if TYPE_CHECKING:
    from molmo_edge.frontend.points import Point
    from molmo_edge.molmo import Molmo, Scene
    from molmo_edge.runtimes import Cache

_ROOM = 1024  # positions that a new cache has beyond what is needed now: a few turns fit before it is copied


class ConversationFull(GenerationError):  # noqa: N818 (a state, not a mistake)
    """The next question does not fit into the model's context behind image and earlier turns."""


class Chat(NotCopied):
    """What `Molmo.chat` returns. Several threads may hold one, but only the newest question is answered.

    A turn counts once its answer is complete, or cut off by `max_new_tokens`: one whose stream failed, was interrupted
    or was left before its end is forgotten.
    """

    _instead = "pass its image and its `history` on, and ask there"

    def __init__(self, molmo: Molmo, scene: Scene) -> None:
        """`scene`: of this Molmo; prefilled here if it is not yet."""
        self.scene = scene
        self._molmo = molmo
        self._lock = threading.Lock()
        self._turn = 0  # the newest; a stream of an older one stops
        self._answers: list[tuple[str, Answer]] = []
        self._ids: np.ndarray = np.zeros(0, np.int32)  # of all turns so far, behind the image
        self._cache: Cache | None = None
        self._kept = 0  # positions at the cache's start that hold the image and, of `_ids`, the first
        forks.on_fork(self)
        if scene.prefilled is None:
            cache = self._make_room(len(scene.embeddings))
            molmo._runtime.forward(scene.embeddings, cache)
            self._kept = cache.length

    def forked(self) -> None:
        """See molmo_edge.runtimes.forks: a child prefills image and turns again."""
        self._lock, self._cache, self._kept = threading.Lock(), None, 0

    @property
    def history(self) -> list[tuple[str, str]]:
        """(question, answer as generated) of each turn, as `Molmo.ask` takes it."""
        return [(question, answer.text) for question, answer in self._answers]

    @property
    def answers(self) -> list[Answer]:
        """The answers so far."""
        return [answer for _, answer in self._answers]

    @property
    def positions(self) -> int:
        """Positions of the model's context that image and turns take."""
        return len(self.scene.embeddings) + len(self._ids)

    @property
    def full(self) -> bool:
        """Whether no question fits any more."""
        return self.positions >= self._context

    def reset(self) -> None:
        """Forget all turns. The image stays prefilled."""
        with self._lock:
            self._turn += 1
            self._answers.clear()
            self._ids = self._ids[:0]
            self._kept = min(self._kept, len(self.scene.embeddings))

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Answer:
        """Ask the next question. `usage.tokens.prefilled` says how many positions were run for it.

        Raises ConversationFull where it does not fit behind the earlier turns, and what `Molmo.ask` raises.
        """
        return self.stream(
            question, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        ).answer

    def stream(
        self,
        question: str,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Stream:
        """As `ask`, piece by piece. The arguments are checked before this returns."""
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
        _checked(question, "question")
        own = text_ids(self._molmo._tokenizer, [question])
        with self._lock:
            ids = np.concatenate([self._ids, own])
            filled = len(self.scene.embeddings) + len(ids)
            if self._answers and filled > self._context:
                raise ConversationFull(
                    f"the conversation is full: with this question it has {filled} tokens, and the model's context "
                    f"holds {self._context}; reset() starts a new one about the same image"
                )
            most = most_new_tokens(sampling, filled, self._context)
            self._turn += 1
            turn = self._turn
        result: list[Answer] = []
        return Stream(self._answer(turn, question, ids, sampling, most, result), result)

    def _answer(
        self, turn: int, question: str, ids: np.ndarray, sampling: Sampling, most: int, result: list[Answer]
    ) -> Iterator[str | Point]:
        began = time.perf_counter()
        runtime, tokenizer = self._molmo._runtime, self._molmo._tokenizer
        capacity = len(self.scene.embeddings) + len(ids) + most - 1
        with self._lock:
            self._check(turn)
            cache = self._make_room(capacity)
            rows = self._rows(ids)
        pieces = generate_pieces(runtime, tokenizer, rows, cache, sampling, capacity=capacity, began=began)
        while True:
            with self._lock:  # a newer question must not run on this cache meanwhile
                self._check(turn)
                try:
                    piece = next(pieces)
                except StopIteration as end:
                    generated = end.value
                    break
            yield piece
        spent = Seconds(load=self._molmo._load_seconds, prefill=generated.prefill, decode=generated.decode)
        answer = finished(
            self.scene,
            generated.text,
            generated.points,
            generated.token_ids,
            len(ids),
            spent,
            complete=len(generated.token_ids) < most,
            prefilled=len(rows),
        )
        with self._lock:
            self._check(turn)
            # An answer ends with EOS in every conversation, the one that was cut off, too. It is not in the cache yet.
            ended = np.array([*generated.token_ids, tokenizer.special.eos], np.int32)
            self._ids, self._kept = np.concatenate([ids, ended]), cache.length
            self._answers.append((question, answer))
        result.append(answer)

    def _check(self, turn: int) -> None:
        if turn != self._turn:
            raise GenerationError("this stream is over: another question was asked in this chat before its end")

    def _make_room(self, capacity: int) -> Cache:
        """The cache, wound back to what the conversation keeps, with room for `capacity` positions."""
        source = self.scene.prefilled if self._cache is None else self._cache
        grown = min(capacity + _ROOM, self._context)
        if source is None:
            self._kept, self._cache = 0, self._molmo._runtime.new_cache(grown)
        elif self._cache is None:  # the scene's own is never written to
            self._kept, self._cache = source.length, source.copy(grown)
        self._cache.length = self._kept  # an answer that broke off may have left more
        if self._cache.capacity < capacity:
            self._cache = self._cache.copy(grown)
        return self._cache

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        """Embeddings of the image and `ids` that the cache does not hold, float32 [n, d_model]."""
        image = self.scene.embeddings
        text = self._molmo._runtime.embed(ids[max(0, self._kept - len(image)) :])
        return np.concatenate([image[self._kept :], text])

    @property
    def _context(self) -> int:
        return self._molmo.config.decoder.max_position_embeddings
