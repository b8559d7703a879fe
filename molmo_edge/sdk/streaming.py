"""From a question to its answer: text piece by piece, points as they are generated, timings."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from molmo_edge.answer import Answer, Seconds, Tokens, Usage
from molmo_edge.frontend.grounding_tokens import TOKEN
from molmo_edge.frontend.points import Point, StreamParser, parse_count, parse_points
from molmo_edge.frontend.prompts import text_ids
from molmo_edge.frontend.tokenizer import StreamDecoder
from molmo_edge.runtimes.generate import GenerationError, Sampling, generate, most_new_tokens
from molmo_edge.runtimes.grounding import DigitWriter, GroundedParser, GroundingInputs
from molmo_edge.sdk.answer_form import AnswerForm
from molmo_edge.sdk.engine import Engine, QuestionError, Scene, check_text
from molmo_edge.sdk.kept_turns import Turns, TurnStore
from molmo_edge.sdk.process_bound import NotCopied
from molmo_edge.sdk.readable_text import counted
from molmo_edge.system.log import logger

if TYPE_CHECKING:
    from molmo_edge.runtimes.constraint import Constraint
    from molmo_edge.runtimes.drafting import Drafts
    from molmo_edge.runtimes.protocol import Cache

History = Sequence[tuple[str, str]]  # earlier turns about the same image: (question, answer as generated)


class AnswerTimeout(GenerationError):  # noqa: N818 (a state, not a mistake)
    """An answer that took longer than `timeout`. `answer` has what was generated until then."""

    def __init__(self, answer: Answer, timeout: float) -> None:
        tokens = len(answer.token_ids)
        super().__init__(f"the answer was not complete after {timeout:g} s, but has {counted(tokens, 'token')}")
        self.answer = answer


class Deadline:
    """The end of the time that an answer may take, from now on."""

    def __init__(self, timeout: float | None) -> None:
        """`timeout`: seconds; None: no limit."""
        self._end = None if timeout is None else time.monotonic() + float(timeout)

    @property
    def passed(self) -> bool:
        """Whether the time is over."""
        return self._end is not None and time.monotonic() >= self._end


class Stream(Iterator["str | Point"], NotCopied):
    """The pieces of an answer, as `Molmo.stream` returns them. Iterate over them, then read `answer`.

    A piece is a `str`, or a `Point` as soon as its coordinates are complete. The str pieces, joined, are `answer.text`
    with its point tags (`molmo_edge.sdk.readable_text.TagStripper` removes them from a stream). The points are
    `answer.points`, in the same order, but their `label` is empty: it follows the coordinates in the text. A Molmo2's
    tag that is cut off or malformed has no points in `answer.points`; the stream has yielded those that were complete.
    """

    _instead = "pass its `answer` on"

    def __init__(self, pieces: Generator[str | Point, None, None], result: list[Answer]) -> None:
        """`pieces` may contain empty texts, one for each token that completes no text; they are not passed on."""
        self._pieces = pieces
        self._result = result
        self._closed = False

    def __next__(self) -> str | Point:
        while not self._closed:
            try:
                piece = next(self._pieces)
            except ValueError:  # `close` is just ending the generator in another thread
                if self._closed:
                    break
                raise
            if piece != "":
                return piece
        self.close()
        raise StopIteration

    def close(self) -> None:
        """Stop generating and free the cache of this answer; any thread may call this at any time.

        If another thread waits for a piece, the token that is being generated is the last one. Later pieces and, unless
        it was complete, `answer` are not available.
        """
        self._closed = True
        with contextlib.suppress(ValueError):  # another thread runs the generator, and closes it after this token
            self._pieces.close()

    @property
    def answer(self) -> Answer:
        """The complete answer. Generates the pieces that have not been iterated over yet."""
        for _ in self:
            pass
        if self._result:
            return self._result[0]
        how = "was closed" if self._closed else "failed"
        raise GenerationError(f"this stream {how} before its answer was complete: ask again")


@dataclass
class Generated:
    """The ids and text of an answer, which `generate_pieces` fills in."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    points: list[Point] = field(default_factory=list)
    prefill: float = 0.0  # seconds to the first id
    decode: float = 0.0  # seconds from there to the end, without the time between pieces
    timed_out: bool = False  # ended before the model did
    ended: bool = False  # by a constraint that allows nothing more
    drafted: int = 0  # ids that were drafted and accepted


