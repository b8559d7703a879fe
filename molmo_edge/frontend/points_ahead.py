"""The text that the grammar of points makes near-certain while an answer is generated, to be drafted.

In `<points x1="10.5" y1="20.0" ... alt="cups">cups</points>` the model chooses the digits, the number of points and the
label, which is usually that of the question. A wrong guess costs time, but never changes an answer: the model verifies
what is drafted.
"""

from __future__ import annotations

import re

from molmo_edge.frontend.totals import after_tag

_COUNTING = "Counting the "  # begins the answer to "How many ... are there?", see format_count
_PERCENT = re.compile(r"[0-9]+\.[0-9]")  # a complete coordinate of Molmo v1
_WHOLE = re.compile(r"0|[1-9][0-9]{1,2}")  # its digits before the point; a single one could have a second
_THOUSANDTHS = re.compile(r"[0-9]{3,4}")  # a coordinate of Molmo2
_FRAME = re.compile(r"[0-9.]+ ")


def text_ahead(text: str, label: str = "", *, coords: bool = False) -> str:
    """What most likely follows `text`, an answer so far; empty where the model has a choice.

    `label`: what the question asks for, if that is known. `coords`: the answer is a Molmo2's.
    """
    said = text.lstrip()
    start = said.rfind("<point")
    if start < 0:
        opening = f"{_COUNTING}<point"
        if said.startswith("Count") and opening.startswith(said):
            return opening[len(said) :]
        return "point" if said.endswith("<") else ""
    tag = _Tag(said[start:], label, counting=said[:start].endswith(_COUNTING))
    try:
        if coords:
            tag.coords()
        else:
            tag.attributes()
    except _Open:
        pass
    return tag.ahead


class _Open(Exception):  # noqa: N818 (not an error)
    """The text ends where the model has a choice, or leaves the grammar."""


class _Tag:
    """Reads a tag that is being generated. After the end of its text, literals are added to `ahead`."""

    def __init__(self, text: str, label: str, *, counting: bool) -> None:
        self.ahead = ""
        self._rest = text  # what is not read yet
        self._label, self._counting = label, counting

    def attributes(self) -> None:
        """Read a tag of Molmo v1."""
        self._literal("<point")
        plural = self._either(' x="', 's x1="') == 1
        count = 1
        while True:
            self._percent()
            self._literal(f'" y{count}="' if plural else '" y="')
            self._percent()
            if not plural or self._either(f'" x{count + 1}="', '" alt="') == 1:
                break
            count += 1
        if not plural:
            self._literal('" alt="')
        label = self._value()
        self._literal(f'">{label}</point{"s" * plural}>')
        self._total(count)

    def coords(self) -> None:
        """Read a tag of Molmo2."""
        self._literal("<points")
        if self._either(' coords="', ' alt="') == 1:
            self._value()
            self._literal('" coords="')
        count = 0
        while True:
            self._frame(first=count == 0)
            count += 1
            self._literal(f"{count} ")
            while True:
                self._thousandths()
                self._literal(" ")
                self._thousandths()
                if more := self._either(f" {count + 1} ", '">', ";"):
                    break
                count += 1
            if more == 1:
                break
        label = self._rest.partition("<")[0] if "<" in self._rest else self._label
        if not label:
            raise _Open
        self._literal(f"{label}</points>")
        self._total(count)

    def _total(self, count: int) -> None:
        if self._counting:
            self._literal(after_tag(count))

    def _literal(self, literal: str) -> None:
        """Read `literal`, or what the text has of it. Raises _Open for another text."""
        if not self._fits(literal):
            raise _Open
        self.ahead += literal[len(self._rest) :]
        self._rest = self._rest[len(literal) :]

    def _either(self, *literals: str) -> int:
        """Read the first of `literals` that fits, the first one at the end of the text; return its index."""
        for index, literal in enumerate(literals):
            if self._fits(literal):
                self._literal(literal)
                return index
        raise _Open

    def _fits(self, literal: str) -> bool:
        return self._rest.startswith(literal) or literal.startswith(self._rest)

    def _percent(self) -> None:
        number = _PERCENT.match(self._rest)
        if number is None:
            if _WHOLE.fullmatch(self._rest):
                self.ahead = "."
            raise _Open
        self._rest = self._rest[number.end() :]

    def _thousandths(self) -> None:
        number = _THOUSANDTHS.match(self._rest)
        if number is None:
            raise _Open
        self._rest = self._rest[number.end() :]

    def _frame(self, *, first: bool) -> None:
        """The number of an image, or a time. The first is most likely image 1."""
        if first and "1 ".startswith(self._rest):
            self._literal("1 ")
        elif number := _FRAME.match(self._rest):
            self._rest = self._rest[number.end() :]
        else:
            raise _Open

    def _value(self) -> str:
        """The value of an attribute up to its closing quote, the label at the end of the text."""
        if '"' in self._rest:
            value, _, _ = self._rest.partition('"')
            self._rest = self._rest[len(value) :]
            return value
        if not self._label.startswith(self._rest) or not self._label:
            raise _Open
        self.ahead += self._label[len(self._rest) :]
        self._rest = ""
        return self._label
