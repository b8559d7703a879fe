"""POST /v1/chat/completions, as OpenAI's clients call it.

Points stand beside the text: `choices[0].message.points`. In a stream, `choices[0].delta.points` has each point as soon
as its numbers are known, before its label; `choices[0].points` of the last chunk has all of them with their labels.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from molmo_edge.server.answers import Delta, Finished
from molmo_edge.server.chat_schema import ChatMessage, ChatRequest, ImagePart
from molmo_edge.server.conversation import Message, read_conversation
from molmo_edge.server.errors import ApiError, as_api_error
from molmo_edge.server.queue import Cancelled
from molmo_edge.server.running import Running, event_stream, sse
from molmo_edge.server.service import Service
from molmo_edge.server.unsupported import check_unused, requested_schema

_ORDINARY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "tools": (),
    "functions": (),
    "logit_bias": (),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
}


async def chat_completions(service: Service, body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    check_unused(body.model_dump(include=set(_ORDINARY)), _ORDINARY)
    schema = requested_schema(body.response_format, "response_format")
    ask = await service.read(
        read_conversation([_message(message) for message in body.messages], "messages"),
        "messages",
        max_new_tokens=body.max_completion_tokens or body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        seed=body.seed,
        stop=stop_texts(body.stop),
        schema=schema,
    )
    running = await service.start(request, ask)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.model}
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return event_stream(_chunks(running, head, with_usage))
    answer = await running.finished()
    choice = {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": answer.text,
            "refusal": None,
            "points": answer.points,
            "count": answer.count,
        },
        "finish_reason": _reason(answer),
        "logprobs": None,
    }
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": _usage(answer)})


async def _chunks(running: Running, head: dict[str, Any], with_usage: bool) -> AsyncIterator[str]:
    head = {**head, "object": "chat.completion.chunk"}

    def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None, **more}
        return sse({**head, "choices": [choice], **({"usage": None} if with_usage else {})})

    yield chunk({"role": "assistant", "content": ""})
    try:
        async for event in running.events():
            if isinstance(event, Delta):
                yield chunk({"content": event.text} if event.text else {"points": event.points})
            else:
                yield chunk({}, _reason(event), points=event.points, count=event.count)
                if with_usage:
                    yield sse({**head, "choices": [], "usage": _usage(event)})
    except Cancelled:
        return
    except Exception as error:
        yield sse(as_api_error(error).body())
        return
    yield "data: [DONE]\n\n"


def _reason(answer: Finished) -> str:
    return "stop" if answer.complete else "length"


def _usage(answer: Finished) -> dict[str, Any]:
    used = answer.usage
    return {
        "prompt_tokens": used.prompt,
        "completion_tokens": used.generated,
        "total_tokens": used.prompt + used.generated,
        "prompt_tokens_details": {"cached_tokens": used.cached},
    }


def _message(message: ChatMessage) -> Message:
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return Message(role, message.content)
    images = [part.image_url for part in message.content if isinstance(part, ImagePart)]
    if images and role != "user":
        raise ApiError(400, f"a message of the {role} must not have images", param="messages")
    return Message(
        role,
        "\n".join(part.text for part in message.content if not isinstance(part, ImagePart)),
        tuple(image.url for image in images),
        any(image.detail == "low" for image in images),
    )


def stop_texts(stop: str | list[str] | None) -> tuple[str, ...]:
    """The stop sequences of a request."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())
