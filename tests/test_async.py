"""Asynchronous answers, timeouts and batches of one question: equal to `ask`, and the model is free at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from molmo_edge import Answer, AnswerTimeout, Molmo, MolmoEdgeError, Point
from molmo_edge.errors import EngineError
from molmo_edge.runtimes.generate import GenerationError

PHOTO = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
TEXT = 'Here: <point x="10.0" y="20.0" alt="cup">cup</point> and <point x="30.0" y="40.0" alt="cup">cup</point> there.'

Saying = Callable[..., Molmo]


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Path) -> Molmo:
    return Molmo(tiny_bundle, threads=1, max_crops=0)


class Gate:
    """Stops a model before a step: `wait` returns when it is there, and `open` lets it go on."""

    def __init__(self, molmo: Molmo, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.steps, self._there, self._open = 0, threading.Event(), threading.Event()
        fake: Any = molmo.fake  # type: ignore[attr-defined]
        forward = fake.forward

        def step(embeddings: np.ndarray, cache: Any) -> np.ndarray:
            self.steps += 1
            if self.steps == at:
                self._there.set()
                assert self._open.wait(30)
            found: np.ndarray = forward(embeddings, cache)
            return found

        monkeypatch.setattr(fake, "forward", step)

    def open(self) -> None:
        self._open.set()

    async def wait(self) -> None:
        assert await asyncio.to_thread(self._there.wait, 30)


def test_asynchronous_answers_equal_the_others(saying: Saying) -> None:
    molmo = saying(TEXT)

    async def run() -> list[Answer]:
        return [
            await molmo.ask_async(PHOTO, "Where?", history=[("a", "b")]),
            await molmo.point_async(PHOTO, "cup"),
            await molmo.count_async(PHOTO, "cups"),
            await molmo.caption_async(PHOTO, max_new_tokens=3),
            await molmo.chat(PHOTO).ask_async("Where?"),
            await molmo.ask_async(await molmo.encode_async(PHOTO), "Where?"),
        ]

    found = asyncio.run(run())
    expected = [
        molmo.ask(PHOTO, "Where?", history=[("a", "b")]),
        molmo.point(PHOTO, "cup"),
        molmo.count(PHOTO, "cups"),
        molmo.caption(PHOTO, max_new_tokens=3),
        molmo.chat(PHOTO).ask("Where?"),
        molmo.ask(molmo.encode(PHOTO), "Where?"),
    ]
    assert found == expected


def test_an_asynchronous_stream_gives_the_same_pieces(saying: Saying) -> None:
    molmo = saying(TEXT)

    async def run() -> tuple[list[str | Point], Answer]:
        stream = molmo.stream_async(PHOTO, "Where?")
        pieces = [piece async for piece in stream]
        return pieces, await stream.answer()

    pieces, answer = asyncio.run(run())
    assert pieces == list(molmo.stream(PHOTO, "Where?"))
    assert [(p.x, p.y) for p in answer.points] == [(p.x, p.y) for p in pieces if isinstance(p, Point)]


def test_many_tasks_share_a_real_model(tiny: Molmo) -> None:
    questions = [f"Point to the helmet {n}." for n in range(9)]

    async def run() -> list[Answer]:
        scene = await tiny.encode_async(PHOTO)
        return await asyncio.gather(*(tiny.ask_async(scene, q, max_new_tokens=6) for q in questions))

    expected = [tiny.ask(PHOTO, question, max_new_tokens=6).token_ids for question in questions]
    assert [answer.token_ids for answer in asyncio.run(run())] == expected


def test_the_event_loop_runs_while_the_model_does(saying: Saying, monkeypatch: pytest.MonkeyPatch) -> None:
    molmo = saying(TEXT)
    gate = Gate(molmo, monkeypatch, at=3)

    async def run() -> Answer:
        task = asyncio.create_task(molmo.ask_async(PHOTO, "Where?"))
        await gate.wait()
        for _ in range(100):  # the model is stopped, the loop is not
            await asyncio.sleep(0)
        assert not task.done()
        gate.open()
        return await task

    assert asyncio.run(run()).text == TEXT


@pytest.mark.parametrize("form", ["ask", "stream", "chat"])
def test_a_cancelled_task_frees_the_model_within_one_token(
    form: str, saying: Saying, monkeypatch: pytest.MonkeyPatch
) -> None:
    molmo = saying(TEXT)
    chat = molmo.chat(PHOTO)
    gate = Gate(molmo, monkeypatch, at=4)

    async def read() -> None:
        async for _ in molmo.stream_async(PHOTO, "Where?"):
            pass

    async def run() -> None:
        jobs = {
            "ask": lambda: molmo.ask_async(PHOTO, "Where?"),
            "stream": read,
            "chat": lambda: chat.ask_async("Where?"),
        }
        task = asyncio.create_task(jobs[form]())
        await gate.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open()
        assert (await molmo.ask_async(PHOTO, "Again?", max_new_tokens=1)).text  # the model answers others

    asyncio.run(run())
    assert gate.steps == 5  # the token that was being generated, and that of the second question
    assert chat.history == []
    assert chat.ask("Where?").text == TEXT


def test_a_task_that_is_cancelled_before_its_turn_never_runs(saying: Saying, monkeypatch: pytest.MonkeyPatch) -> None:
    molmo = saying(TEXT)
    gate = Gate(molmo, monkeypatch, at=1)

    async def run() -> None:
        tasks = [asyncio.create_task(molmo.ask_async(PHOTO, "Where?", max_new_tokens=1)) for _ in range(8)]
        await gate.wait()
        for task in tasks[4:]:  # four run at a time
            task.cancel()
        await asyncio.wait(tasks[4:])  # the loop passes the cancellation to the waiting jobs in its next steps
        gate.open()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(answer) for answer in done] == [Answer] * 4 + [asyncio.CancelledError] * 4

    asyncio.run(run())
    assert gate.steps == 4


def test_errors_reach_the_task(saying: Saying) -> None:
    molmo = saying("x")

    async def run() -> None:
        for job in (
            molmo.ask_async("no-such.jpg", "What?"),
            molmo.ask_async(PHOTO, ""),
            molmo.ask_async(PHOTO, "What?", max_new_tokens=0),
            molmo.point_async(PHOTO, " "),
            molmo.chat(PHOTO).ask_async(""),
        ):
            with pytest.raises(MolmoEdgeError):
                await job
        stream = molmo.stream_async(PHOTO, "What?")
        await stream.aclose()
        with pytest.raises(GenerationError, match="was closed"):
            await stream.answer()
        with pytest.raises(MolmoEdgeError, match="cannot be pickled"):
            stream.__reduce_ex__(2)

    asyncio.run(run())


class Clock:
    """Time that advances by a second at each step of a model."""

    def __init__(self, molmo: Molmo, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        fake: Any = molmo.fake  # type: ignore[attr-defined]
        forward, encode = fake.forward, fake.encode_image

        def advance(run: Callable[..., Any], seconds: float) -> Callable[..., Any]:
            def timed(*given: Any) -> Any:
                self.now += seconds
                return run(*given)

            return timed

        monkeypatch.setattr(fake, "forward", advance(forward, 1.0))
        monkeypatch.setattr(fake, "encode_image", advance(encode, 10.0))
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_a_timeout_has_the_answer_so_far(saying: Saying, monkeypatch: pytest.MonkeyPatch) -> None:
    molmo = saying(TEXT)
    whole = molmo.ask(PHOTO, "Where?")
    Clock(molmo, monkeypatch)
    for seconds, tokens in ((5.0, 0), (10.0, 0), (12.0, 2), (15.5, 6)):
        with pytest.raises(AnswerTimeout, match=f"{seconds:g} s") as caught:
            molmo.ask(PHOTO, "Where?", timeout=seconds)
        partial = caught.value.answer
        assert partial.token_ids == whole.token_ids[:tokens]
        assert whole.text.startswith(partial.text.rstrip("�"))
        assert not partial.complete
    steps = len(whole.token_ids) + 1
    assert molmo.ask(PHOTO, "Where?", timeout=10.5 + steps) == whole
    with pytest.raises(AnswerTimeout) as caught:
        molmo.point(molmo.encode(PHOTO), "cup", timeout=steps * 0.6)
    assert caught.value.answer.points == whole.points[:1]


def test_timeouts_of_streams_chats_and_tasks(saying: Saying, monkeypatch: pytest.MonkeyPatch) -> None:
    molmo = saying(TEXT)
    chat, scene = molmo.chat(PHOTO), molmo.encode(PHOTO)
    Clock(molmo, monkeypatch)
    stream = molmo.stream(scene, "Where?", timeout=4)
    pieces: list[Any] = []
    with pytest.raises(AnswerTimeout) as caught:
        pieces.extend(stream)
    assert "".join(pieces) == caught.value.answer.text
    with pytest.raises(GenerationError, match="failed"):
        _ = stream.answer
    with pytest.raises(AnswerTimeout):
        chat.ask("Where?", timeout=4)
    assert chat.history == []  # as after any failure
    assert chat.ask("Where?", timeout=1000).text == TEXT


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "1", [1]])
def test_wrong_timeouts_are_refused(timeout: Any, saying: Saying) -> None:
    with pytest.raises(GenerationError, match="timeout must be"):
        saying("x").ask(PHOTO, "What?", timeout=timeout)


def test_batches_of_one_question_equal_single_answers(tiny: Molmo) -> None:
    images = [PHOTO, PHOTO[::-1].copy(), PHOTO[:, :40].copy()]
    options = {"max_new_tokens": 5}
    assert tiny.point_batch(images, "cups", max_new_tokens=5) == [tiny.point(i, "cups", **options) for i in images]
    assert tiny.count_batch(images, "cups", max_new_tokens=5) == [tiny.count(i, "cups", **options) for i in images]
    assert tiny.caption_batch(images, max_new_tokens=5) == [tiny.caption(i, **options) for i in images]
    first, second, third = tiny.point_batch([PHOTO, "no-such.jpg", PHOTO], "cups", max_new_tokens=2)
    assert isinstance(second, MolmoEdgeError)
    assert first == third
    with pytest.raises(MolmoEdgeError, match=r"no-such\.jpg"):
        tiny.caption_batch([PHOTO, "no-such.jpg"], errors="raise", max_new_tokens=2)
    for images_ in ([], "photo.jpg", PHOTO):
        with pytest.raises(MolmoEdgeError, match="list of images"):
            tiny.count_batch(images_, "cups")
    with pytest.raises(MolmoEdgeError, match="label is empty"):
        tiny.point_batch([PHOTO], "")


def test_a_batch_of_points_on_pytorch_equals_single_answers() -> None:
    pytest.importorskip("torch")
    checkpoint = Path(__file__).parent / "golden" / "molmoe"
    images = [PHOTO, PHOTO[::-1].copy()]
    with Molmo(checkpoint, threads=1, max_crops=0, precision="fp32") as molmo:
        found = molmo.point_batch(images, "cups", max_new_tokens=4, errors="raise")
        assert [a.token_ids for a in found] == [molmo.point(i, "cups", max_new_tokens=4).token_ids for i in images]


def test_an_engine_that_fails_during_a_task_says_so(saying: Saying, monkeypatch: pytest.MonkeyPatch) -> None:
    molmo = saying("x")

    def fail(*_: Any) -> None:
        raise EngineError("out of memory")

    monkeypatch.setattr(molmo.fake, "forward", fail)  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="out of memory"):
        asyncio.run(molmo.ask_async(PHOTO, "What?"))
