"""Molmo2 through the SDK and the command line: the reference's ids, chats, and points of its own grammar."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from molmo2_golden import GOLDEN2, picture, read, tokenizer_of, turns_of
from PIL import Image

from molmo_edge import Molmo, Point
from molmo_edge.export import CheckPhoto, export_bundle
from molmo_edge.frontend.prompts import text_ids
from molmo_edge.runtimes.prompt_embeddings import prefill

pytest.importorskip("torch")

MODELS = ("molmo2_qwen3", "molmo2_olmo3")
ONE_IMAGE = ("square", "landscape", "wide_text", "tall")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Molmo]:
    """Each model as a checkpoint on PyTorch and as a bundle."""
    directory, models = tmp_path_factory.mktemp("molmo2-sdk"), {}
    for model in MODELS:
        export_bundle(GOLDEN2 / model, directory / model, "fp32")
        models[model, "pytorch"] = Molmo(GOLDEN2 / model, threads=1)
        models[model, "onnx"] = Molmo(directory / model, threads=1)
    return models


@pytest.mark.parametrize("engine", ["pytorch", "onnx"])
@pytest.mark.parametrize("model", MODELS)
def test_answers_are_those_of_the_reference(opened: dict[tuple[str, str], Molmo], model: str, engine: str) -> None:
    molmo, cases = opened[model, engine], read(f"{model}/expected.json")["cases"]
    for name in ONE_IMAGE:
        case = cases[name]
        ids = case["generated_ids"]
        answer = molmo.ask(picture(case["images"][0]), case["question"], max_new_tokens=len(ids))
        assert list(answer.token_ids) == ids, name
        assert answer.usage.tokens.image + answer.usage.tokens.prompt == case["n_tokens"]
    case = cases["chat"]
    first, said, second = turns_of(case)
    answer = molmo.ask(picture(case["images"][0]), second, history=[(first, said)], max_new_tokens=24)
    assert list(answer.token_ids) == case["generated_ids"]


@pytest.mark.parametrize("engine", ["pytorch", "onnx"])
def test_a_chat_gives_the_answers_of_a_whole_prompt(opened: dict[tuple[str, str], Molmo], engine: str) -> None:
    molmo, photo = opened["molmo2_qwen3", engine], picture("coffee.png")
    tokenizer, chat = molmo.engine.tokenizer, molmo.chat(photo)
    turns: list[str | list[int]] = []
    for question in ("What is this?", "And beside it?", "Why?"):
        answer = chat.ask(question, max_new_tokens=6)
        scene = molmo.engine.scene(photo)
        rows = np.concatenate([scene.embeddings, molmo.engine.runtime.embed(text_ids(tokenizer, [*turns, question]))])
        cache = molmo.engine.runtime.new_cache(len(rows) + 6)
        logits, ids = (
            prefill(molmo.engine.runtime, rows, scene.image_flags(len(rows) - len(scene.embeddings)), cache),
            [],
        )
        for _ in answer.token_ids:
            ids.append(int(logits.argmax()))
            logits = molmo.engine.runtime.forward(molmo.engine.runtime.embed(np.array(ids[-1:])), cache)
        assert list(answer.token_ids) == ids
        turns += [question, ids]
    prefilled = chat.answers[-1].usage.tokens.prefilled
    assert prefilled < 80, "the image and the earlier turns but the last answer stay in the cache"


def test_points_of_an_answer(opened: dict[tuple[str, str], Molmo], monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is random, so that its ids are replaced by those of a text."""
    molmo = opened["molmo2_qwen3", "onnx"]
    text = 'There are 2 <points coords="1 1 100 200 2 300 400">cups</points>.'
    ids = tokenizer_of("molmo2_qwen3").encode(text)
    monkeypatch.setattr("molmo_edge.sdk.streaming.generate", lambda *_, **__: (token for token in ids))
    stream = molmo.stream(picture("coffee.png"), "Point to the cups.")
    pieces = list(stream)
    points = (Point(10, 20, "cups", image=1), Point(30, 40, "cups", image=1))
    assert stream.answer.points == points
    assert [piece for piece in pieces if isinstance(piece, Point)] == [replace(point, label="") for point in points]
    assert stream.answer.count == 2
    assert stream.answer.readable == "There are 2 cups."
    assert stream.answer.to_dict()["points"][0] == {
        "x": 10.0,
        "y": 20.0,
        "label": "cups",
        "image": 1,
        "pixel": [60.0, 80.0],
    }


def test_commands(cli: Callable[..., Any], tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(picture("synth_378x378")).save(photo)
    check = CheckPhoto(photo, "Point to the cup.", max_new_tokens=8)
    export_bundle(GOLDEN2 / "molmo2_qwen3", tmp_path / "bundle", "q4", check=check)
    status, out, _ = cli("ask", photo, "What is this?", "--model", tmp_path / "bundle", "--max-new-tokens", 4, "--json")
    assert status == 0
    assert len(json.loads(out)["token_ids"]) == 4
    status, out, _ = cli("verify", tmp_path / "bundle")
    assert status == 0
    status, _, _ = cli(
        "export", GOLDEN2 / "molmo2_qwen3", "--engine", "torch", "--precision", "fp32", "--out", tmp_path / "copy"
    )
    assert status == 0
    assert Molmo(tmp_path / "copy", threads=1).engine.tokenizer.special == tokenizer_of("molmo2_qwen3").special


def test_loss_and_ablation_measure_a_molmo2(cli: Callable[..., Any], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    with (photos / "prompts.jsonl").open("w") as prompts:  # one question each: an answer has 256 tokens
        for name, question in (("coffee", "Point to the cup."), ("synth_378x378", "Describe this image.")):
            Image.fromarray(picture("coffee.png" if name == "coffee" else name)).save(photos / f"{name}.png")
            prompts.write(json.dumps({"image": f"{name}.png", "question": question}) + "\n")
    for precision in ("fp32", "q4"):
        export_bundle(GOLDEN2 / "molmo2_qwen3", tmp_path / precision, precision)
    suite = ("--suite", f"photos:{photos}", "--limit", 2)
    status, out, err = cli("loss", GOLDEN2 / "molmo2_qwen3", tmp_path / "fp32", tmp_path / "q4", *suite, "--json")
    assert status == 0, err
    exact, rounded = json.loads(out)["candidates"]
    assert exact["figures"]["kl_mean"]["value"] < 1e-6 < rounded["figures"]["kl_mean"]["value"]
    status, out, err = cli("ablate", GOLDEN2 / "molmo2_qwen3", *suite, "--precisions", "q4", "--json")
    assert status == 0, err
