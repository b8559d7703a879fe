"""Requests and responses of /v1/responses. Fields that are not listed are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from molmo_edge.server.chat_schema import MAX_MESSAGES, MAX_PARTS, MaxTokens, PointData, Seed, Stop, Temperature, TopP


class InputText(BaseModel):
    """Text: "output_text" in earlier answers."""

    type: Literal["input_text", "output_text"]
    text: str


class InputImage(BaseModel):
    """An image."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class InputMessage(BaseModel):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: (
        str
        | Annotated[
            list[Annotated[InputText | InputImage, Field(discriminator="type")]],
            Field(max_length=MAX_PARTS, fail_fast=True),
        ]
    )


class TextOptions(BaseModel):
    """Options of the text."""

    format: dict[str, Any] | None = None


class ResponsesRequest(BaseModel):
    """A request of /v1/responses. `stop`, `seed` and `top_k` are molmo-edge's own."""

    model: str | None = None
    input: str | Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    tools: list[Any] | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None


class OutputText(BaseModel):
    """The text of an answer; `points` and `count` are molmo-edge's own."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    points: list[PointData]
    count: int | None


class OutputMessage(BaseModel):
    """An answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class InputDetails(BaseModel):
    """Tokens of a prompt."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(BaseModel):
    """Tokens of an answer."""

    reasoning_tokens: int


class ResponsesUsage(BaseModel):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseBody(BaseModel):
    """A response of /v1/responses."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    output: list[OutputMessage]
    usage: ResponsesUsage | None
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    instructions: str | None
    parallel_tool_calls: bool
    tool_choice: str
    tools: list[Any]
    temperature: float | None
    top_p: float | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    store: bool
