"""From token ids to an answer: text piece by piece, points as their tags close, and the times."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from molmo_edge.answer import Answer, Seconds, Tokens, Usage
from molmo_edge.frontend.points import Point, StreamParser, parse_count
from molmo_edge.frontend.tokenizer import StreamDecoder, Tokenizer
from molmo_edge.runtimes.generate import GenerationError, Sampling, generate
from molmo_edge.sdk.process_bound import NotCopied
from molmo_edge.system.log import logger

if TYPE_CHECKING:
    from molmo_edge.molmo import Scene
    from molmo_edge.runtimes import Cache, Runtime


class Stream(Iterator["str | Point"], NotCopied):
    """What `Molmo.stream` returns: iterate it for the pieces, then read `answer`.

    A piece is a `str`, or a `Point` as soon as its tag closes. The str pieces, joined, are `answer.text`, point
    tags included; `molmo_edge.sdk.readable_text.TagStripper` takes those out as they come. The points are
    `answer.points`.
    """

    _instead = "pass its `answer` on"

    def __init__(self, pieces: Iterator[str | Point], result: list[Answer]) -> None:
        self._pieces = pieces
        self._result = result

    def __next__(self) -> str | Point:
        return next(self._pieces)

    @property
    def answer(self) -> Answer:
        """The whole answer. Generates what has not been iterated yet."""
        for _ in self._pieces:
            pass
        if not self._result:
            raise GenerationError("this stream failed before its answer was complete: ask again")
        return self._result[0]


@dataclass
class Generated:
    """One answer's ids and text. `generate_pieces` fills it in as they come."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    points: list[Point] = field(default_factory=list)
    prefill: float = 0.0  # seconds to the first id
    decode: float = 0.0  # seconds from there to the end, without those that the caller spends on a piece


def generate_pieces(
    runtime: Runtime,
    tokenizer: Tokenizer,
    embeddings: np.ndarray,
    cache: Cache,
    sampling: Sampling,
    *,
    capacity: int,
    began: float,
) -> Generator[str | Point, None, Generated]:
    """Append `embeddings` (float32 [n, d_model]) to `cache` and yield the answer's pieces; see `Stream`.

    `capacity`: positions of `cache` that may be filled. `began`: time.perf_counter() when the prefill's time begins.
    """
    decoder, parser = StreamDecoder(tokenizer), StreamParser()
    found = Generated()
    steps: list[float] = []  # seconds to each id and to the end
    tokens = generate(
        runtime,
        embeddings,
        cache,
        sampling,
        eos_id=tokenizer.special.eos,
        vocab_size=runtime.config.decoder.vocab_size,
        capacity=capacity,
    )
    while True:
        token = next(tokens, None)
        steps.append(time.perf_counter() - began)
        if token is not None:
            found.token_ids.append(token)
        piece = decoder.flush() if token is None else decoder.feed(token)
        if not found.text:
            piece = piece.lstrip()  # the prompt ends in "Assistant:", every answer begins with a space
        found.text += piece
        closed = parser.feed(piece) + (parser.close() if token is None else [])
        found.points += closed
        if piece:
            yield piece
        yield from closed
        if token is None:
            break
        began = time.perf_counter()
    found.prefill, found.decode = steps[0], sum(steps[1:])
    return found


def finished(
    scene: Scene,
    text: str,
    points: Sequence[Point],
    token_ids: Sequence[int],
    prompt: int,
    spent: Seconds,
    *,
    complete: bool,
    prefilled: int | None = None,
) -> Answer:
    """The answer. `prompt`: positions after the image; `prefilled`: positions that were run, None for all of them."""
    stated = parse_count(text)
    image = len(scene.embeddings)
    tokens = Tokens(image, prompt, len(token_ids), image + prompt if prefilled is None else prefilled)
    logger.debug(
        "%s: %d crops, %d tokens in, %d of them run, %d out, %.3f s",
        scene.owner.name,
        scene.crops,
        tokens.image + tokens.prompt,
        tokens.prefilled,
        tokens.generated,
        spent.total,
    )
    return Answer(
        text=text,
        points=tuple(points),
        count=len(points) or None if stated is None else stated,
        token_ids=tuple(token_ids),
        complete=complete,
        usage=Usage(tokens, scene.crops, spent),
        image=scene.image,
        model=scene.owner.name,
    )
