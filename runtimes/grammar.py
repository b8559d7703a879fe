"""Constraints on answers by JSON schemas and regular expressions, with llguidance."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.runtimes.constraint import answer_space
from molmo_edge.runtimes.generate import GenerationError

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from molmo_edge.frontend.tokenizer import Tokenizer

# Greedy decoding can repeat whitespace without end, so JSON has at most one space, after a comma or a colon.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


class GrammarError(MolmoEdgeError):
    """A JSON schema or a regular expression that is not valid, or that llguidance does not support."""


class ConstraintFailed(GenerationError):  # noqa: N818 (a state, not a mistake)
    """A grammar that cannot go on within an answer, for example because it is too complex."""


class GrammarConstraint:
    """The state of a grammar within one answer, a `Constraint`."""

    def __init__(self, matcher: LLMatcher) -> None:
        """`matcher`: at the beginning of a valid grammar."""
        self._matcher = matcher

    @property
    def complete(self) -> bool:
        """Whether no text can follow."""
        return bool(self._matcher.is_stopped())

    def masked(self, logits: np.ndarray) -> np.ndarray:
        """`logits` (float [n]), -inf for ids that may not follow. EOS may follow where the text can end."""
        allowed = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) != 0
        self._check()
        count = min(len(allowed), len(logits))
        masked = np.full_like(logits, -np.inf)
        np.copyto(masked[:count], logits[:count], where=allowed[:count])
        return masked

    def accept(self, token: int) -> None:
        """Advance by an id that is allowed. Raises ConstraintFailed for one that is not."""
        self._matcher.consume_token(token)
        self._check()

    def copy(self) -> GrammarConstraint:
        """Return an independent copy in the same state."""
        return GrammarConstraint(self._matcher.deep_copy())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintFailed(f"the constraint on the answer failed: {_reason(self._matcher.get_error())}")


class Grammars:
    """Compiles constraints for the ids of one model. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size`: the ids that can be generated. Raises ModuleNotFoundError without llguidance."""
        from llguidance import LLTokenizer, TokenizerWrapper

        self._tokens = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, vocab_size)))
        self._space = f"{space}?" if (space := answer_space(tokenizer)) else ""

    def json(self, schema: Mapping[str, Any]) -> GrammarConstraint:
        """A constraint to JSON that matches `schema`. Raises GrammarError, also for what is no JSON."""
        try:
            style = {**_JSON_STYLE, **schema.get("x-guidance", {})}
            body = json.dumps({**schema, "x-guidance": style}, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise GrammarError(f"the schema is not JSON: {error}") from None
        return self._constraint(
            lambda space: f"start: {f'/{space}/ ' if space else ''}body\nbody: %json {body}", "schema"
        )

    def regex(self, pattern: str) -> GrammarConstraint:
        """A constraint to text that `pattern`, in the syntax of Rust's regex, matches as a whole. Raises GrammarError.

        Look-around and back references are not supported. The anchors of "^...$" have no effect.
        """
        from llguidance import LLMatcher

        pattern = pattern.removeprefix("^")
        if re.search(r"(?<!\\)(\\\\)*\$$", pattern):  # not an escaped dollar
            pattern = pattern[:-1]
        return self._constraint(lambda space: LLMatcher.grammar_from_regex(f"{space}(?:{pattern})"), "regex")

    def _constraint(self, grammar: Callable[[str], str], what: str) -> GrammarConstraint:
        """`grammar`: with this pattern before it."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens, grammar(""), log_level=0)
        if matcher.is_error():
            raise GrammarError(f"the {what} cannot be used: {_reason(matcher.get_error())}")
        first = matcher.deep_copy()
        if not any(first.compute_logit_bias()) or first.is_error():
            raise GrammarError(f"the {what} cannot be used: no text matches it")
        return GrammarConstraint(LLMatcher(self._tokens, grammar(self._space), log_level=0) if self._space else matcher)


class _Vocabulary:
    """What llguidance needs to know about a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.eos_token_id = tokenizer.special.eos
        self.bos_token_id = tokenizer.special.bos
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = sorted(token for token in tokenizer.special_ids if token < vocab_size)
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _reason(message: str) -> str:
    """An error of llguidance in one line. For a regular expression, the reason follows a picture of the place."""
    named = re.search(r"^error: (.+)$", message, re.MULTILINE)
    line = named[1] if named else (message.strip().splitlines() or ["unknown error"])[0]
    return re.sub(r"^(at \d+\(\d+\): )?(failed to compile JSON schema: )?", "", line)
