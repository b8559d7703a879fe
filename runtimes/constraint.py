"""Constraints on the ids of an answer: the protocol that `generate` uses, and the constraint to one of several texts.

Those to JSON schemas and regular expressions are in molmo_edge.runtimes.grammar.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from molmo_edge.frontend.tokenizer import Tokenizer


class Constraint(Protocol):
    """Which ids may follow within one answer. `generate` asks before each id, and tells which one it chose."""

    @property
    def complete(self) -> bool:
        """Whether no id can follow."""
        ...

    def masked(self, logits: np.ndarray) -> np.ndarray:
        """`logits` (float [n]), -inf for ids that may not follow. EOS may follow where the answer can end."""
        ...

    def accept(self, token: int) -> None:
        """Advance by an id that may follow."""
        ...

    def copy(self) -> Constraint:
        """Return an independent copy in the same state."""
        ...


class OneOf:
    """A constraint to one of several texts, each with the ids that the tokenizer gives it."""

    def __init__(self, texts: Sequence[Sequence[int]], eos: int) -> None:
        """`texts`: ids of what can still follow, of each text."""
        self._texts, self._eos = texts, eos

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: Tokenizer) -> OneOf:
        """A constraint at the beginning of an answer; in Molmo v1 answers begin with a space."""
        space = answer_space(tokenizer)
        return cls([tokenizer.encode(space + text) for text in texts], tokenizer.special.eos)

    @property
    def complete(self) -> bool:
        """Whether no id can follow."""
        return not any(self._texts)

    def masked(self, logits: np.ndarray) -> np.ndarray:
        """See `Constraint.masked`."""
        allowed = sorted({text[0] if text else self._eos for text in self._texts})
        masked = np.full_like(logits, -np.inf)
        masked[allowed] = logits[allowed]
        return masked

    def accept(self, token: int) -> None:
        """See `Constraint.accept`."""
        self._texts = [text[1:] for text in self._texts if text and text[0] == token]

    def copy(self) -> OneOf:
        """See `Constraint.copy`."""
        return OneOf(self._texts, self._eos)


def answer_space(tokenizer: Tokenizer) -> str:
    """What answers begin with: a prompt of Molmo v1 ends in "Assistant:" without a space, one of Molmo2 in a line."""
    return "" if tokenizer.special.chat_markup else " "
