"""Answers for asyncio, which never block the event loop."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, TypedDict, TypeVar

from molmo_edge.answer import Answer
from molmo_edge.sdk.async_worker import Worker
from molmo_edge.sdk.process_bound import NotCopied
from molmo_edge.sdk.streaming import Stream

if TYPE_CHECKING:
    from molmo_edge.frontend.points import Point
    from molmo_edge.sdk.answer_form import Schema

_T = TypeVar("_T")


class SamplingKeywords(TypedDict, total=False):
    """The keywords of `Molmo.ask_batch` that choose tokens."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None


class FormKeywords(TypedDict, total=False):
    """The keywords that constrain an answer."""

    schema: Schema | None
    regex: str | None
    choices: Sequence[str] | None


class TurnKeywords(SamplingKeywords, FormKeywords, total=False):
    """The keywords of `Chat.ask`."""

    timeout: float | None
    trim: bool | None


class PointKeywords(SamplingKeywords, total=False):
    """The keywords of `Molmo.point`."""

    history: Sequence[tuple[str, str]]
    timeout: float | None


class AskKeywords(PointKeywords, FormKeywords, total=False):
    """The keywords of `Molmo.ask`."""


class AsyncStream(AsyncIterator["str | Point"], NotCopied):
    """The pieces of an answer, as `Molmo.stream_async` returns them: `async for piece in stream`. See `Stream`.

    If the task that waits for a piece is cancelled, the token that is being generated is the last one.
    """

    _instead = "pass its answer on"

    def __init__(self, worker: Worker, begin: Callable[[], Stream]) -> None:
        """`begin`: makes the stream, in a thread of `worker`, when the first piece is awaited."""
        self._worker, self._begin = worker, begin
        self._stream: Stream | None = None
        self._closed = threading.Event()

    async def __anext__(self) -> str | Point:
        piece = await self._run(lambda: next(self._begun(), None))
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def answer(self) -> Answer:
        """Return the complete answer. Generates the pieces that have not been iterated over yet."""
        return await self._run(lambda: self._begun().answer)

    async def aclose(self) -> None:
        """Stop generating; the token that is being generated is the last one."""
        self._close()

    def _begun(self) -> Stream:
        if self._stream is None:
            self._stream = self._begin()
        if self._closed.is_set():  # perhaps while it began
            self._stream.close()
        return self._stream

    async def _run(self, job: Callable[[], _T]) -> _T:
        try:
            return await self._worker.run(job)
        except BaseException:  # cancelled, or the stream failed
            self._close()
            raise

    def _close(self) -> None:
        self._closed.set()
        if self._stream is not None:
            self._stream.close()
