"""JSON schemas for generation: objects have only the properties that the schema lists.

By default a JSON schema allows any other property, and a model can add them without end. What matches the closed schema
also matches the original, with one exception: of the branches of a oneOf, exactly one must match, and a value that
matches one closed branch can match several open ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

ONE_SCHEMA = ("items", "additionalProperties")  # keywords whose value is a schema
SEVERAL_SCHEMAS = ("anyOf", "oneOf", "prefixItems")  # a list of schemas
NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")  # schemas by name
# Together with these, the properties of an object are not all in one place.
_COMBINED = ("allOf", "if", "dependentSchemas", "unevaluatedProperties", "$ref", "anyOf", "oneOf")
_OPEN = ("additionalProperties", "patternProperties")  # the schema itself says what it allows


def closed_schema(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """`schema` with additionalProperties false in objects that list properties and do not mention others.

    A schema that combines the properties of several parts is returned unchanged.
    """
    for part in _parts(schema):
        if "allOf" in part or ("properties" in part and any(word in part for word in _COMBINED)):
            return schema
    closed: Mapping[str, Any] = _closed(schema)
    return closed


def _parts(schema: Any) -> Iterator[Mapping[str, Any]]:
    """`schema` and the schemas in it."""
    if not isinstance(schema, Mapping):
        return
    yield schema
    for word, value in schema.items():
        if word in ONE_SCHEMA:
            yield from _parts(value)
        elif word in SEVERAL_SCHEMAS and isinstance(value, list):
            for part in value:
                yield from _parts(part)
        elif word in NAMED_SCHEMAS and isinstance(value, Mapping):
            for part in value.values():
                yield from _parts(part)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    result: dict[str, Any] = {}
    for word, value in schema.items():
        if word in ONE_SCHEMA:
            result[word] = _closed(value)
        elif word in SEVERAL_SCHEMAS and isinstance(value, list):
            result[word] = [_closed(part) for part in value]
        elif word in NAMED_SCHEMAS and isinstance(value, Mapping):
            result[word] = {name: _closed(part) for name, part in value.items()}
        else:
            result[word] = value
    listed, required = schema.get("properties"), schema.get("required", [])
    if isinstance(listed, Mapping) and isinstance(required, list) and not any(word in schema for word in _OPEN):
        missing = [name for name in required if name not in listed]
        if not missing:
            result["additionalProperties"] = False
    return result
