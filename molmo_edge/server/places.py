"""How many requests a server holds at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from molmo_edge.server.errors import ApiError


class Places:
    """Places for requests, from their first byte to the end of their answers. Used on the event loop only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.taken = 0

    @contextlib.contextmanager
    def take(self, retry_after: Callable[[], int]) -> Iterator[None]:
        """Hold a place while the block runs. Raises ApiError if none is free; `retry_after`: seconds to wait."""
        if self.taken >= self._limit:
            raise ApiError(
                429, "the server is busy: try again later", code="server_overloaded", retry_after=retry_after()
            )
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
