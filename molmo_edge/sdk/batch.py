"""Several questions at once. An error in one pair is returned in its place, and the others are answered."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from molmo_edge.answer import Answer
from molmo_edge.errors import EngineError, MolmoEdgeError
from molmo_edge.frontend.points import parse_points
from molmo_edge.frontend.prompts import text_ids
from molmo_edge.runtimes.generate import Sampling, generate_batch, most_new_tokens
from molmo_edge.sdk.engine import Engine, QuestionError, Scene, check_text
from molmo_edge.sdk.streaming import Generated, finished, stream_answer

if TYPE_CHECKING:
    from molmo_edge.runtimes.protocol import BatchRuntime

Errors = Literal["return", "raise"]


@dataclass(frozen=True)
class _Prompt:
    index: int  # in the batch
    scene: Scene
    encoded_before: bool
    ids: np.ndarray  # of the question
    most: int  # new tokens


def ask_batch(
    engine: Engine, asks: Sequence[tuple[Any, str]], sampling: Sampling, errors: Errors
) -> list[Answer | MolmoEdgeError]:
    """See `Molmo.ask_batch`."""
    results: dict[int, Answer | MolmoEdgeError] = {}
    prompts: list[_Prompt] = []
    alone = engine.config.decoder.bidirectional_images or engine.config.point_head is not None
    batched = hasattr(engine.runtime, "prefill_batch") and not alone
    batch_runtime = cast("BatchRuntime", engine.runtime) if batched else None
    for index, (image, question) in enumerate(_pairs(asks, errors)):
        try:
            if batch_runtime is not None:
                prompts.append(_prompt(engine, index, image, question, sampling))
                continue
            stream = stream_answer(engine, image, question, sampling)
        except EngineError:  # not specific to this pair
            raise
        except MolmoEdgeError as error:
            if errors == "raise":
                raise
            results[index] = error
        else:
            results[index] = stream.answer
    if batch_runtime is not None and prompts:
        results |= _run(engine, batch_runtime, prompts, sampling)
    return [results[index] for index in range(len(asks))]


def same_question(images: Any, question: str) -> list[tuple[Any, str]]:
    """The pairs of `ask_batch` that ask `question` about each of `images`. Raises QuestionError."""
    if not isinstance(images, (list, tuple)) or not images:
        raise QuestionError("a batch needs a list of images, with at least one")
    return [(image, question) for image in images]


def _pairs(asks: Any, errors: Any) -> Sequence[tuple[Any, str]]:
    if errors not in ("return", "raise"):
        raise QuestionError(f'errors must be "return" or "raise", not {errors!r}')
    expected = "a batch must be a list of (image, question) pairs"
    if not isinstance(asks, (list, tuple)) or not asks:
        raise QuestionError(f"{expected}, with at least one pair")
    if not all(isinstance(ask, (list, tuple)) and len(ask) == 2 for ask in asks):
        raise QuestionError(expected)
    if errors == "raise":  # before any image is encoded
        for _, question in asks:
            check_text(question)
    return asks


def _prompt(engine: Engine, index: int, image: Any, question: str, sampling: Sampling) -> _Prompt:
    check_text(question)
    ids = text_ids(engine.tokenizer, [question])
    scene = engine.scene(image, len(ids))
    most = most_new_tokens(sampling, len(scene.embeddings) + len(ids), engine.context)
    return _Prompt(index, scene, scene is image, ids, most)


def _run(
    engine: Engine, runtime: BatchRuntime, prompts: Sequence[_Prompt], sampling: Sampling
) -> dict[int, Answer | MolmoEdgeError]:
    tokenizer = engine.tokenizer
    most = [prompt.most for prompt in prompts]
    began = time.perf_counter()
    rows = [np.concatenate([prompt.scene.embeddings, runtime.embed(prompt.ids)]) for prompt in prompts]
    prefilled = runtime.prefill_batch(rows, max(most))
    prefill = time.perf_counter() - began
    vocab_size = engine.config.decoder.vocab_size
    answers = generate_batch(runtime, prefilled, sampling, most, eos_id=tokenizer.special.eos, vocab_size=vocab_size)
    decode = time.perf_counter() - began - prefill
    results: dict[int, Answer | MolmoEdgeError] = {}
    for prompt, ids in zip(prompts, answers, strict=True):
        text = tokenizer.decode(ids).lstrip()
        generated = Generated(ids, text, parse_points(text), prefill, decode)
        results[prompt.index] = finished(
            prompt.scene, generated, len(prompt.ids), prompt.most, encoded_before=prompt.encoded_before
        )
    return results
