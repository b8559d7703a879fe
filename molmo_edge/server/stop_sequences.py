"""End a text at the first of several stop sequences, also while it streams."""

from __future__ import annotations

from collections.abc import Sequence


class StopSequences:
    """Passes text on up to the first stop sequence, which is not part of it.

    Text that may be the beginning of a stop sequence is held back until the next piece decides.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """Return the text that this piece completes; nothing after a stop sequence was found."""
        if self.found:
            return ""
        text = self._held + piece
        at = min((index for stop in self._stops if (index := text.find(stop)) >= 0), default=-1)
        if at >= 0:
            self.found, self._held = True, ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def close(self) -> str:
        """Return the text that is still held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
