"""A conversation over HTTP runs each turn once and a picture in the cache on disk skips vision; answers are equal."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Server, chat_body, data_uri, png, send, serving, serving_process

from molmo_edge import Molmo
from molmo_edge.server.scenes import MAX_CONVERSATIONS

CHAT = "/v1/chat/completions"
QUESTIONS = ["Point to the cup.", "What color is it?", "Describe this image.", "And what is left of it?"]


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Path) -> Iterator[Molmo]:
    """In float32: int8 kernels round differently in a run of another length, which near ties show."""
    with Molmo(tiny_bundle, threads=1, max_crops=0) as molmo:
        yield molmo


@pytest.fixture
def of_tiny(tiny: Molmo) -> Iterator[Server]:
    with serving(tiny) as server:
        yield server


def turn(history: list[tuple[str, str]], question: str, image: str | None = None, **more: Any) -> dict[str, Any]:
    """The body of a question after `history`, about `image`."""
    body = chat_body(history[0][0] if history else question, image, **more)
    for i, (_, answer) in enumerate(history):
        following = history[i + 1][0] if i + 1 < len(history) else question
        body["messages"] += [{"role": "assistant", "content": answer}, {"role": "user", "content": following}]
    return body


def said(reply: Any) -> tuple[str, dict[str, Any]]:
    """The text of an answer, and its usage."""
    assert reply.status == 200, reply.body
    return reply.json["choices"][0]["message"]["content"], reply.json["usage"]


def test_a_turn_costs_its_own_tokens_and_answers_are_those_of_the_sdk(tiny: Molmo, of_tiny: Server) -> None:
    photo, history, before = png(size=(64, 48)), list[tuple[str, str]](), 0
    for question in QUESTIONS:
        expected = tiny.ask(photo, question, history=history, max_new_tokens=8)
        text, used = said(of_tiny.send(CHAT, turn(history, question, data_uri(photo), max_tokens=8)))
        assert text == expected.text
        assert used["prompt_tokens"] == expected.usage.tokens.image + expected.usage.tokens.prompt
        # A text of this random model need not have the ids that were generated, so that it may run again.
        assert used["prompt_tokens_details"]["cached_tokens"] >= before
        before = used["prompt_tokens"]
        history.append((question, text))


def test_a_turn_runs_the_end_of_the_last_answer_and_the_question(saying: Callable[..., Molmo]) -> None:
    molmo = saying("There are two cups.")
    fake, image = molmo.fake, data_uri(png())  # type: ignore[attr-defined]
    with serving(molmo) as server:
        pictured = len(molmo.encode(png()).embeddings)
        alone = {q: said(server.send(CHAT, turn([], q, image)))[1]["prompt_tokens"] - pictured for q in QUESTIONS}
        history: list[tuple[str, str]] = []
        for question in QUESTIONS:
            fake.fed.clear()
            text, used = said(server.send(CHAT, turn(history, question, image)))
            ran = used["prompt_tokens"] - used["prompt_tokens_details"]["cached_tokens"]
            assert sum(map(len, fake.fed)) == ran + used["completion_tokens"]
            if history:
                assert ran == 1 + alone[question]  # EOS of the last answer, and the question
            history.append((question, text))
        assert server.service.scenes.conversations == len(QUESTIONS)
        metrics = server.send("/metrics").body.decode()
        assert "molmo_edge_conversation_entries 4.0" in metrics
        (size,) = re.findall(r"^molmo_edge_conversation_bytes (\S+)$", metrics, re.MULTILINE)
        assert float(size) == server.service.scenes.turn_bytes > 0


def test_responses_and_another_answer_to_an_earlier_question_go_on_from_it(tiny: Molmo, of_tiny: Server) -> None:
    photo = png(7)
    first, _ = said(of_tiny.send(CHAT, turn([], QUESTIONS[0], data_uri(photo), max_tokens=8)))
    history = [(QUESTIONS[0], first)]
    second, _ = said(of_tiny.send(CHAT, turn(history, QUESTIONS[1], data_uri(photo), max_tokens=8)))
    for question in (QUESTIONS[2], QUESTIONS[1]):  # other branches than the one that is kept
        expected = tiny.ask(photo, question, history=history, max_new_tokens=8)
        text, used = said(of_tiny.send(CHAT, turn(history, question, data_uri(photo), max_tokens=8)))
        assert text == expected.text
        assert used["prompt_tokens_details"]["cached_tokens"] > expected.usage.tokens.image
    assert second == expected.text
    given = [
        {"role": "user", "content": [{"type": "input_image", "image_url": data_uri(photo)}]},
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    used = of_tiny.send("/v1/responses", {"input": given, "max_output_tokens": 8}).json
    assert used["output"][0]["content"][0]["text"] == second
    assert used["usage"]["input_tokens_details"]["cached_tokens"] > expected.usage.tokens.image


def test_conversations_at_the_same_time_do_not_mix(tiny: Molmo, of_tiny: Server) -> None:
    photos = [png(i * 37, (40 + i, 30)) for i in range(2)]

    def talk(i: int) -> list[str]:
        history: list[tuple[str, str]] = []
        for question in (*QUESTIONS[i % 3 : 3], *QUESTIONS[: i % 3]):
            body = turn(history, question, data_uri(photos[i % 2]), max_tokens=6, stop=["never"] * (i % 2))
            history.append((question, said(of_tiny.send(CHAT, body))[0]))
        return [answer for _, answer in history]

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(talk, range(6)))
    for i, given in enumerate(answers):
        history: list[tuple[str, str]] = []
        for question, text in zip((*QUESTIONS[i % 3 : 3], *QUESTIONS[: i % 3]), given, strict=True):
            assert text == tiny.ask(photos[i % 2], question, history=history, max_new_tokens=6).text
            history.append((question, text))


def test_a_stop_sequence_and_no_image_leave_turns_to_go_on_from(saying: Callable[..., Molmo]) -> None:
    with serving(saying("one two three four")) as server:
        text, _ = said(server.send(CHAT, chat_body("Count.", stop=" three")))
        assert text == "one two"
        _, used = said(server.send(CHAT, turn([("Count.", text)], "Go on, please.")))
        fresh = said(server.send(CHAT, turn([("Count!", text)], "Go on, please.")))[1]
        assert used["prompt_tokens_details"]["cached_tokens"] > fresh["prompt_tokens_details"]["cached_tokens"]


def test_memory_of_conversations_is_bounded(saying: Callable[..., Molmo]) -> None:
    molmo = saying("ok", context=512, max_crops=0)
    image = data_uri(png())
    with serving(molmo) as server:
        for i in range(MAX_CONVERSATIONS + 5):
            said(server.send(CHAT, chat_body(f"Question {i}?", image, max_tokens=4)))
            said(server.send(CHAT, chat_body(f"Question {i}?", image, max_tokens=4)))  # replaces the one before
        scenes = server.service.scenes
        assert scenes.conversations == MAX_CONVERSATIONS
        scene, each = scenes.bytes, scenes.turn_bytes // MAX_CONVERSATIONS
    with serving(molmo, scene_bytes=2 * scene + each) as server:
        scenes = server.service.scenes
        for i in range(4):
            for name in ("a", "b"):  # about one picture, then another
                said(server.send(CHAT, chat_body(f"Question {name}?", data_uri(png(i)), max_tokens=4)))
            assert scenes.bytes + scenes.turn_bytes <= 2 * scene + each
            assert scenes.conversations >= 1
            assert len(scenes) == min(i + 1, 2)
        for i in (9, 9, 10):  # moondream's endpoints have no later turns
            server.send("/v1/query", {"image_url": data_uri(png(i)), "question": "What?"})
        assert scenes.conversations == 0
        last = turn([("Question b?", "ok")], "And?", data_uri(png(3)), max_tokens=4)  # its scene is gone
        assert said(server.send(CHAT, last))[1]["prompt_tokens_details"]["cached_tokens"] == 0
    with serving(molmo, scene_bytes=0) as server:
        history = [("Question?", said(server.send(CHAT, chat_body("Question?", image)))[0])]
        assert said(server.send(CHAT, turn(history, "And?", image)))[1]["prompt_tokens_details"]["cached_tokens"] == 0
        assert server.service.scenes.turn_bytes == 0


def test_a_conversation_goes_before_its_scene(saying: Callable[..., Molmo]) -> None:
    molmo = saying("ok", context=512, max_crops=0)
    asked, other = (chat_body("Question?", data_uri(png(i)), max_tokens=4) for i in range(2))
    following = turn([("Question?", "ok")], "And?", data_uri(png(0)), max_tokens=4)
    pictured = len(molmo.encode(png()).embeddings)
    with serving(molmo) as server:
        said(server.send(CHAT, asked))
        scene, each = server.service.scenes.bytes, server.service.scenes.turn_bytes
    query = {"image_url": data_uri(png(1)), "question": "What?"}  # keeps a scene, and no conversation
    assert each < scene
    for limit, scenes, cached in ((2 * scene, 2, pictured), (scene + each, 1, 0)):
        with serving(molmo, scene_bytes=limit) as server:
            said(server.send(CHAT, asked))
            assert server.service.scenes.conversations == 1
            assert server.send("/v1/query", query).status == 200
            kept = server.service.scenes
            assert (len(kept), kept.conversations) == (scenes, 0)
            ran_before = sum(map(len, molmo.fake.fed))  # type: ignore[attr-defined]
            _, used = said(server.send(CHAT, following))
            ran = sum(map(len, molmo.fake.fed)) - ran_before  # type: ignore[attr-defined]
            assert used["prompt_tokens_details"]["cached_tokens"] == cached
            assert ran == used["prompt_tokens"] - cached + used["completion_tokens"]
            said(server.send(CHAT, other))
            assert kept.bytes + kept.turn_bytes <= limit


def test_a_conversation_without_its_scene_is_not_kept(saying: Callable[..., Molmo]) -> None:
    """A scene that is larger than the limit, and a conversation that is not."""
    molmo = saying("ok", context=2048, max_crops=0)
    body = chat_body("Question?", data_uri(png()), max_tokens=4)
    with serving(molmo) as server:
        said(server.send(CHAT, body))
        size = server.service.scenes.bytes
    with serving(molmo, scene_bytes=size - 1) as server:
        said(server.send(CHAT, body))
        assert (len(server.service.scenes), server.service.scenes.conversations) == (0, 0)
        following = turn([("Question?", "ok")], "And?", data_uri(png()), max_tokens=4)
        assert said(server.send(CHAT, following))[1]["prompt_tokens_details"]["cached_tokens"] == 0


def test_conversations_on_llama_cpp_occupy_no_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    from exported import gguf_bundle

    from molmo_edge.runtimes.llama_native import LlamaContext

    contexts, create = weakref.WeakSet[LlamaContext](), LlamaContext.__init__

    def created(context: LlamaContext, *given: Any, **named: Any) -> None:
        create(context, *given, **named)
        contexts.add(context)

    def now() -> int:
        gc.collect()
        return len(contexts)

    with Molmo(gguf_bundle("molmoe", "f32"), threads=1, max_crops=0) as molmo:
        photo, expected = png(size=(64, 48)), list[Any]()
        for question in QUESTIONS[:3]:
            history = [(asked, answer.text) for asked, answer in zip(QUESTIONS, expected, strict=False)]
            expected.append(molmo.ask(photo, question, history=history, max_new_tokens=6))
        monkeypatch.setattr(LlamaContext, "__init__", created)
        with serving(molmo) as server:
            kept = server.service.scenes
            for i in range(20):  # more than the sequences of a context, and than fit into the room beside the scene
                said(server.send(CHAT, chat_body(f"{'Word ' * 60}{i}?", data_uri(photo), max_tokens=2)))
            assert (len(kept), kept.conversations, now()) == (1, 20, 1)
            cells = 4 * molmo.config.decoder.n_layers * molmo.config.decoder.kv_dim  # bytes of a position, in float16
            least = 20 * cells * (len(molmo.encode(photo).embeddings) + 60)
            assert least < kept.turn_bytes < 2 * least
            history = []
            for question, answer in zip(QUESTIONS, expected, strict=False):
                text, used = said(server.send(CHAT, turn(history, question, data_uri(photo), max_tokens=6)))
                assert text == answer.text
                cached = used["prompt_tokens_details"]["cached_tokens"]
                assert cached > answer.usage.tokens.image if history else cached == answer.usage.tokens.image
                history.append((question, text))
            branch = turn(history[:1], QUESTIONS[2], data_uri(photo), max_tokens=6)  # from a part of what is kept
            other = molmo.ask(photo, QUESTIONS[2], history=history[:1], max_new_tokens=6)
            text, used = said(server.send(CHAT, branch))
            assert text == other.text
            assert used["prompt_tokens_details"]["cached_tokens"] > other.usage.tokens.image
            assert now() == 1
            limit = kept.bytes + kept.turn_bytes // 10
        contexts.clear()
        with serving(molmo, scene_bytes=limit) as server:
            for i in range(3):
                said(server.send(CHAT, chat_body("What?", data_uri(png(i, (64, 48))), max_tokens=2)))
            kept = server.service.scenes
            assert kept.bytes + kept.turn_bytes <= limit
            assert (len(kept), kept.conversations, now()) == (1, 1, 1)


def test_a_checkpoint_goes_on_from_turns(golden: Path) -> None:
    pytest.importorskip("torch")
    with Molmo(golden / "molmoe", precision="fp32", threads=1, max_crops=0) as molmo, serving(molmo) as server:
        photo, history = png(3), list[tuple[str, str]]()
        for question in QUESTIONS[:2]:
            expected = molmo.ask(photo, question, history=history, max_new_tokens=8)
            text, used = said(server.send(CHAT, turn(history, question, data_uri(photo), max_tokens=8)))
            assert text == expected.text
            cached = used["prompt_tokens_details"]["cached_tokens"]
            assert cached > expected.usage.tokens.image if history else cached == 0
            history.append((question, text))


def test_a_picture_in_the_cache_on_disk_skips_vision(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = np.random.default_rng(1).integers(0, 255, (40, 60, 3), np.uint8)
    options: dict[str, Any] = {"threads": 1, "max_crops": 1, "scene_cache": tmp_path}
    body = chat_body("Point to the cup.", data_uri(png(5)), max_tokens=5)
    low = chat_body("Point to the cup.", data_uri(png(5)), max_tokens=5)
    low["messages"][0]["content"][1]["image_url"]["detail"] = "low"
    with Molmo(tiny_bundle, **options) as molmo, serving(molmo) as server:
        molmo.encode(photo)
        expected = [said(server.send(CHAT, asked)) for asked in (body, low)]
        assert [used["prompt_tokens_details"]["cached_tokens"] for _, used in expected] == [0, 0]
    with Molmo(tiny_bundle, **options) as molmo, serving(molmo) as server:
        monkeypatch.setattr("molmo_edge.sdk.engine.encode", lambda *_: pytest.fail("vision ran"))
        for asked, (text, used) in zip((body, low), expected, strict=True):
            again, usage = said(server.send(CHAT, asked))
            assert again == text
            assert 0 < usage["prompt_tokens_details"]["cached_tokens"] < used["prompt_tokens"]
        assert 'molmo_edge_scenes_total{cached="disk"} 2.0' in server.send("/metrics").body.decode()


def test_a_second_process_answers_from_the_cache_on_disk(tmp_path: Path) -> None:
    with Molmo(max_crops=0, scene_cache=tmp_path) as molmo:
        expected = molmo.ask(png(), "Point to the cup.", max_new_tokens=8)
    with serving_process("--max-crops", 0, "--scene-cache", tmp_path, "--scene-cache-size", "50MB") as server:
        body = chat_body("Point to the cup.", data_uri(png()), max_tokens=8)
        text, used = said(send(server.port, CHAT, body))
        metrics = send(server.port, "/metrics").body.decode()
    assert text == expected.text
    assert used["prompt_tokens_details"]["cached_tokens"] == expected.usage.tokens.image
    assert 'molmo_edge_scenes_total{cached="disk"} 1.0' in metrics
