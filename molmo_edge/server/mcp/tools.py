"""The tools, as the MCP SDK's server offers them."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import CallToolResult, ToolAnnotations
from pydantic import Field

from molmo_edge.errors import MolmoEdgeError, first_line
from molmo_edge.frontend.prompts import caption_question, count_question, point_question
from molmo_edge.molmo import MAX_NEW_TOKENS, Molmo
from molmo_edge.sdk.engine import check_text
from molmo_edge.server.answers import Answerer, Ask, Finished
from molmo_edge.server.errors import ApiError
from molmo_edge.server.mcp.results import Found, tool_result
from molmo_edge.server.mcp.sources import Sources
from molmo_edge.server.metrics import Metrics
from molmo_edge.server.pictures import Picture
from molmo_edge.server.places import Places
from molmo_edge.server.queue import Cancelled, ModelQueue, Ticket
from molmo_edge.server.scenes import SceneCache
from molmo_edge.system.version import __version__

INSTRUCTIONS = (
    "Looks at images with a vision model on this machine. point and count return coordinates: percent of the image's "
    "size, and pixels of the original image. Ask for one kind of object at a time, in a few words."
)

ImageArgument = Annotated[
    str,
    Field(
        description="The path of an image file (relative paths begin in the server's first allowed folder), a data URI "
        '(data:image/png;base64,...), or "screen" for a screenshot of this machine.'
    ),
]
Objects = Annotated[str, Field(description='The objects, in a few words: "the red cup", "windows".')]
Question = Annotated[str, Field(description="A question about the image.")]
Annotate = Annotated[bool, Field(description="Whether to return the image with the points drawn on it.")]
MaxTokens = Annotated[int, Field(ge=1, le=4096, description="Limit on the length of the answer, in tokens.")]
Result = Annotated[CallToolResult, Found]

MAX_CALLS = 16  # at a time


class Asker:
    """Answers the questions of tools, one after the other, with a model that the first question opens."""

    def __init__(
        self,
        open_model: Callable[[], Molmo],
        sources: Sources,
        *,
        timeout: float = 300.0,
        scene_bytes: int = 10**9,
        max_calls: int = MAX_CALLS,
    ) -> None:
        """`timeout`: seconds to the end of an answer. `scene_bytes`: memory for encoded images that are kept.

        `max_calls`: calls at a time, the running one included; each holds the file of its image.
        """
        self._open, self._sources, self._timeout = open_model, sources, timeout
        self._places = Places(max_calls)
        self._scenes = SceneCache(scene_bytes)
        self._answerer: Answerer | None = None
        self._queue = ModelQueue()

    async def ask(self, image: str, question: Callable[[], str], *, annotate: bool, max_tokens: int) -> CallToolResult:
        """Ask about an image. Raises ToolError. If the task is cancelled, the model stops within one token."""
        try:
            text = question()
            with self._places.take(lambda: self._queue.retry_after):
                data = await asyncio.to_thread(self._sources.read, image)
                picture = Picture(data, hashlib.sha256(data).hexdigest())
                ask = Ask(text, (picture,), max_new_tokens=max_tokens, continues=False)
                answer = await self._answer(ask)
                return await asyncio.to_thread(lambda: tool_result(answer, data, annotate=annotate))
        except ApiError as error:
            raise ToolError(error.message) from error
        except MolmoEdgeError as error:
            raise ToolError(first_line(error)) from error
        except Cancelled:
            raise ToolError("the server is stopping") from None

    async def _answer(self, ask: Ask) -> Finished:
        deadline = time.monotonic() + self._timeout
        ticket = self._queue.submit(lambda ticket: self._run(ask, ticket))
        try:
            while not isinstance(event := await ticket.event(deadline), Finished):
                pass
            return event
        finally:
            ticket.cancel()

    def _run(self, ask: Ask, ticket: Ticket) -> Iterator[Any]:
        if self._answerer is None:
            self._answerer = Answerer(self._open(), self._scenes, Metrics())
        if not ticket.cancelled:
            yield from self._answerer.run(ask, ticket)

    def close(self) -> None:
        """End all answers."""
        self._queue.close(ApiError(503, "the server is stopping"))


def create_mcp_server(asker: Asker) -> MCPServer[Any]:
    """The server with its tools."""
    server: MCPServer[Any] = MCPServer(
        "molmo-edge",
        title="Molmo on this machine",
        instructions=INSTRUCTIONS,
        version=__version__,
        log_level="ERROR",
        subscriptions=False,
    )

    async def point(
        image: ImageArgument, object: Objects, annotate: Annotate = True, max_tokens: MaxTokens = MAX_NEW_TOKENS
    ) -> Result:
        """Find every such object in an image: where is it? Returns a point for each."""
        return await asker.ask(
            image,
            lambda: point_question(check_text(object, "object")),
            annotate=annotate,
            max_tokens=max_tokens,
        )

    async def count(
        image: ImageArgument, object: Objects, annotate: Annotate = True, max_tokens: MaxTokens = MAX_NEW_TOKENS
    ) -> Result:
        """Count such objects in an image. Returns the number and a point for each."""
        return await asker.ask(
            image,
            lambda: count_question(check_text(object, "object")),
            annotate=annotate,
            max_tokens=max_tokens,
        )

    async def ask(
        image: ImageArgument, question: Question, annotate: Annotate = True, max_tokens: MaxTokens = MAX_NEW_TOKENS
    ) -> Result:
        """Answer a question about an image. The answer may contain points."""
        return await asker.ask(image, lambda: check_text(question), annotate=annotate, max_tokens=max_tokens)

    async def caption(image: ImageArgument, max_tokens: MaxTokens = MAX_NEW_TOKENS) -> Result:
        """Describe an image."""
        return await asker.ask(image, caption_question, annotate=True, max_tokens=max_tokens)

    for tool, title in (
        (point, "Point to objects in an image"),
        (count, "Count objects in an image"),
        (ask, "Ask about an image"),
        (caption, "Describe an image"),
    ):
        server.add_tool(
            tool,
            title=title,
            annotations=ToolAnnotations(
                title=title, read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False
            ),
        )
    return server
