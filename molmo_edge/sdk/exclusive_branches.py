"""JSON schemas whose oneOf is written as anyOf where both mean the same, because grammars know no oneOf.

Of the branches of a oneOf, exactly one must match. Where no value matches two of them, anyOf is equal. That is so for
the unions of Pydantic with a discriminator: a property whose values differ in each branch.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from molmo_edge.sdk.closed_schema import NAMED_SCHEMAS, ONE_SCHEMA, SEVERAL_SCHEMAS

ADVICE = (
    "two branches of a oneOf can match the same value: use anyOf, or give every branch a property with a const or enum "
    "of its own"
)

_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")


def with_any_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """`schema` with anyOf in place of each oneOf whose branches exclude each other.

    The property that tells branches apart becomes required in them, so that a value without it, which could match
    several branches, does not match. Other oneOf stay as they are.
    """
    rewritten: Mapping[str, Any] = _rewritten(schema, schema)
    return rewritten


def _rewritten(part: Any, root: Mapping[str, Any]) -> Any:
    if not isinstance(part, Mapping):
        return part
    result: dict[str, Any] = {}
    for word, value in part.items():
        if word in ONE_SCHEMA:
            result[word] = _rewritten(value, root)
        elif word in SEVERAL_SCHEMAS and isinstance(value, list):
            result[word] = [_rewritten(branch, root) for branch in value]
        elif word in NAMED_SCHEMAS and isinstance(value, Mapping):
            result[word] = {name: _rewritten(inner, root) for name, inner in value.items()}
        else:
            result[word] = value
    branches = result.get("oneOf")
    if isinstance(branches, list) and "anyOf" not in result:
        exclusive = _exclusive(branches, root, result.get("discriminator"))
        if exclusive is not None:
            del result["oneOf"]
            result.pop("discriminator", None)
            result["anyOf"] = exclusive
    return result


def _exclusive(branches: list[Any], root: Mapping[str, Any], discriminator: Any) -> list[Any] | None:
    """`branches` so that no value matches two of them; None if that cannot be told."""
    forms = [_alternatives(branch, root) for branch in branches]
    pairs = [
        (one, other)
        for left, right in itertools.combinations(forms, 2)
        for one, other in itertools.product(left, right)
    ]
    if all(_differ(one, other) for one, other in pairs):
        return branches
    named = discriminator.get("propertyName") if isinstance(discriminator, Mapping) else None
    for name in dict.fromkeys([named, *_property_names(forms)]):
        tags = [[_tag(form, name) for form in each] for each in forms]
        if all(
            one is not None and other is not None and not one & other
            for left, right in itertools.combinations(tags, 2)
            for one, other in itertools.product(left, right)
        ):
            return [{"anyOf": required} if len(required := [_requiring(f, name) for f in each]) > 1 else required[0]
                    for each in forms]  # fmt: skip
    return None


def _alternatives(branch: Any, root: Mapping[str, Any], depth: int = 0) -> list[Mapping[str, Any]]:
    """The schemas of which a value of `branch` matches one; references to definitions are resolved."""
    if depth > 16 or not isinstance(branch, Mapping):
        return [{}]
    reference = branch.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        found: Any = root
        for name in reference[2:].split("/"):
            name = name.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, Mapping) else None
        return _alternatives(found, root, depth + 1)
    for word in ("anyOf", "oneOf"):
        inner = branch.get(word)
        if isinstance(inner, list) and "properties" not in branch:
            return [form for each in inner for form in _alternatives(each, root, depth + 1)]
    return [branch]


def _differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether certainly no value matches both."""
    if not _types(one) & _types(other):
        return True
    values = _values(one), _values(other)
    if values[0] is not None and values[1] is not None:
        return not values[0] & values[1]
    if _types(one) & _types(other) != {"object"}:
        return False
    for name in _required(one) & _required(other):
        tags = _tag(one, name), _tag(other, name)
        if tags[0] is not None and tags[1] is not None and not tags[0] & tags[1]:
            return True
    return False


def _types(schema: Mapping[str, Any]) -> set[str]:
    """The types of matching values; a number that is an integer has both."""
    given = schema.get("type", list(_TYPES))
    types = {given} if isinstance(given, str) else set(given) if isinstance(given, list) else set(_TYPES)
    return types | ({"integer"} if "number" in types else set())


def _values(schema: Any) -> set[str] | None:
    """The values that a const or enum lists, as JSON; None: any other form."""
    if not isinstance(schema, Mapping):
        return None
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(listed, list) or any(isinstance(value, float) for value in listed):  # 1.0 is equal to 1
        return None
    return {json.dumps(value, sort_keys=True) for value in listed}


def _tag(schema: Mapping[str, Any], name: str | None) -> set[str] | None:
    """The values that the property `name` of an object can have; None: others than listed, or no object."""
    properties = schema.get("properties")
    if not isinstance(properties, Mapping) or _types(schema) != {"object"}:
        return None
    return _values(properties.get(name))


def _property_names(forms: list[list[Mapping[str, Any]]]) -> Iterator[str]:
    for form in itertools.chain.from_iterable(forms):
        properties = form.get("properties")
        yield from properties if isinstance(properties, Mapping) else ()


def _required(schema: Mapping[str, Any]) -> set[str]:
    required = schema.get("required", [])
    return {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()


def _requiring(schema: Mapping[str, Any], name: str | None) -> Mapping[str, Any]:
    if name in _required(schema):
        return schema
    return {**schema, "required": [*schema.get("required", []), name]}
