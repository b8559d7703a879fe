"""The form that an answer must have: a JSON schema, a regular expression, or one of several texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from molmo_edge.errors import first_line
from molmo_edge.runtimes.constraint import OneOf
from molmo_edge.runtimes.generate import GenerationError
from molmo_edge.runtimes.grammar import GrammarError
from molmo_edge.sdk.closed_schema import closed_schema
from molmo_edge.sdk.engine import Engine, QuestionError
from molmo_edge.sdk.exclusive_branches import ADVICE, with_any_of
from molmo_edge.system.extras import with_extra

if TYPE_CHECKING:
    from molmo_edge.runtimes.constraint import Constraint

Schema = Mapping[str, Any] | type[Any]  # a JSON schema, or a Pydantic model


class AnswerFormError(GenerationError):
    """A complete answer that breaks a rule of its schema which a grammar cannot express."""


@dataclass(frozen=True, eq=False)
class AnswerForm:
    """A compiled constraint, and how the text of an answer becomes `Answer.parsed`."""

    begin: Callable[[], Constraint]  # a constraint at the beginning of an answer
    read: Callable[[str], Any]

    def parse(self, text: str) -> Any:
        """The value of a complete text. Raises AnswerFormError."""
        try:
            return self.read(text)
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise AnswerFormError(f"the answer {text!r} does not fit its schema: {reason}") from error


def answer_form(
    engine: Engine, schema: Schema | None, regex: str | None, choices: Sequence[str] | None
) -> AnswerForm | None:
    """The form of an answer of `engine`; None: free text. See `Molmo.ask`.

    Raises QuestionError for an invalid form or several, and MissingExtra without llguidance.
    """
    given = [name for name, value in (("schema", schema), ("regex", regex), ("choices", choices)) if value is not None]
    if not given:
        return None
    if len(given) > 1:
        raise QuestionError(f"an answer has one form: pass {' or '.join(given)}, not both")
    try:
        constraint, read = with_extra(_compiled, "an answer with a schema, regex or choices")(
            engine, schema, regex, choices
        )
    except GrammarError as error:
        reason = first_line(error)
        raise QuestionError(f"the schema cannot be used: {ADVICE}" if "oneOf" in reason else reason) from None
    except RecursionError:
        raise QuestionError("the schema cannot be used: it is nested too deeply") from None
    return AnswerForm(constraint.copy, read)


def _compiled(
    engine: Engine, schema: Schema | None, regex: str | None, choices: Sequence[str] | None
) -> tuple[Constraint, Callable[[str], Any]]:
    if regex is not None:
        if not isinstance(regex, str) or not regex:
            raise QuestionError(f"regex must be a pattern (a non-empty str), not {regex!r}")
        _check_unicode(regex)
        return engine.grammars.regex(regex), str
    if choices is not None:
        return OneOf.of(_checked(choices), engine.tokenizer), str
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        try:
            described = schema.model_json_schema()
        except Exception as error:  # of Pydantic, for a type without JSON schema
            raise QuestionError(f"{schema.__name__} has no JSON schema: {first_line(error)}") from None
        return engine.grammars.json(closed_schema(with_any_of(described))), schema.model_validate_json
    if not isinstance(schema, Mapping):
        raise QuestionError(f"schema must be a JSON schema (a dict) or a Pydantic model, not {type(schema).__name__}")
    return engine.grammars.json(closed_schema(with_any_of(schema))), json.loads


def _checked(choices: Sequence[str]) -> Sequence[str]:
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise QuestionError(f"choices must be a list of texts, not {choices!r}")
    for choice in choices:
        if not isinstance(choice, str) or not choice or choice != choice.strip():
            raise QuestionError(f"a choice must be a text without spaces around it, not {choice!r}")
        _check_unicode(choice)
    return choices


def _check_unicode(text: str) -> None:
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise QuestionError(f"{text!r} is not valid Unicode text (it has lone surrogates)")
