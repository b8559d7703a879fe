"""Answer a question about pictures: what the endpoints of every API ask, and what they get."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from molmo_edge.errors import EngineError, MolmoEdgeError, first_line
from molmo_edge.frontend.points import Point, parse_count, parse_points
from molmo_edge.molmo import MAX_NEW_TOKENS, Molmo
from molmo_edge.runtimes.generate import Sampling
from molmo_edge.runtimes.grammar import ConstraintFailed
from molmo_edge.sdk.answer_form import answer_form
from molmo_edge.sdk.engine import ROOM, Engine, Scene
from molmo_edge.sdk.shown import Shown
from molmo_edge.sdk.streaming import Stream, conversation_ids, stream_answer
from molmo_edge.server.errors import as_api_error, bad_request
from molmo_edge.server.metrics import Metrics
from molmo_edge.server.pictures import Picture
from molmo_edge.server.queue import Ticket
from molmo_edge.server.scenes import SceneCache, SceneTurns
from molmo_edge.server.stop_sequences import StopSequences


@dataclass(frozen=True)
class Ask:
    """A question, ready for the model."""

    question: str
    pictures: tuple[Picture, ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None  # of the JSON that the answer is
    overview_only: bool = False  # use only the global view of each picture ("detail": "low")
    continues: bool = True  # a later question may have this one and its answer in its history


@dataclass(frozen=True)
class Delta:
    """A part of an answer: text, or a point in it, which comes before its label."""

    text: str = ""
    points: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of an answer."""

    prompt: int  # including the image
    cached: int  # of the prompt, those that did not run again
    generated: int


@dataclass(frozen=True)
class Finished:
    """The end of an answer, and the whole of it, with the labels of all points."""

    text: str
    points: tuple[dict[str, Any], ...]
    count: int | None
    complete: bool  # False: cut off by the limit on tokens or by the context
    usage: Usage
    model: str


@dataclass
class Answerer:
    """Runs questions on one model, for `ModelQueue`."""

    molmo: Molmo
    scenes: SceneCache
    metrics: Metrics
    _overview: Engine | None = field(default=None, repr=False)

    @property
    def model(self) -> str:
        """The name of the model."""
        return self.molmo.name or "molmo"

    def check(self, ask: Ask) -> None:
        """Raise ApiError for a question that the model cannot be asked. Cheap: nothing runs."""
        if len(ask.pictures) > 1 and not self.molmo.config.several_images:
            raise bad_request(
                f"the model {self.model} takes one image in a conversation, and this one has {len(ask.pictures)} "
                "different images"
            )

    def run(self, ask: Ask, ticket: Ticket) -> Iterator[Delta | Finished]:
        """The events of an answer. A job of `ModelQueue`."""
        began = time.perf_counter()
        try:
            engine = self._engine(ask)
            sampling = Sampling(ask.max_new_tokens, ask.temperature, ask.top_k, ask.top_p, ask.seed)
            form = answer_form(engine, ask.schema, None, None)
            scene, kept = self._scene(engine, ask, ticket)
            if ticket.cancelled:
                return
            turns = SceneTurns(self.scenes, _key(engine, ask), scene, continued=bool(ask.history))
            stream = stream_answer(
                scene.engine, scene, ask.question, sampling, ask.history, form, turns if ask.continues else None
            )
        except MemoryError:
            raise EngineError("out of memory while the image was encoded") from None
        except MolmoEdgeError as error:
            raise as_api_error(error) from error
        ticket.on_cancel(stream.close)
        try:
            yield from self._generate(ask, stream, began, turns, kept=kept)
        except ConstraintFailed as error:  # the schema is too complex
            raise as_api_error(error) from error
        except MolmoEdgeError as error:
            # After the start it is the model that failed, not the request.
            raise EngineError(first_line(error)) from error
        finally:
            stream.close()

    def _generate(
        self, ask: Ask, stream: Stream, began: float, turns: SceneTurns, *, kept: bool
    ) -> Iterator[Delta | Finished]:
        scene = turns.scene
        stops = StopSequences(ask.stop)
        text, first = "", True
        delivered: list[Point] = []
        for piece in stream:
            if first:
                self.metrics.first_token(time.perf_counter() - began)
                first = False
            if isinstance(piece, Point):
                delivered.append(piece)
                yield Delta(points=(point_data(piece, scene.shown),))
                continue
            shown = stops.feed(piece)
            text += shown
            if shown:
                yield Delta(shown)
            if stops.found:
                break
        points: Sequence[Point]
        if stops.found:
            stream.close()
            # Grounding tokens are no notation that the text alone explains.
            points = parse_points(text) if scene.grounding is None else delivered
            tokens = len(scene.engine.tokenizer.encode(text, allow_special=scene.grounding is not None))
            count, complete = parse_count(text), True
        else:
            answer = stream.answer
            held = stops.close()
            text += held
            if held:
                yield Delta(held)
            points, tokens = answer.points, answer.usage.tokens.generated
            count, complete = answer.count, answer.complete
        usage = _usage(ask, turns, tokens, kept=kept)
        self.metrics.answered(usage.prompt, usage.cached, usage.generated)
        count = len(points) or None if count is None else count
        data = tuple(point_data(point, scene.shown) for point in points)
        yield Finished(text, data, count, complete, usage, self.model)

    def _engine(self, ask: Ask) -> Engine:
        """The model with its own number of crops, or with the global view only."""
        if not ask.overview_only:
            return self.molmo.engine
        if self._overview is None:
            self._overview = self.molmo.engine.with_max_crops(0)
        return self._overview

    def _scene(self, engine: Engine, ask: Ask, ticket: Ticket) -> tuple[Scene, bool]:
        """The scene of the pictures, prefilled unless the ticket is cancelled; and whether that was done before."""
        if not ask.pictures:
            return engine.no_image(), False
        key = _key(engine, ask)
        if (known := self.scenes.get(key)) is not None:
            self.metrics.scene("yes")
            return known, True
        files = [picture.data for picture in ask.pictures]
        scene = engine.scene(files[0] if len(files) == 1 else files)
        on_disk = scene.prefilled is not None and not scene.seconds.vision
        self.metrics.scene("disk" if on_disk else "no")
        if scene.prefilled is None and not ticket.cancelled:
            scene = engine.prefill(scene, ROOM)
        if scene.prefilled is not None:
            self.scenes.put(key, scene)
        return scene, on_disk


def _key(engine: Engine, ask: Ask) -> Hashable:
    return (*(picture.digest for picture in ask.pictures), engine.process.config.max_crops)


def _usage(ask: Ask, turns: SceneTurns, generated: int, *, kept: bool) -> Usage:
    scene, image = turns.scene, len(turns.scene.embeddings)
    prompt = image + len(conversation_ids(scene.engine, ask.history, ask.question, scene.grounding))
    return Usage(prompt, image + turns.found if kept or turns.found else 0, generated)


def point_data(point: Point, shown: Shown) -> dict[str, Any]:
    """A point for JSON, as in `Answer.to_dict`: x and y in percent, its label, and `pixel` in pixels of its image.

    `image` (from 1) and `time` are there where the model names them. `shown`: the images of the prompt.
    """
    data: dict[str, Any] = {"x": point.x, "y": point.y, "label": point.label}
    if point.image is not None:
        data["image"] = point.image
    if point.time is not None:
        data["time"] = point.time
    if (index := shown.index_of(point)) is not None:
        height, width = shown.size_of(index)
        data["pixel"] = [round(value, 1) for value in point.pixel(width, height)]
    return data
