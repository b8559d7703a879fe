"""A conversation about images or a video. Keys and values of the image and of earlier turns stay in one cache.

Each turn runs only its own tokens. The model sees the reference's conversation format
(molmo_edge.frontend.prompts), with earlier answers as the ids that were generated.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from molmo_edge.answer import Answer
from molmo_edge.frontend.prompts import text_ids
from molmo_edge.runtimes.generate import GenerationError, Sampling, most_new_tokens
from molmo_edge.runtimes.prompt_embeddings import prefill
from molmo_edge.sdk.answer_form import AnswerForm, Schema, answer_form
from molmo_edge.sdk.async_answers import AsyncStream
from molmo_edge.sdk.engine import MAX_NEW_TOKENS, Engine, Scene, check_text
from molmo_edge.sdk.process_bound import NotCopied
from molmo_edge.sdk.streaming import Deadline, Stream, check_in_time, finished, generate_pieces, said_before
from molmo_edge.system import forks

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from molmo_edge.frontend.points import Point
    from molmo_edge.runtimes.protocol import Cache
    from molmo_edge.sdk.async_answers import TurnKeywords


class ConversationFull(GenerationError):  # noqa: N818 (a state, not a mistake)
    """The next question does not fit into the model's context after image and earlier turns."""


class Chat(NotCopied):
    """A conversation, as `Molmo.chat` returns it. Threads may share it, but only the newest question is answered.

    A turn counts when its answer is complete, or cut off by `max_new_tokens`. A turn whose stream failed, was
    interrupted or was abandoned is forgotten.
    """

    _instead = "pass its image and its `history` on, and ask there"

    def __init__(
        self,
        engine: Engine,
        scene: Scene,
        *,
        room: int = 1024,
        history: Sequence[tuple[str, str]] = (),
        trim: bool = False,
    ) -> None:
        """`scene`: of `engine`; prefilled here if it is not yet. `room`: free positions of a new or larger cache.

        `history`: earlier turns, which run with the first question. `trim`: the default of `ask`.
        """
        self.scene = scene
        self._engine = engine
        self._room = room
        self._lock = threading.Lock()
        self._turn = 0  # the newest; a stream of an older turn stops
        self._trim = trim
        self._answers: list[tuple[str, Answer]] = [(question, Answer(text)) for question, text in history]
        self._ids: np.ndarray = np.zeros(0, np.int32)  # of all turns so far, without the image
        self._cache: Cache | None = None
        self._kept = 0  # leading positions of the cache that hold the image and the first of `_ids`
        forks.on_fork(self)
        if scene.prefilled is None:
            cache = self._make_room(len(scene.embeddings))
            prefill(engine.runtime, scene.embeddings, scene.image_flags(), cache)
            self.scene = scene.ran(cache)
            self._kept = cache.length

    def forked(self) -> None:
        """See molmo_edge.system.forks: a child prefills image and turns again."""
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
        """Positions of the model's context that image and turns take, with those of image tokens left out."""
        return self.scene.end + len(self._ids)

    @property
    def capacity(self) -> int:
        """Positions that fit into the current cache, which grows with the conversation."""
        return 0 if self._cache is None else self._cache.capacity

    @property
    def full(self) -> bool:
        """Whether the context is full, so that no further question fits."""
        return self.positions >= self._engine.context

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
        timeout: float | None = None,
        trim: bool | None = None,
        schema: Schema | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
    ) -> Answer:
        """Ask the next question. `usage.tokens.prefilled` is the number of positions that were run for it.

        `trim`: if question and answer (of `max_new_tokens`) might not fit after the earlier turns, forget the oldest of
        them; None: as the chat was started. A quarter of the context after the image becomes free, because the turns
        that are kept have to run again. Otherwise ConversationFull is raised for a question that does not fit. Raises
        the errors of `Molmo.ask`, too; for the other keywords see there.
        """
        form = answer_form(self._engine, schema, regex, choices)
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, timeout)
        return self._stream(question, sampling, trim, form).answer

    def stream(
        self,
        question: str,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        timeout: float | None = None,
        trim: bool | None = None,
        schema: Schema | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
    ) -> Stream:
        """Like `ask`, piece by piece. The arguments are checked before this returns."""
        form = answer_form(self._engine, schema, regex, choices)
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, timeout)
        return self._stream(question, sampling, trim, form)

    async def ask_async(self, question: str, **options: Unpack[TurnKeywords]) -> Answer:
        """`await` the answer of `ask` without blocking the event loop, see `Molmo.ask_async`."""
        return await self.stream_async(question, **options).answer()

    def stream_async(self, question: str, **options: Unpack[TurnKeywords]) -> AsyncStream:
        """Like `stream`, for `async for`, see `Molmo.stream_async`."""
        return AsyncStream(self._engine.worker, lambda: self.stream(question, **options))

    def _stream(self, question: str, sampling: Sampling, trim: bool | None, form: AnswerForm | None) -> Stream:
        check_text(question)
        deadline, context = Deadline(sampling.timeout), self._engine.context
        with self._lock:
            trimmed = self._to_trim(question, sampling) if (self._trim if trim is None else trim) else 0
            ids = self._turn_ids(question, trimmed)
            filled = self.scene.end + len(ids)
            if len(self._answers) > trimmed and filled > context:
                raise ConversationFull(
                    f"the conversation is full: with this question it has {filled} tokens, and the model's context "
                    f"holds {context}; trim=True forgets the oldest turns, reset() all of them"
                )
            most = most_new_tokens(sampling, filled, context)
            self._turn += 1
            turn = self._turn
        result: list[Answer] = []
        return Stream(self._answer(turn, question, ids, trimmed, sampling, most, deadline, form, result), result)

    def _turn_ids(self, question: str, trimmed: int) -> np.ndarray:
        """The ids of all turns after the first `trimmed`, and of `question`."""
        turns = [turn for asked, answer in self._answers[trimmed:] for turn in (asked, self._said(answer))]
        return text_ids(self._engine.tokenizer, [*turns, question])

    def _to_trim(self, question: str, sampling: Sampling) -> int:
        """How many of the oldest turns to forget, so that the question and a whole answer fit."""
        free = self._engine.context - self.scene.end
        lengths = (len(self._turn_ids(question, trimmed)) for trimmed in range(len(self._answers) + 1))
        need = int(sampling.max_new_tokens) - 1
        if next(lengths) + need <= free:
            return 0
        most = free - max(need, free // 4)
        return next((n for n, length in enumerate(lengths, 1) if length <= most), len(self._answers))

    def _answer(
        self,
        turn: int,
        question: str,
        ids: np.ndarray,
        trimmed: int,
        sampling: Sampling,
        most: int,
        deadline: Deadline,
        form: AnswerForm | None,
        result: list[Answer],
    ) -> Generator[str | Point, None, None]:
        began = time.perf_counter()
        capacity = len(self.scene.embeddings) + len(ids) + most - 1
        with self._lock:
            self._check(turn)
            # Molmo2's template formats an answered turn differently from an unanswered one.
            # After trimming, the ids differ from the first turn on.
            common = min(len(ids) - 1, len(self._ids))
            differ = np.flatnonzero(ids[:common] != self._ids[:common])
            same = int(differ[0]) if len(differ) else common
            self._kept = min(self._kept, len(self.scene.embeddings) + same)
            cache = self._make_room(capacity)
            rows = self._rows(ids)
        image = self.scene.image_flags(len(ids))[-len(rows) :]
        pieces = generate_pieces(
            self._engine,
            rows,
            image,
            cache,
            sampling,
            capacity=capacity,
            began=began,
            scene=self.scene,
            deadline=deadline,
            constraint=None if form is None else form.begin(),
            drafts=self._engine.drafts(question),
        )
        while True:
            with self._lock:  # a newer question must not run on this cache at the same time
                self._check(turn)
                try:
                    piece = next(pieces)
                except StopIteration as end:
                    generated = end.value
                    break
            yield piece
        answer = finished(self.scene, generated, len(ids), most, prefilled=len(rows), form=form)
        check_in_time(generated, answer, sampling)
        with self._lock:
            self._check(turn)
            # In a conversation every answer ends with EOS, also one that was cut off. EOS is not in the cache yet.
            ended = np.array([*generated.token_ids, self._engine.tokenizer.special.eos], np.int32)
            self._ids, self._kept = np.concatenate([ids, ended]), cache.length
            self._answers = [*self._answers[trimmed:], (question, answer)]
        result.append(answer)

    def _said(self, answer: Answer) -> Sequence[int] | str:
        """An earlier answer, as the ids that were generated.

        It is text if it has grounding tokens, or is of an earlier conversation, whose ids are not known.
        """
        grounding, ids = self.scene.grounding, answer.token_ids
        earlier = not ids and answer.text
        if earlier or (grounding is not None and any(token >= grounding.token_ids.first for token in ids)):
            return said_before(self._engine, answer.text, grounding)
        return ids

    def _check(self, turn: int) -> None:
        if turn != self._turn:
            raise GenerationError("this stream has ended: another question was asked in this chat")

    def _make_room(self, capacity: int) -> Cache:
        """Return the cache, cut back to what the conversation keeps, with room for `capacity` positions."""
        source = self.scene.prefilled if self._cache is None else self._cache
        grown = min(capacity + self._room, self._engine.slots(self.scene))
        if source is None:
            self._kept, self._cache = 0, self._engine.new_cache(self.scene, grown)
        elif self._cache is None:  # the scene's own cache is never written to
            self._kept, self._cache = source.length, source.copy(grown)
        self._cache.length = self._kept  # an interrupted answer may have left more
        if self._cache.capacity < capacity:
            self._cache = self._cache.copy(grown)
        return self._cache

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        """Return the embeddings of the image and `ids` that the cache lacks, float32 [n, d_model]."""
        image = self.scene.embeddings
        text = self._engine.runtime.embed(ids[max(0, self._kept - len(image)) :])
        return np.concatenate([image[self._kept :], text])
