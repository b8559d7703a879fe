"""`Stream.close` ends an answer within one token, from any thread, and frees its cache."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from molmo_edge import Molmo, MolmoEdgeError

PHOTO = Path(__file__).parent / "golden" / "coffee.png"
TEXT = "one two three four five six seven eight nine ten"


def test_a_closed_stream_ends_and_has_no_answer(saying: Callable[..., Molmo]) -> None:
    molmo = saying(TEXT)
    stream = molmo.stream(PHOTO, "What?")
    pieces = [next(stream), next(stream)]
    stream.close()
    ran = len(molmo.fake.fed)  # type: ignore[attr-defined]
    assert list(stream) == []
    assert TEXT.startswith("".join(str(piece) for piece in pieces))
    with pytest.raises(MolmoEdgeError, match="closed before its answer"):
        _ = stream.answer
    assert len(molmo.fake.fed) == ran  # type: ignore[attr-defined]
    stream.close()  # again
    assert molmo.ask(PHOTO, "What?").text == TEXT


def test_a_stream_that_never_began_runs_nothing(saying: Callable[..., Molmo]) -> None:
    molmo = saying(TEXT)
    stream = molmo.stream(PHOTO, "What?")
    stream.close()
    assert list(stream) == []
    assert molmo.fake.fed == []  # type: ignore[attr-defined]


def test_an_answer_that_was_complete_stays(saying: Callable[..., Molmo]) -> None:
    stream = saying(TEXT).stream(PHOTO, "What?")
    assert "".join(str(piece) for piece in stream) == TEXT
    stream.close()
    assert stream.answer.text == TEXT


def test_another_thread_closes_within_one_token_and_frees_the_cache(saying: Callable[..., Molmo]) -> None:
    molmo = saying(TEXT)
    running, go = threading.Event(), threading.Event()
    caches: list[weakref.ref[Any]] = []
    runtime = molmo.fake  # type: ignore[attr-defined]
    forward = runtime.forward

    def paused(embeddings: Any, cache: Any) -> Any:
        caches.append(weakref.ref(cache))
        if len(caches) == 4:
            running.set()
            assert go.wait(60)
        return forward(embeddings, cache)

    runtime.forward = paused
    stream = molmo.stream(PHOTO, "What?")
    pieces: list[object] = []
    thread = threading.Thread(target=lambda: pieces.extend(stream))
    thread.start()
    assert running.wait(60)
    stream.close()
    go.set()
    thread.join(60)
    assert not thread.is_alive()
    assert len(caches) == 4  # the prefill and three tokens: none after the one that was running
    gc.collect()
    assert caches[0]() is None


def test_a_closed_turn_is_not_in_the_conversation(saying: Callable[..., Molmo]) -> None:
    chat = saying(TEXT).chat(PHOTO)
    stream = chat.stream("What?")
    next(stream)
    stream.close()
    assert chat.history == []
    assert chat.ask("And?").text == TEXT
    assert [question for question, _ in chat.history] == ["And?"]


def test_a_long_answer_about_a_scene_does_not_run_the_image_again(saying: Callable[..., Molmo]) -> None:
    molmo = saying(TEXT)
    scene = molmo.encode(PHOTO, room=1)
    molmo.fake.fed.clear()  # type: ignore[attr-defined]
    answer = molmo.ask(scene, "What?", max_new_tokens=500)
    assert answer.text == TEXT
    assert answer.usage.tokens.prefilled == answer.usage.tokens.prompt
    assert len(molmo.fake.fed[0]) == answer.usage.tokens.prompt  # type: ignore[attr-defined]
