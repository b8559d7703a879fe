"""Parameters of OpenAI's APIs that change the answer: its format, and those that this server cannot honour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from molmo_edge.server.errors import bad_request


def requested_schema(given: Mapping[str, Any] | None, param: str) -> Mapping[str, Any] | None:
    """The JSON schema that an output format demands; None for text. Raises ApiError for an unknown format.

    Chat completions have the schema in `json_schema.schema`, responses in `schema`.
    """
    kind = "text" if given is None else given.get("type", "text")
    if given is None or kind in (None, "text"):
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        message = f"{param} {str(kind)[:40]!r} is not supported: use text, json_object or json_schema"
        raise bad_request(message, param, "unsupported_parameter")
    named = given.get("json_schema", given)
    schema = named.get("schema") if isinstance(named, Mapping) else None
    if not isinstance(schema, Mapping):
        raise bad_request(f"{param} has no schema, which is an object", param)
    return schema


def check_unused(given: Mapping[str, Any], ordinary: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse parameters that have another value than None, empty, or one of `ordinary[name]`."""
    for name, values in ordinary.items():
        value = given.get(name)
        if value is not None and value not in values and value not in ([], {}):
            raise bad_request(f"{name} is not supported by this server: leave it out", name, "unsupported_parameter")
