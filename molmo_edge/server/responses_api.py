"""POST /v1/responses, as OpenAI's clients call it.

Points stand beside the text: `output[0].content[0].points`. A stream has them in `response.output_text.delta` events
as soon as their numbers are known, without labels; `response.content_part.done` has all of them with labels.
Nothing is stored, so that a request must contain its whole conversation.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from molmo_edge.server.answers import Delta, Finished
from molmo_edge.server.chat_api import stop_texts
from molmo_edge.server.conversation import Message, read_conversation
from molmo_edge.server.errors import ApiError, as_api_error
from molmo_edge.server.queue import Cancelled
from molmo_edge.server.responses_schema import InputImage, InputMessage, ResponsesRequest
from molmo_edge.server.running import Running, event_stream, sse
from molmo_edge.server.service import Service
from molmo_edge.server.unsupported import check_unused, requested_schema

_ORDINARY: dict[str, tuple[Any, ...]] = {
    "tools": (),
    "background": (False,),
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
}


async def responses(service: Service, body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation."""
    check_unused(body.model_dump(include=set(_ORDINARY)), _ORDINARY)
    schema = requested_schema(body.text.format if body.text else None, "text.format")
    given = [Message("user", body.input)] if isinstance(body.input, str) else [_message(m) for m in body.input]
    system = [Message("system", body.instructions)] if body.instructions else []
    ask = await service.read(
        read_conversation([*system, *given], "input"),
        "input",
        max_new_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        seed=body.seed,
        stop=stop_texts(body.stop),
        schema=schema,
    )
    running = await service.start(request, ask)
    frame = _Frame(body, service.model)
    if body.stream:
        return event_stream(_events(running, frame))
    return JSONResponse(frame.response(await running.finished()))


class _Frame:
    """Everything in a response that does not depend on the answer."""

    def __init__(self, body: ResponsesRequest, model: str) -> None:
        self.item = f"msg_{uuid.uuid4().hex}"
        self._fields: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "error": None,
            "instructions": body.instructions,
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "temperature": body.temperature,
            "top_p": body.top_p,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "store": False,
        }

    def begun(self) -> dict[str, Any]:
        """The response before its answer."""
        return {**self._fields, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}

    def failed(self, error: ApiError) -> dict[str, Any]:
        """The response of an answer that failed after its beginning."""
        return {**self.begun(), "status": "failed", "error": {"code": "server_error", "message": error.message}}

    def part(self, text: str = "", points: Any = (), count: int | None = None) -> dict[str, Any]:
        """The content of the answer."""
        return {"type": "output_text", "text": text, "annotations": [], "points": points, "count": count}

    def message(self, status: str, *content: dict[str, Any]) -> dict[str, Any]:
        """The answer."""
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": content}

    def response(self, answer: Finished) -> dict[str, Any]:
        """The response with its answer."""
        status = "completed" if answer.complete else "incomplete"
        used = answer.usage
        return {
            **self._fields,
            "status": status,
            "incomplete_details": None if answer.complete else {"reason": "max_output_tokens"},
            "output": [self.message(status, self.part(answer.text, answer.points, answer.count))],
            "usage": {
                "input_tokens": used.prompt,
                "input_tokens_details": {"cached_tokens": used.cached, "cache_write_tokens": 0},
                "output_tokens": used.generated,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used.prompt + used.generated,
            },
        }


async def _events(running: Running, frame: _Frame) -> AsyncIterator[str]:
    number = -1

    def event(kind: str, **fields: Any) -> str:
        nonlocal number
        number += 1
        return sse({"type": f"response.{kind}", "sequence_number": number, **fields}, f"response.{kind}")

    item = {"output_index": 0, "item_id": frame.item, "content_index": 0}
    yield event("created", response=frame.begun())
    yield event("in_progress", response=frame.begun())
    yield event("output_item.added", output_index=0, item=frame.message("in_progress"))
    yield event("content_part.added", **item, part=frame.part())
    try:
        async for answer in running.events():
            if isinstance(answer, Delta):
                points = {"points": answer.points} if answer.points else {}
                yield event("output_text.delta", **item, delta=answer.text, logprobs=[], **points)
                continue
            whole = frame.response(answer)
            yield event("output_text.done", **item, text=answer.text, logprobs=[])
            yield event("content_part.done", **item, part=whole["output"][0]["content"][0])
            yield event("output_item.done", output_index=0, item=whole["output"][0])
            yield event(whole["status"], response=whole)
    except Cancelled:
        return
    except Exception as error:
        yield event("failed", response=frame.failed(as_api_error(error)))


def _message(message: InputMessage) -> Message:
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return Message(role, message.content)
    images = [part for part in message.content if isinstance(part, InputImage)]
    if images and role != "user":
        raise ApiError(400, f"a message of the {role} must not have images", param="input")
    return Message(
        role,
        "\n".join(part.text for part in message.content if not isinstance(part, InputImage)),
        tuple(image.image_url for image in images),
        any(image.detail == "low" for image in images),
    )
