"""POST /v1/point, /v1/count, /v1/caption and /v1/query, as moondream's clients call them.

Coordinates are fractions of the image's width and height (0 to 1), as moondream's. A stream consists of events
{"chunk": "..."} and ends with {"completed": true, ...} and the fields of the whole response.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from molmo_edge.frontend.prompts import caption_question, count_question, point_question
from molmo_edge.sdk.engine import check_text
from molmo_edge.sdk.readable_text import TagStripper, readable
from molmo_edge.server.answers import Delta, Finished
from molmo_edge.server.chat_schema import MaxTokens, Temperature, TopP
from molmo_edge.server.conversation import Conversation
from molmo_edge.server.errors import as_api_error
from molmo_edge.server.queue import Cancelled
from molmo_edge.server.running import Running, event_stream, sse
from molmo_edge.server.service import Service
from molmo_edge.server.unsupported import check_unused

_ORDINARY: dict[str, tuple[Any, ...]] = {"spatial_refs": ()}


class VerbSettings(BaseModel):
    """How an answer is sampled."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    max_tokens: MaxTokens | None = None


class ImageRequest(BaseModel):
    """What all requests have. Other fields are ignored."""

    model: str | None = None
    settings: VerbSettings | None = None
    stream: bool | None = None


class ObjectRequest(ImageRequest):
    """A request of /v1/point and /v1/count."""

    image_url: str
    object: str
    spatial_refs: list[Any] | None = None


class CaptionRequest(ImageRequest):
    """A request of /v1/caption. `length` is accepted, but Molmo knows one length."""

    image_url: str
    length: Literal["short", "normal", "long"] | None = None


class QueryRequest(ImageRequest):
    """A request of /v1/query. `reasoning` is ignored: Molmo answers at once."""

    image_url: str | None = None
    question: str
    spatial_refs: list[Any] | None = None


class Fraction(BaseModel):
    """A point in fractions of the image's size."""

    x: Annotated[float, Field(ge=0.0, le=1.0)]
    y: Annotated[float, Field(ge=0.0, le=1.0)]


class PointResponse(BaseModel):
    """A response of /v1/point."""

    request_id: str
    points: list[Fraction]
    count: int


class CountResponse(BaseModel):
    """A response of /v1/count. The count is the one that the answer states, else the number of points."""

    request_id: str
    count: int
    points: list[Fraction]


class CaptionResponse(BaseModel):
    """A response of /v1/caption."""

    request_id: str
    caption: str


class QueryResponse(BaseModel):
    """A response of /v1/query. `points` are those in the answer."""

    request_id: str
    answer: str
    points: list[Fraction]


async def point(service: Service, body: ObjectRequest, request: Request) -> Response:
    """Point at every object."""
    question = point_question(check_text(body.object, "object"))
    return await _verb(service, body, body.image_url, question, request, _pointed)


async def count(service: Service, body: ObjectRequest, request: Request) -> Response:
    """Count the objects."""
    question = count_question(check_text(body.object, "object"))
    return await _verb(service, body, body.image_url, question, request, _counted)


async def caption(service: Service, body: CaptionRequest, request: Request) -> Response:
    """Describe the image."""
    return await _verb(service, body, body.image_url, caption_question(), request, _captioned)


async def query(service: Service, body: QueryRequest, request: Request) -> Response:
    """Answer a question."""
    return await _verb(service, body, body.image_url, check_text(body.question), request, _queried)


async def _verb(
    service: Service,
    body: ImageRequest,
    image: str | None,
    question: str,
    request: Request,
    shape: Callable[[Finished], dict[str, Any]],
) -> Response:
    check_unused(body.model_dump(include=set(_ORDINARY)), _ORDINARY)
    given = body.settings or VerbSettings()
    conversation = Conversation(question, (), () if image is None else (image,), low_detail=False)
    ask = await service.read(
        conversation,
        "image_url",
        max_new_tokens=given.max_tokens,
        temperature=given.temperature,
        top_p=given.top_p,
        continues=False,
    )
    running = await service.start(request, ask)
    head = {"request_id": uuid.uuid4().hex}
    if body.stream:
        return event_stream(_chunks(running, head, shape))
    return JSONResponse({**head, **shape(await running.finished())})


async def _chunks(
    running: Running, head: dict[str, Any], shape: Callable[[Finished], dict[str, Any]]
) -> AsyncIterator[str]:
    strip = TagStripper()
    try:
        async for event in running.events():
            if isinstance(event, Delta):
                text = strip.feed(event.text)
                if text:
                    yield sse({"chunk": text})
                continue
            held = strip.close()
            if held:
                yield sse({"chunk": held})
            yield sse({**head, **shape(event), "completed": True})
    except Cancelled:
        return
    except Exception as error:
        yield sse({**as_api_error(error).body(), "completed": True})


def _fractions(answer: Finished) -> list[dict[str, float]]:
    return [{"x": point["x"] / 100, "y": point["y"] / 100} for point in answer.points]


def _pointed(answer: Finished) -> dict[str, Any]:
    return {"points": _fractions(answer), "count": len(answer.points)}


def _counted(answer: Finished) -> dict[str, Any]:
    return {"count": answer.count or 0, "points": _fractions(answer)}


def _captioned(answer: Finished) -> dict[str, Any]:
    return {"caption": readable(answer.text).strip()}


def _queried(answer: Finished) -> dict[str, Any]:
    return {"answer": readable(answer.text).strip(), "points": _fractions(answer)}
