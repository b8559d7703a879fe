"""The number in "Counting the ... shows a total of 3.": that of the points before it.

A grounding head chooses the points; the language model writes the number after them, and sometimes another one.
"""

from __future__ import annotations

import re

_BEFORE = " shows a total of "
_BEGUN = re.compile(re.escape(_BEFORE) + r"(?:[0-9]+[.,]?)?")  # "1," may become "1,000"
_TOTAL = re.compile(re.escape(_BEFORE) + r"[0-9]+(?![.,]?[0-9])")


def format_total(tag: str, count: int) -> str:
    """The sentence around the tag of the points that were counted."""
    return f"Counting the {tag}{after_tag(count)}"


def after_tag(count: int) -> str:
    """What follows the tag in `format_total`."""
    return f"{_BEFORE}{count}."


class TotalWriter:
    """Puts the number of a tag's points into the text after it, which arrives in pieces."""

    def __init__(self) -> None:
        self._held, self._points = "", 0
        self._follows = False  # whether the sentence may follow: nothing else came after the last tag

    def tag(self, text: str, points: int) -> str:
        """Add a tag with this many points; return what is complete, with the tag."""
        done = self.close() + text
        self._points, self._follows = points, True
        return done

    def feed(self, text: str) -> str:
        """Add a piece of text; return what is complete."""
        if not self._follows:
            return text
        self._held += text
        if _BEFORE.startswith(self._held) or _BEGUN.fullmatch(self._held):
            return ""
        return self.close()

    def close(self) -> str:
        """End the text; return what is left of it."""
        held, self._held, self._follows = self._held, "", False
        total = _TOTAL.match(held)
        if total is None:
            return held
        return f"{_BEFORE}{self._points}{held[total.end() :]}"
