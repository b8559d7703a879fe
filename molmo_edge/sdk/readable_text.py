"""Answers without point tags, to show to people."""

from __future__ import annotations

import re

_TAG = re.compile(r'<(?:points?|tracks) [^<]*?"\s*/?>|</(?:points?|tracks)>')
_OPENING = ("<point ", "<points ", "<tracks ")
_BEGINNINGS = (*_OPENING, "</point>", "</points>", "</tracks>")


def counted(number: int, noun: str) -> str:
    """ "1 crop", "2 crops"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def readable(text: str) -> str:
    """Replace point tags by their labels: '<point x="1.0" y="2.0" alt="dog">dog</point>' becomes "dog"."""
    strip = TagStripper()
    return strip.feed(text) + strip.close()


class TagStripper:
    """`readable` for streamed text: the results, joined, are `readable` of the joined pieces."""

    def __init__(self) -> None:
        self._held = ""  # "", or text from "<" on that may become a tag

    def feed(self, piece: str) -> str:
        """Return the text that this piece completes."""
        text = self._held + piece
        shown: list[str] = []
        while (start := text.find("<")) >= 0:
            shown.append(text[:start])
            text = text[start:]
            if match := _TAG.match(text):
                text = text[match.end() :]
            elif "<" not in text[1:] and _may_become_tag(text):
                break
            else:
                shown.append("<")
                text = text[1:]
        if start < 0:
            shown.append(text)
            text = ""
        self._held = text
        return "".join(shown)

    def close(self) -> str:
        """Return the text held back: a tag that a truncated answer left unclosed."""
        held, self._held = self._held, ""
        return held


def _may_become_tag(text: str) -> bool:
    return text.startswith(_OPENING) or any(begin.startswith(text) for begin in _BEGINNINGS)
