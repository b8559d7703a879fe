"""One model behind one server: what all endpoints share."""

from __future__ import annotations

import asyncio
import time

from starlette.requests import Request

from molmo_edge.molmo import Molmo
from molmo_edge.server.answers import Answerer, Ask
from molmo_edge.server.conversation import Conversation
from molmo_edge.server.errors import ApiError, bad_request
from molmo_edge.server.metrics import Metrics
from molmo_edge.server.pictures import PictureReader
from molmo_edge.server.places import Places
from molmo_edge.server.queue import ModelQueue
from molmo_edge.server.running import Running
from molmo_edge.server.scenes import SceneCache
from molmo_edge.server.settings import Settings

# More than any ordinary text has. Text beyond it is not tokenized, which nothing could interrupt.
_CHARS_PER_POSITION = 16


class Service:
    """A model, its queue, its scenes and its metrics."""

    def __init__(self, molmo: Molmo, settings: Settings, pictures: PictureReader | None = None) -> None:
        """`pictures`: reads images; None: as `settings` say."""
        self.settings = settings
        self.started = int(time.time())
        self.metrics = Metrics()
        self.scenes = SceneCache(settings.scene_bytes)
        self.answerer = Answerer(molmo, self.scenes, self.metrics)
        self.queue = ModelQueue()
        self.places = Places(settings.max_queue)
        self.pictures = pictures or PictureReader(settings)
        self.draining = False
        self.metrics.watch(
            "molmo_edge_places_taken", "Requests that are waiting or answered.", lambda: self.places.taken
        )
        self.metrics.watch("molmo_edge_waiting", "Requests that wait for the model.", lambda: self.queue.waiting)
        self.metrics.watch("molmo_edge_running", "1 while the model works.", lambda: self.queue.running)
        self.metrics.watch("molmo_edge_scene_bytes", "Memory of the cached scenes.", lambda: self.scenes.bytes)
        self.metrics.watch(
            "molmo_edge_conversation_bytes", "Memory of the kept conversations.", lambda: self.scenes.turn_bytes
        )
        self.metrics.watch("molmo_edge_conversation_entries", "Kept conversations.", lambda: self.scenes.conversations)
        self.metrics.watch("molmo_edge_scene_entries", "Cached scenes.", lambda: len(self.scenes))

    @property
    def model(self) -> str:
        """The name of the model."""
        return self.answerer.model

    async def read(self, conversation: Conversation, param: str, **sampling: object) -> Ask:
        """The question of a conversation, with its pictures. `sampling`: fields of Ask; None leaves the default.

        Raises ApiError for text that is certainly too long for the model, and for images.
        """
        most = self.answerer.molmo.engine.context * _CHARS_PER_POSITION
        if (characters := conversation.characters) > most:
            raise bad_request(
                f"the conversation has {characters} characters of text, at most {most} are accepted", param
            )
        reading = self.pictures.read(list(conversation.images), param)
        try:
            pictures = await asyncio.wait_for(reading, self.settings.timeout)
        except asyncio.TimeoutError:
            raise ApiError(504, "the images did not arrive in time", param=param, code="timeout") from None
        given = {name: value for name, value in sampling.items() if value is not None}
        return Ask(
            conversation.question,
            pictures,
            conversation.history,
            overview_only=conversation.low_detail,
            **given,  # type: ignore[arg-type]
        )

    async def start(self, request: Request, ask: Ask) -> Running:
        """Queue `ask` and wait for the beginning of its answer. Raises ApiError."""
        self.answerer.check(ask)
        ticket = self.queue.submit(lambda ticket: self.answerer.run(ask, ticket))
        running = Running(ticket, request, self.settings.timeout)
        await running.begin()
        return running

    async def drain(self) -> None:
        """Refuse new requests; after `settings.drain` seconds, end those that still run."""
        self.draining = True
        await asyncio.sleep(self.settings.drain)
        self.close()

    def close(self) -> None:
        """End all answers."""
        self.draining = True
        self.queue.close(stopping())


def stopping() -> ApiError:
    """The error of a request that comes too late."""
    return ApiError(503, "the server is stopping", code="stopping", retry_after=5)