def stream_answer(
    engine: Engine,
    image: Any,
    question: str,
    sampling: Sampling,
    history: History = (),
    form: AnswerForm | None = None,
    turns: TurnStore | None = None,
) -> Stream:
    """See `Molmo.stream`. `form`: of the answer; None: free text. `turns`: kept of the scene; None: keep none."""
    check_text(question)
    deadline = Deadline(sampling.timeout)
    before = checked_history(history)
    scene = engine.scene(image, len(conversation_ids(engine, before, question)))
    ids = conversation_ids(engine, before, question, scene.grounding)
    most = most_new_tokens(sampling, scene.end + len(ids), engine.context)
    result: list[Answer] = []
    pieces = _answer(
        scene, question, ids, sampling, most, deadline, form, turns, encoded_before=scene is image, result=result
    )
    return Stream(pieces, result)


def _answer(
    scene: Scene,
    question: str,
    ids: np.ndarray,
    sampling: Sampling,
    most: int,
    deadline: Deadline,
    form: AnswerForm | None,
    turns: TurnStore | None,
    *,
    encoded_before: bool,
    result: list[Answer],
) -> Generator[str | Point, None, None]:
    began = time.perf_counter()
    engine = scene.engine
    capacity = len(scene.embeddings) + len(ids) + most - 1
    earlier = None if turns is None else turns.take(ids, capacity)
    embeddings = engine.runtime.embed(ids if earlier is None else ids[len(earlier.ids) :])  # [n, d_model]
    if earlier is not None:
        cache = earlier.cache
    elif (kept := scene.prefilled) is not None:
        cache = kept.copy(max(capacity, kept.capacity))
    else:
        cache = engine.new_cache(scene, capacity)
        embeddings = np.concatenate([scene.embeddings, embeddings])
    image = scene.image_flags(len(ids))[-len(embeddings) :]
    generated = Generated()
    pieces = generate_pieces(
        engine,
        embeddings,
        image,
        cache,
        sampling,
        capacity=capacity,
        began=began,
        scene=scene,
        deadline=deadline,
        constraint=None if form is None else form.begin(),
        generated=generated,
        drafts=engine.drafts(question),
    )
    try:
        yield from pieces
    except GeneratorExit:  # a stop sequence, or a client that is gone
        _keep(turns, scene, ids, generated, cache)
        raise
    _keep(turns, scene, ids, generated, cache)
    answer = finished(
        scene, generated, len(ids), most, encoded_before=encoded_before, prefilled=len(embeddings), form=form
    )
    check_in_time(generated, answer, sampling)
    result.append(answer)


def _keep(turns: TurnStore | None, scene: Scene, ids: np.ndarray, generated: Generated, cache: Cache) -> None:
    """Put into `turns` what `cache` holds after `scene`: `ids` and the tokens of the answer that have run."""
    if turns is not None and (filled := cache.length - len(scene.embeddings)) > 0:
        turns.put(Turns(np.append(ids, np.array(generated.token_ids, ids.dtype))[:filled], cache))


def generate_pieces(
    engine: Engine,
    embeddings: np.ndarray,
    image: np.ndarray,
    cache: Cache,
    sampling: Sampling,
    *,
    capacity: int,
    began: float,
    scene: Scene,
    deadline: Deadline,
    constraint: Constraint | None = None,
    generated: Generated | None = None,
    drafts: Drafts | None = None,
) -> Generator[str | Point, None, Generated]:
    """Append `embeddings` (float32 [n, d_model]) to `cache` and yield the pieces of the answer, see `Stream.__init__`.

    `image`: bool [n], which of them are image tokens. `capacity`: positions of `cache` that may be filled. `began`:
    time.perf_counter() when the prefill began. `scene`: what the answer is about. `deadline`: checked before the
    prefill and after each token; afterwards the answer ends as if it was cut off. `constraint`: at its beginning.
    `generated`: filled in and returned; None: a new one. `drafts`: see `generate`.
    """
    decoder, grounding = StreamDecoder(engine.tokenizer), scene.grounding
    parser: StreamParser | GroundedParser
    video = scene.shown.times is not None
    parser = StreamParser(video=video) if grounding is None else GroundedParser(grounding)
    writer = DigitWriter(grounding) if grounding is not None and grounding.writes_digits else None
    generated = Generated() if generated is None else generated
    raw: list[str] = []  # the text with its grounding tokens
    steps: list[float] = []  # seconds to each id and to the end
    tokens = generate(
        engine.runtime,
        embeddings,
        cache,
        sampling,
        eos_id=engine.tokenizer.special.eos,
        vocab_size=engine.config.decoder.vocab_size,
        capacity=capacity,
        image=image,
        grounding=grounding,
        constraint=constraint,
        drafts=drafts,
    )
    try:
        while True:
            generated.timed_out = deadline.passed
            token = None if generated.timed_out else next(tokens, None)
            steps.append(time.perf_counter() - began)
            if token is not None:
                generated.token_ids.append(token)
            if grounding is not None and token is not None and token >= grounding.token_ids.first:
                piece = decoder.flush() + grounding.token_ids.token(token)
            else:
                piece = decoder.flush() if token is None else decoder.feed(token)
            raw.append(piece)
            completed = parser.feed(piece) + (parser.close() if token is None else [])
            if writer is not None:
                piece = writer.feed(piece) + (writer.close() if token is None else "")
            if not generated.text:
                piece = piece.lstrip()  # the prompt ends in "Assistant:", so every answer begins with a space
            generated.text += piece
            yield piece  # empty if the token completes no text: `Stream` can stop after each token
            yield from completed
            if token is None:
                break
            began = time.perf_counter()
    finally:
        tokens.close()  # the cache then holds no more than the ids that were yielded
    text = "".join(raw)
    generated.points = parse_points(text, video=video) if grounding is None else grounding.points(text)
    generated.prefill, generated.decode = steps[0], sum(steps[1:])
    generated.ended = constraint is not None and constraint.complete
    generated.drafted = 0 if drafts is None else drafts.accepted
    return generated


