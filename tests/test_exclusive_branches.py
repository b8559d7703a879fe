"""Unions with a discriminator: oneOf becomes anyOf where both are equal, in the SDK, asynchronously and over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pytest
from serving import chat_body, serving

from molmo_edge import Molmo
from molmo_edge.sdk.exclusive_branches import with_any_of

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")
pydantic = pytest.importorskip("pydantic")


class Cup(pydantic.BaseModel):  # type: ignore[misc, name-defined]
    kind: Literal["cup"] = "cup"  # with a default, JSON schema does not require it
    full: bool


class Plate(pydantic.BaseModel):  # type: ignore[misc, name-defined]
    kind: Literal["plate", "dish"]
    size: Literal[1, 2]


class Bowl(pydantic.BaseModel):  # type: ignore[misc, name-defined]
    kind: Literal["bowl"]
    inside: Tableware | None = None


Flat = Annotated[Cup | Plate, pydantic.Field(discriminator="kind")]
Thing = Annotated[Flat | Bowl, pydantic.Field(discriminator="kind")]


class Tableware(pydantic.BaseModel):  # type: ignore[misc, name-defined]
    thing: Thing


class Table(pydantic.BaseModel):  # type: ignore[misc, name-defined]
    things: list[Thing] = pydantic.Field(min_length=2, max_length=2)


Bowl.model_rebuild()


@pytest.mark.parametrize("model", [Tableware, Table])
def test_a_union_with_a_discriminator_is_a_form(model: Any, saying: Callable[..., Molmo]) -> None:
    molmo = saying('{"thing": {"kind": "plate", "size": 2}}', max_crops=0)
    answer = molmo.ask(molmo.engine.no_image(), "What?", schema=model, max_new_tokens=200)
    assert isinstance(answer.parsed, model)
    jsonschema.validate(json.loads(answer.text), model.model_json_schema())
    if model is Tableware:
        assert answer.parsed == Tableware(thing=Plate(kind="plate", size=2))
    described = molmo.ask(molmo.engine.no_image(), "What?", schema=model.model_json_schema(), max_new_tokens=200)
    assert described.text == answer.text


def test_a_missing_discriminator_cannot_be_answered(saying: Callable[..., Molmo]) -> None:
    molmo = saying('{"thing": {"full": true}}', max_crops=0)
    answer = molmo.ask(molmo.engine.no_image(), "What?", schema=Tableware, max_new_tokens=200)
    assert "kind" in json.loads(answer.text)["thing"]


def test_asynchronous_and_over_http(saying: Callable[..., Molmo]) -> None:
    molmo = saying('{"thing": {"kind": "cup", "full": true}}', max_crops=0)

    async def two() -> list[Any]:
        asks = (molmo.ask_async(molmo.engine.no_image(), f"{i}?", schema=Tableware) for i in range(2))
        return [answer.parsed for answer in await asyncio.gather(*asks)]

    assert asyncio.run(two()) == [Tableware(thing=Cup(full=True))] * 2
    schema = Tableware.model_json_schema()
    with serving(molmo) as server:
        format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        reply = server.send("/v1/chat/completions", chat_body("What?", response_format=format)).json
        assert Tableware.model_validate_json(reply["choices"][0]["message"]["content"]).thing.full
        text = {"format": {"type": "json_schema", "name": "a", "schema": schema}}
        reply = server.send("/v1/responses", {"input": "What?", "text": text}).json
        assert Tableware.model_validate_json(reply["output"][0]["content"][0]["text"]).thing.full
        format["json_schema"]["schema"] = {"oneOf": [{"type": "integer"}, {"minimum": 3}]}  # type: ignore[index]
        refused = server.send("/v1/chat/completions", chat_body("What?", response_format=format))
        assert refused.status == 400
        assert "two branches of a oneOf can match the same value" in refused.json["error"]["message"]


def tagged(value: Any, *, required: bool = True) -> dict[str, Any]:
    return {"type": "object", "properties": {"t": {"const": value}}, "required": ["t"] if required else []}


EXCLUSIVE: list[list[Any]] = [
    [{"type": "integer"}, {"type": ["string", "null"]}],
    [{"const": 1}, {"enum": [2, "1"]}],
    [tagged("a"), tagged("b"), {"type": "null"}],
    [tagged("a", required=False), tagged("b")],
    [{"$ref": "#/$defs/x"}, {"$ref": "#/$defs/y"}],
    [{"anyOf": [tagged("a"), tagged("b")]}, tagged("c")],
]
OVERLAPPING: list[list[Any]] = [
    [{"type": "integer"}, {"type": "number"}],
    [{"const": 1}, {"enum": [2, 1]}],
    [{"const": 1}, {"const": 1.0}],
    [tagged("a"), tagged("a")],
    [tagged("a"), {"type": "object"}],
    [
        {"properties": {"t": {"const": "a"}}, "required": ["t"]},
        {"properties": {"t": {"const": "b"}}, "required": ["t"]},
    ],
    [{"anyOf": [tagged("a"), tagged("b")]}, tagged("b")],
    [{"$ref": "#/$defs/missing"}, tagged("b")],
    [True, {"type": "string"}],
]
VALUES = [1, 1.0, 2, 1.5, "1", "a", None, True, {}, {"t": "a"}, {"t": "b"}, {"t": "c"}, {"t": "d"}, [], {"n": 1}]
DEFINITIONS = {"x": tagged("a"), "y": tagged("b")}


@pytest.mark.parametrize("branches", EXCLUSIVE)
def test_branches_that_exclude_each_other(branches: list[Any]) -> None:
    schema = {"oneOf": branches, "$defs": DEFINITIONS}
    rewritten = with_any_of(schema)
    assert "oneOf" not in rewritten
    one_of, any_of = jsonschema.Draft202012Validator(schema), jsonschema.Draft202012Validator(rewritten)
    for value in VALUES:
        if any_of.is_valid(value):
            assert one_of.is_valid(value)
        elif not isinstance(value, dict) or "t" in value:
            assert not one_of.is_valid(value)


@pytest.mark.parametrize("branches", OVERLAPPING)
def test_other_branches_stay(branches: list[Any]) -> None:
    schema = {"type": "array", "items": {"oneOf": branches}, "$defs": DEFINITIONS}
    assert with_any_of(schema) == schema
