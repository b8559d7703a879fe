"""Answer a question about pictures: what the endpoints of every API ask, and what they get."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from molmo_edge.errors import EngineError, MolmoEdgeError, first_line
from molmo_edge.frontend.points import Point, parse_count, parse_points
from molmo_edge.molmo import MAX_NEW_TOKENS, Molmo
from molmo_edge.runtimes.grammar import ConstraintFailed
from molmo_edge.sdk.engine import Scene
from molmo_edge.sdk.shown import Shown
from molmo_edge.sdk.streaming import Stream, conversation_ids
from molmo_edge.server.errors import as_api_error, bad_request
from molmo_edge.server.metrics import Metrics
from molmo_edge.server.pictures import Picture
from molmo_edge.server.queue import Ticket
from molmo_edge.server.scenes import SceneCache
from molmo_edge.server.stop_sequences import StopSequences

_ROOM = 512  # free positions in the cache of a scene: more are added when an answer needs them


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
    _overview: Molmo | None = field(default=None, repr=False)

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
            molmo = self._with_crops(ask)
            kept = self._kept(molmo, ask)
            scene = kept or self._encoded(molmo, ask, ticket)
            if scene is None:
                return
            stream = molmo.stream(
                scene,
                ask.question,
                max_new_tokens=ask.max_new_tokens,
                temperature=ask.temperature,
                top_k=ask.top_k,
                top_p=ask.top_p,
                seed=ask.seed,
                history=list(ask.history),
                schema=ask.schema,
            )
        except MemoryError:
            raise EngineError("out of memory while the image was encoded") from None
        except MolmoEdgeError as error:
            raise as_api_error(error) from error
        ticket.on_cancel(stream.close)
        try:
            yield from self._generate(molmo, scene, ask, stream, began, kept=kept is not None)
        except ConstraintFailed as error:  # the schema is too complex
            raise as_api_error(error) from error
        except MolmoEdgeError as error:
            # After the start it is the model that failed, not the request.
            raise EngineError(first_line(error)) from error
        finally:
            stream.close()

    def _generate(
        self, molmo: Molmo, scene: Scene, ask: Ask, stream: Stream, began: float, *, kept: bool
    ) -> Iterator[Delta | Finished]:
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
            tokens = len(molmo.engine.tokenizer.encode(text, allow_special=scene.grounding is not None))
            count, complete = parse_count(text), True
        else:
            answer = stream.answer
            held = stops.close()
            text += held
            if held:
                yield Delta(held)
            points, tokens = answer.points, answer.usage.tokens.generated
            count, complete = answer.count, answer.complete
        usage = self._usage(molmo, scene, ask, tokens, kept=kept)
        self.metrics.answered(usage.prompt, usage.cached, usage.generated)
        count = len(points) or None if count is None else count
        data = tuple(point_data(point, scene.shown) for point in points)
        yield Finished(text, data, count, complete, usage, self.model)

    def _usage(self, molmo: Molmo, scene: Scene, ask: Ask, generated: int, *, kept: bool) -> Usage:
        image = len(scene.embeddings)
        prompt = image + len(conversation_ids(molmo.engine, ask.history, ask.question, scene.grounding))
        return Usage(prompt, image if kept else 0, generated)

    def _with_crops(self, ask: Ask) -> Molmo:
        """The model with its own number of crops, or with the global view only."""
        if not ask.overview_only:
            return self.molmo
        if self._overview is None:
            engine = self.molmo.engine
            self._overview = Molmo.from_parts(
                engine.runtime, engine.tokenizer, max_crops=0, alpha=engine.alpha, name=self.molmo.name
            )
        return self._overview

    def _kept(self, molmo: Molmo, ask: Ask) -> Scene | None:
        """The scene of the pictures from an earlier question, if it is still there."""
        if not ask.pictures:
            return None
        kept = self.scenes.get(_key(molmo, ask))
        self.metrics.scene(found=kept is not None)
        return kept

    def _encoded(self, molmo: Molmo, ask: Ask, ticket: Ticket) -> Scene | None:
        """A new scene of the pictures; None if the ticket was cancelled."""
        if not ask.pictures:
            return molmo.engine.no_image()
        files = [picture.data for picture in ask.pictures]
        scene = molmo.engine.scene(files[0] if len(files) == 1 else files)
        if ticket.cancelled:
            return None
        scene = molmo.engine.prefill(scene, _ROOM)
        self.scenes.put(_key(molmo, ask), scene)
        return scene


def _key(molmo: Molmo, ask: Ask) -> Hashable:
    return (*(picture.digest for picture in ask.pictures), molmo.engine.process.config.max_crops)


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
