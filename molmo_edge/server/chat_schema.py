"""Requests and responses of /v1/chat/completions. Fields that are not listed are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# fail_fast on lists: a body of 20 MB must not cause a hundred thousand errors, which take seconds to collect.
MAX_MESSAGES = 1000
MAX_PARTS = 1000  # of one message

Temperature = Annotated[float, Field(ge=0.0, le=2.0, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
MaxTokens = Annotated[int, Field(ge=1, lt=2**31)]
StopText = Annotated[str, Field(min_length=1, max_length=200)]
Stop = StopText | Annotated[list[StopText], Field(max_length=4)]


class Part(BaseModel):
    """Base of the parts of a message."""

    model_config = ConfigDict(extra="ignore")


class TextPart(Part):
    """Text."""

    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    """Where an image is."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(Part):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(BaseModel):
    """A message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: (
        str
        | Annotated[
            list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
            Field(max_length=MAX_PARTS, fail_fast=True),
        ]
    )


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """A request of /v1/chat/completions."""

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    n: int | None = None
    logprobs: bool | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    logit_bias: dict[str, Any] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None


class PointData(BaseModel):
    """A point in an image."""

    x: float = Field(description="Percent of the width, from the left.")
    y: float = Field(description="Percent of the height, from the top.")
    label: str
    pixel: list[float] | None = Field(None, description="[x, y] in pixels of the image.")
    image: int | None = Field(None, description="The number of the image, from 1, where the model names it.")
    time: float | None = Field(None, description="Seconds from the start of a video, where the model names it.")


class PromptDetails(BaseModel):
    """Tokens of a prompt."""

    cached_tokens: int


class ChatUsage(BaseModel):
    """Tokens of a completion."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class AnswerMessage(BaseModel):
    """The message of the model; `points` and `count` are molmo-edge's own."""

    role: Literal["assistant"]
    content: str
    refusal: str | None = None
    points: list[PointData]
    count: int | None


class Choice(BaseModel):
    """An answer."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatCompletion(BaseModel):
    """A response of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage
