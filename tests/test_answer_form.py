"""Constrained answers: whatever the model would say, the text matches the schema, regex or choices, on every engine."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from molmo_edge import Molmo, MolmoEdgeError
from molmo_edge.molmo import QuestionError
from molmo_edge.runtimes.generate import GenerationError
from molmo_edge.sdk.closed_schema import closed_schema

pytest.importorskip("llguidance")
pytest.importorskip("torch")
jsonschema = pytest.importorskip("jsonschema")
pydantic = pytest.importorskip("pydantic")

TESTS = Path(__file__).parent
PHOTO = TESTS / "golden" / "coffee.png"
OTHER = TESTS / "golden" / "text.png"
MODELS = ("nano", "qwen", "olmo", "molmo2_qwen3", "molmo_point", "gguf")
SHORT = {"type": "string", "maxLength": 4}
SCHEMAS: dict[str, Any] = {
    "boolean": {"type": "boolean"},
    "null or integer": {"type": ["null", "integer"], "minimum": 0, "maximum": 99},
    "number": {"type": "number", "minimum": -1, "maximum": 1, "multipleOf": 0.25},
    "enumeration": {"enum": ["red", "dark blue", 3, None]},
    "constant": {"const": {"a": [1, "é 😀"]}},
    "short text": {**SHORT, "minLength": 1},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "date": {"type": "string", "format": "date"},
    "list": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 2, "maxItems": 3},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "boolean"}, {"enum": ["x"]}],
        "items": False,
        "minItems": 2,
    },
    "object": {"type": "object", "properties": {"n": {"enum": [1, 2]}, "s": SHORT}, "required": ["n"]},
    "choice of objects": {
        "anyOf": [
            {"type": "object", "properties": {"cat": {"type": "boolean"}}, "required": ["cat"]},
            {"type": "object", "properties": {"dog": SHORT}, "required": ["dog"]},
        ]
    },
    "reference": {
        "type": "object",
        "properties": {"box": {"$ref": "#/$defs/box"}},
        "required": ["box"],
        "$defs": {
            "box": {
                "type": "object",
                "properties": {"w": {"enum": [1]}, "h": {"enum": [2, 3]}},
                "required": ["w", "h"],
            }
        },
    },
}


class Cup(pydantic.BaseModel):  # type: ignore[misc, name-defined]
    color: Literal["red", "white"]
    count: int = pydantic.Field(ge=0, le=20)


@functools.cache
def molmo(name: str) -> Molmo:
    """A model with one crop; the tests share it."""
    options: dict[str, Any] = {"device": "cpu", "threads": 1, "max_crops": 1}
    if name == "nano":
        return Molmo(**options)
    if name == "gguf":
        pytest.importorskip("llama_cpp")
        pytest.importorskip("gguf")
        from exported import EXACT, gguf_bundle

        return Molmo(gguf_bundle("qwen", "f32"), engine_options=EXACT, threads=1, max_crops=1)
    return Molmo(TESTS / ("golden2" if name.startswith("molmo") else "golden") / name, precision="fp32", **options)


@functools.cache
def scene(name: str) -> Any:
    return molmo(name).encode(PHOTO)


@pytest.mark.parametrize("name", MODELS)
def test_json_always_validates(name: str) -> None:
    for what, schema in SCHEMAS.items():
        for sampling in ({}, {"temperature": 1.5, "seed": 1}):
            answer = molmo(name).ask(scene(name), "What is it?", schema=schema, max_new_tokens=60, **sampling)
            assert answer.complete, (what, answer.text)
            assert answer.parsed == json.loads(answer.text)
            jsonschema.validate(answer.parsed, schema)
            assert answer.token_ids
            assert not set(answer.token_ids) & molmo(name).engine.tokenizer.special_ids


@pytest.mark.parametrize("name", MODELS)
def test_regex_and_choices(name: str) -> None:
    ask = functools.partial(molmo(name).ask, scene(name), "What is it?", max_new_tokens=40)
    code = ask(regex="^[a-f]{2,3}: (yes|no) [0-9]\\$$")
    assert re.fullmatch(r"[a-f]{2,3}: (yes|no) [0-9]\$", code.text)
    assert code.parsed == code.text
    choices = ["a cat", "a cat (black)", "naïve 😀", "<im_patch>", "a.c|b\\"]
    drawn = [ask(choices=choices, temperature=50.0, seed=seed) for seed in range(12)]
    assert all(answer.complete and answer.parsed == answer.text and answer.parsed in choices for answer in drawn)
    assert len({answer.text for answer in drawn}) > 1
    tokenizer = molmo(name).engine.tokenizer
    space = "" if tokenizer.special.chat_markup else " "
    for answer in drawn:  # the ids that the tokenizer gives this text, not others with the same letters
        assert list(answer.token_ids) == tokenizer.encode(space + answer.text)
    assert ask(choices=["only this"]).parsed == "only this"


@pytest.mark.parametrize("name", MODELS)
def test_a_form_that_allows_everything_changes_nothing(name: str) -> None:
    tokenizer = molmo(name).engine.tokenizer
    drawn = {"temperature": 0.5, "seed": 2, "top_p": 0.9}
    asked: list[tuple[str, dict[str, Any]]] = [("Point to the cup.", {})]
    if name == "nano":
        asked += [("Point to the cup.", drawn), ("Describe this image.", {}), ("Describe this image.", drawn)]
    whole = 0  # answers of text alone
    for question, sampling in asked:
        free = molmo(name).ask(scene(name), question, max_new_tokens=40, **sampling)
        formed = molmo(name).ask(scene(name), question, max_new_tokens=40, regex="(?s:.*)", **sampling)
        # Models with random weights also generate special tokens and parts of characters, which are no text.
        text = 0
        size = molmo(name).config.decoder.vocab_size  # grounding tokens are above
        for token in free.token_ids:
            if token >= size or token in tokenizer.special_ids or "\ufffd" in tokenizer.decode([token]):
                break
            text += 1
        assert formed.token_ids[:text] == free.token_ids[:text]
        if name == "nano" and text == len(free.token_ids):  # a constrained answer has no grounding tokens
            assert free == formed
            assert formed.parsed == free.text
            whole += 1
        assert free.points or name != "nano" or "Point" not in question
    assert whole >= 2 or name != "nano"


def test_a_text_that_fits_is_kept(saying: Callable[..., Molmo]) -> None:
    said = '{"color": "white", "count": 12}'
    answer = saying(said).ask(PHOTO, "Which cup?", schema=Cup)
    assert answer.parsed == Cup(color="white", count=12)
    assert answer == saying(said).ask(PHOTO, "Which cup?")
    assert answer.to_dict()["parsed"] == {"color": "white", "count": 12}
    assert saying("No").ask(PHOTO, "Which cup?", choices=["Yes", "No"]).parsed == "No"
    assert saying("None of them").ask(PHOTO, "Which cup?", choices=["Yes", "No"]).parsed in ("Yes", "No")


def test_the_limit_on_tokens_leaves_the_text_so_far(saying: Callable[..., Molmo]) -> None:
    said = '{"color": "white", "count": 12}'
    cut = saying(said).ask(PHOTO, "Which cup?", schema=Cup, max_new_tokens=5)
    assert said.startswith(cut.text)
    assert (cut.complete, cut.parsed, "parsed" in cut.to_dict()) == (False, None, False)
    exact = saying(said).ask(PHOTO, "?", schema=Cup).usage.tokens.generated
    last = saying(said).ask(PHOTO, "?", schema=Cup, max_new_tokens=exact)  # complete without EOS
    assert last.complete
    assert last.parsed is not None


def test_a_stream_a_chat_and_a_batch() -> None:
    schema = SCHEMAS["object"]
    model, asked = molmo("nano"), "Which cup?"
    alone = model.ask(scene("nano"), asked, schema=schema)
    stream = model.stream(scene("nano"), asked, schema=schema)
    assert "".join(piece for piece in stream if isinstance(piece, str)) == alone.text
    assert stream.answer.parsed == alone.parsed
    chat = model.chat(scene("nano"))
    assert chat.ask(asked, schema=schema).parsed == alone.parsed
    assert chat.ask("Sure?", choices=["yes", "no"]).parsed in ("yes", "no")
    history = [(asked, alone.text)]
    assert model.ask(scene("nano"), "Sure?", choices=["yes", "no"], history=history).text == chat.answers[1].text
    assert chat.stream("And?", regex="[0-9]{3}").answer.parsed.isdigit()
    assert model.ask_batch([(PHOTO, asked), (OTHER, "?")], schema=schema)[0] == alone


@pytest.mark.parametrize("name", ["qwen", "molmo2_qwen3"])
def test_each_row_of_a_batch_has_its_own_constraint(name: str) -> None:
    asks: list[tuple[Any, str]] = [(PHOTO, "Which?"), (OTHER, "What is written here?"), (PHOTO, "How many cups?")]
    for schema in (SCHEMAS["object"], SCHEMAS["choice of objects"]):
        batch = molmo(name).ask_batch(asks, schema=schema, errors="raise", max_new_tokens=60)
        assert batch == [molmo(name).ask(*ask, schema=schema, max_new_tokens=60) for ask in asks]
        for answer in batch:
            jsonschema.validate(answer.parsed, schema)


@pytest.mark.parametrize("batched", [False, True])
def test_rules_that_a_grammar_cannot_express(batched: bool) -> None:
    class Even(pydantic.BaseModel):  # type: ignore[misc, name-defined]
        n: Literal[1, 3]

        @pydantic.field_validator("n")
        @classmethod
        def even(cls, n: int) -> int:
            raise ValueError(f"n must be even, not {n}")

    model = molmo("qwen" if batched else "nano")
    with pytest.raises(GenerationError, match=r"does not fit its schema: .*must be even"):
        model.ask(PHOTO, "?", schema=Even)
    returned = model.ask_batch([(PHOTO, "?")] * 2, schema=Even)
    assert all(isinstance(answer, GenerationError) for answer in returned)
    with pytest.raises(GenerationError):
        model.ask_batch([(PHOTO, "?")], schema=Even, errors="raise")


INVALID: list[tuple[dict[str, Any], str]] = [
    ({"schema": {"type": "foo"}}, "the schema cannot be used: Invalid type: foo"),
    ({"schema": {"type": "array", "uniqueItems": True}}, "Unimplemented keys"),
    ({"schema": {"$ref": "https://example.com/a.json"}}, "cannot be used"),
    ({"schema": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "two branches of a oneOf can match the same"),
    ({"schema": {"const": float("nan")}}, "not JSON"),
    ({"schema": {"const": object()}}, "not JSON"),
    ({"schema": {"enum": ["\ud800"]}}, "schema"),
    ({"schema": {"$ref": "#"}}, "no text matches"),
    ({"schema": functools.reduce(lambda inner, _: {"items": inner}, range(5000), {})}, "too deeply"),
    ({"schema": 3}, "dict"),
    ({"schema": "{}"}, "dict"),
    ({"regex": "a("}, "the regex cannot be used: unclosed group"),
    ({"regex": "(?=a)"}, "look-around"),
    ({"regex": ""}, "non-empty"),
    ({"regex": "\ud800"}, "Unicode"),
    ({"choices": []}, "choices"),
    ({"choices": "yes"}, "list of texts"),
    ({"choices": ["yes", " no"]}, "without spaces"),
    ({"choices": ["yes", 1]}, "a choice must be"),
    ({"choices": ["\ud800"]}, "Unicode"),
    ({"schema": {}, "regex": "a"}, "schema or regex"),
]


@pytest.mark.parametrize(("form", "message"), INVALID, ids=[str(i) for i in range(len(INVALID))])
def test_invalid_forms_are_refused_before_anything_runs(form: dict[str, Any], message: str) -> None:
    model = molmo("nano")
    for ask in (model.ask, model.stream):
        with pytest.raises(QuestionError, match=re.escape(message)) as refused:
            ask("no such photo", "What?", **form)
        assert "\n" not in str(refused.value)
    with pytest.raises(QuestionError):
        model.ask_batch([(PHOTO, "What?")], **form)


def test_closed_schemas() -> None:
    open_object = {"type": "object", "properties": {"a": {"properties": {"properties": {"type": "null"}}}}}
    closed = closed_schema(open_object)
    assert closed["additionalProperties"] is False
    assert closed["properties"]["a"] == {"properties": {"properties": {"type": "null"}}, "additionalProperties": False}
    assert "additionalProperties" not in open_object
    for kept in (
        {"type": "object"},
        {"properties": {"a": {}}, "additionalProperties": {"type": "null"}},
        {"properties": {"a": {}}, "required": ["b"]},
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"properties": {"a": {}}, "anyOf": [{"required": ["a"]}, {"properties": {"b": {}}}]},
        {"enum": [{"properties": {"a": 1}}]},
    ):
        assert closed_schema(kept) == kept


def test_grounding_ids_are_not_in_json() -> None:
    model = molmo("molmo_point")
    answer = model.ask(scene("molmo_point"), "Point to the cup.", schema={"type": "string", "maxLength": 30})
    assert max(answer.token_ids) < model.config.decoder.vocab_size
    assert answer.points == ()


def test_the_command_line(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    schema = tmp_path / "cup.json"
    schema.write_text(json.dumps(SCHEMAS["object"]))
    rc, out, _ = cli("ask", PHOTO, "Which cup?", "--schema", schema, "--max-crops", 1, "--json")
    assert rc == 0
    jsonschema.validate(json.loads(out)["parsed"], SCHEMAS["object"])
    rc, out, _ = cli("ask", PHOTO, "Is it red?", "--choices", "yes, no", "--max-crops", 1, "-q")
    assert (rc, out.strip() in ("yes", "no")) == (0, True)
    rc, out, _ = cli("ask", PHOTO, "Is it red?", "--regex", "[0-9]{2}", "--max-crops", 1, "-q")
    assert (rc, len(out.strip())) == (0, 2)
    for wrong in (
        ("--schema", tmp_path / "none.json"),
        ("--schema", PHOTO),
        ("--regex", "a", "--choices", "a"),
        ("--regex", "a("),
        ("--choices", "a,,b"),
    ):
        rc, out, problem = cli("ask", PHOTO, "Is it red?", *wrong)
        assert (rc != 0, out) == (True, "")
        assert "Traceback" not in problem
        assert any(word in problem for word in ("JSON", "together", "unclosed", "a choice must be")), problem


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, saying: Callable[..., Molmo]) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MolmoEdgeError, match=r"llguidance: pip install .*\[schema\]"):
        saying("3").ask(np.zeros((40, 40, 3), np.uint8), "How many?", schema={"type": "integer"})
    assert saying("3").ask(np.zeros((40, 40, 3), np.uint8), "How many?", choices=["2", "3"]).parsed == "3"
