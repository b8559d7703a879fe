"""Batches: each question gets the answer that it gets alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from molmo_edge import Molmo
from molmo_edge.molmo import QuestionError
from molmo_edge.runtimes import EngineError
from molmo_edge.runtimes.generate import GenerationError, Sampling, generate, generate_batch
from molmo_edge.runtimes.torch import TorchRuntime

GOLDEN = Path(__file__).parent / "golden"
ASKS = [
    (GOLDEN / "astronaut.png", "Point to the helmet."),
    (GOLDEN / "text.png", "What is written here, and in which language is it written?"),
    (np.full((40, 400, 3), 90, np.uint8), "What?"),
    (GOLDEN / "coffee.png", "How many cups are there?"),
]


@pytest.fixture(scope="module", params=["molmoe", "qwen", "olmo"])
def molmo(request: pytest.FixtureRequest) -> Molmo:
    return Molmo(GOLDEN / request.param, device="cpu", precision="fp32")


def test_a_batch_equals_one_at_a_time(molmo: Molmo) -> None:
    alone = [molmo.ask(image, question, max_new_tokens=12) for image, question in ASKS]
    batch = molmo.ask_batch(ASKS, max_new_tokens=12)
    assert len({answer.usage.tokens.image for answer in alone}) > 2  # different lengths, so that padding takes part
    for one, other in zip(alone, batch, strict=True):
        assert one.token_ids == other.token_ids
        assert (one.text, one.points, one.count, one.complete) == (
            other.text,
            other.points,
            other.count,
            other.complete,
        )
        assert one.usage.tokens == other.usage.tokens
        assert one.usage.crops == other.usage.crops
        assert np.array_equal(one.image, other.image)


def test_a_batch_draws_as_one_at_a_time(molmo: Molmo) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.7, "seed": 3}
    alone = [molmo.ask(image, question, **options).token_ids for image, question in ASKS[:3]]
    assert [answer.token_ids for answer in molmo.ask_batch(ASKS[:3], **options)] == alone


def test_scenes_go_into_a_batch(molmo: Molmo) -> None:
    scene = molmo.encode(GOLDEN / "coffee.png")
    first, second = molmo.ask_batch([(scene, "What is it?"), (ASKS[0][0], "Who?")], max_new_tokens=6)
    assert first.token_ids == molmo.ask(scene, "What is it?", max_new_tokens=6).token_ids
    assert second.token_ids == molmo.ask(ASKS[0][0], "Who?", max_new_tokens=6).token_ids
    assert first.usage.seconds.vision == 0 < second.usage.seconds.vision
    assert first.usage.seconds.prefill > 0
    assert first.usage.seconds.decode > 0


@pytest.mark.parametrize("name", ["molmoe", "qwen", "olmo"])
def test_padded_logits_equal_those_of_each_alone(name: str) -> None:
    """Compare every logit of every step: padding is masked, and positions continue at the end of each prompt."""
    runtime = TorchRuntime(GOLDEN / name, device="cpu", precision="fp32")
    rng = np.random.default_rng(0)
    d = runtime.config.decoder.d_model
    prompts = [rng.normal(size=(n, d)).astype(np.float32) for n in (7, 1, 30, 12)]
    steps = [rng.normal(size=(4, d)).astype(np.float32) for _ in range(5)]
    logits, batch = runtime.prefill_batch(prompts, len(steps))
    caches = [runtime.new_cache(len(p) + len(steps)) for p in prompts]
    alone = np.stack([runtime.forward(p, c) for p, c in zip(prompts, caches, strict=True)])
    for step in steps:
        np.testing.assert_allclose(logits, alone, rtol=0, atol=1e-4 * np.abs(alone).max())
        logits = runtime.forward_batch(step, batch)
        alone = np.stack([runtime.forward(row[None], c) for row, c in zip(step, caches, strict=True)])
    np.testing.assert_allclose(logits, alone, rtol=0, atol=1e-4 * np.abs(alone).max())


@pytest.mark.parametrize("name", ["molmoe", "qwen", "olmo"])
def test_each_ends_at_its_own_stop(name: str) -> None:
    """The third id of one answer becomes the stop: that answer ends there, the others go on."""
    runtime = TorchRuntime(GOLDEN / name, device="cpu", precision="fp32")
    rng = np.random.default_rng(1)
    prompts = [rng.normal(size=(n, runtime.config.decoder.d_model)).astype(np.float32) for n in (9, 4, 17)]
    sampling = Sampling(max_new_tokens=10)

    def alone(prompt: np.ndarray, eos: int) -> list[int]:
        cache = runtime.new_cache(40)
        return list(generate(runtime, prompt, cache, sampling, eos_id=eos, vocab_size=500, capacity=40))

    eos = alone(prompts[1], -1)[2]
    prefilled = runtime.prefill_batch(prompts, 10)
    together = generate_batch(runtime, prefilled, sampling, [10, 10, 4], eos_id=eos, vocab_size=500)
    assert together[:2] == [alone(prompts[0], eos), alone(prompts[1], eos)]
    assert together[2] == alone(prompts[2], eos)[:4]
    assert len(together[1]) <= 2


def test_engines_without_batches_answer_one_after_the_other(tiny_bundle: Path, saying: Callable[..., Molmo]) -> None:
    with Molmo(tiny_bundle) as molmo:
        expected = json.loads((tiny_bundle / "molmo_edge.json").read_text())["check"]["token_ids"]
        answers = molmo.ask_batch([(GOLDEN / "astronaut.png", "Point to the helmet.")] * 2, max_new_tokens=8)
        assert [list(answer.token_ids) for answer in answers] == [expected] * 2
    assert [a.text for a in saying("three").ask_batch([(ASKS[2][0], "a"), (ASKS[2][0], "b")])] == ["three", "three"]


@pytest.mark.parametrize(
    ("asks", "says"),
    [
        ([], "at least one"),
        ("ab", "list of"),
        ([("photo.jpg",)], "list of"),
        ([("photo.jpg", "")], "question is empty"),
        ([("photo.jpg", 3)], "must be a str"),
        ([("no-such.jpg", "What?")], "no-such.jpg"),
    ],
)
def test_wrong_batches_are_refused(saying: Callable[..., Molmo], asks: Any, says: str) -> None:
    with pytest.raises(Exception, match=says) as caught:
        saying("x").ask_batch(asks, errors="raise")
    assert isinstance(caught.value, QuestionError) or "no-such" in says
    if len(asks) and len(asks[0]) == 2:
        (reported,) = saying("x").ask_batch(asks)
        assert type(reported) is type(caught.value)
        assert str(reported) == str(caught.value)
    else:  # an argument that is not a list of pairs is refused as a whole
        with pytest.raises(QuestionError, match=says):
            saying("x").ask_batch(asks)


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_a_bad_pair_is_reported_at_its_place_and_the_others_are_answered(kind: str, tiny_bundle: Path) -> None:
    with Molmo(tiny_bundle if kind == "onnx" else GOLDEN / "molmoe") as molmo:
        other = Molmo(tiny_bundle).encode(ASKS[2][0])
        bad = [("no-such.jpg", "What?"), (b"no image", "What?"), (ASKS[2][0], ""), (other, "What?")]
        asks = [ASKS[0], *bad, ASKS[1], (ASKS[2][0], "ж" * 20_000)]
        found = molmo.ask_batch(asks, max_new_tokens=4)
        alone = [molmo.ask(image, question, max_new_tokens=4) for image, question in (ASKS[0], ASKS[1])]
    assert [type(answer).__name__ for answer in found] == [
        *("Answer", "ImageError", "ImageError", "QuestionError", "QuestionError", "Answer", "GenerationError")
    ]
    assert [found[0].token_ids, found[5].token_ids] == [answer.token_ids for answer in alone]
    assert "no-such.jpg" in str(found[1])


def test_a_batch_of_bad_pairs_alone(molmo: Molmo) -> None:
    assert [str(error) for error in molmo.ask_batch([("a.jpg", "What?"), ("b.jpg", "What?")])] == [
        f"there is no image {name}: check the path" for name in ("a.jpg", "b.jpg")
    ]


def test_what_is_wrong_with_the_whole_batch_raises(tiny_bundle: Path, saying: Callable[..., Molmo]) -> None:
    with pytest.raises(GenerationError, match="temperature"):
        saying("x").ask_batch([ASKS[0]], temperature=-1.0)
    with pytest.raises(QuestionError, match='errors must be "return" or "raise"'):
        saying("x").ask_batch([ASKS[0]], errors="ignore")  # type: ignore[call-overload]
    molmo = Molmo(tiny_bundle)
    molmo.close()
    with pytest.raises(EngineError, match="closed"):
        molmo.ask_batch([ASKS[0]])