def check_in_time(generated: Generated, answer: Answer, sampling: Sampling) -> None:
    """Raise AnswerTimeout if the time of `answer` ended before it was complete."""
    if generated.timed_out and sampling.timeout is not None:
        raise AnswerTimeout(answer, sampling.timeout)


def finished(
    scene: Scene,
    generated: Generated,
    prompt: int,
    most: int,
    *,
    encoded_before: bool = True,
    prefilled: int | None = None,
    form: AnswerForm | None = None,
) -> Answer:
    """Return the answer about `scene`.

    `prompt`: positions after the image. `most`: the limit on new tokens. `encoded_before`: leave encoding out of the
    times. `prefilled`: positions that the decoder ran, if not all of image and prompt. Raises the error of
    `AnswerForm.parse` for a complete text.
    """
    engine = scene.engine
    seconds = Seconds(load=engine.load_seconds, prefill=generated.prefill, decode=generated.decode)
    if not encoded_before:
        spent = scene.seconds
        total = generated.prefill + spent.prefill
        seconds = dataclasses.replace(seconds, preprocess=spent.preprocess, vision=spent.vision, prefill=total)
        if prefilled is not None and spent.prefill:  # for the scene cache
            prefilled += len(scene.embeddings)
    stated = parse_count(generated.text)
    image, new = len(scene.embeddings), len(generated.token_ids)
    run = image + prompt if prefilled is None else prefilled
    tokens = Tokens(image, prompt, new, run, scene.dropped, generated.drafted)
    logger.debug(
        "%s: %d crops, %d tokens in, %d of them prefilled, %d out, %.3f s",
        engine.name,
        scene.crops,
        image + prompt,
        tokens.prefilled,
        new,
        seconds.total,
    )
    complete = (generated.ended or new < most) and not generated.timed_out
    return Answer(
        text=generated.text,
        points=tuple(generated.points),
        count=len(generated.points) or None if stated is None else stated,
        token_ids=tuple(generated.token_ids),
        complete=complete,
        usage=Usage(tokens, scene.crops, seconds),
        image=scene.image,
        shown=scene.shown,
        model=engine.name,
        parsed=form.parse(generated.text) if form is not None and complete else None,
    )


def conversation_ids(
    engine: Engine, history: History, question: str, grounding: GroundingInputs | None = None
) -> np.ndarray:
    """Ids of a question after earlier turns, int32 [n]. `grounding`: of their scene, see `said_before`."""
    turns = [text for asked, answer in history for text in (asked, said_before(engine, answer, grounding))]
    return text_ids(engine.tokenizer, [*turns, question])


def said_before(engine: Engine, answer: str, grounding: GroundingInputs | None) -> str:
    """The text of an earlier answer in a prompt.

    Grounding tokens have no meaning in a later prompt: an answer with them becomes text with coordinates. `grounding`:
    of the scene; without one, the tokens are left out.
    """
    if engine.config.point_head is None:
        return answer
    return TOKEN.sub("", answer) if grounding is None else grounding.with_coordinates(answer)


def checked_history(history: History) -> list[tuple[str, str]]:
    """Return the turns of `history`. Raises QuestionError for anything else."""
    expected = "history must be a list of (question, answer) pairs of str"
    if not isinstance(history, (list, tuple)):
        raise QuestionError(f"{expected}, not {type(history).__name__}")
    for turn in history:
        # A str of two characters would pass for a pair.
        if not isinstance(turn, (list, tuple)) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise QuestionError(expected)
    return [(question, answer) for question, answer in history]
