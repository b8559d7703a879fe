"""Several questions at once. An error in one pair is returned in its place, and the others are answered."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from molmo_edge.answer import Answer
from molmo_edge.errors import EngineError, MolmoEdgeError
from molmo_edge.frontend.points import parse_points
from molmo_edge.frontend.prompts import text_ids
from molmo_edge.runtimes.generate import Sampling, generate_batch, most_new_tokens
from molmo_edge.sdk.answer_form import AnswerForm, AnswerFormError
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
    engine: Engine,
    asks: Sequence[tuple[Any, str]],
    sampling: Sampling,
    errors: Errors,
    form: AnswerForm | None = None,
) -> list[Answer | MolmoEdgeError]:
    """See `Molmo.ask_batch`."""
    results: dict[int, Answer | MolmoEdgeError] = {}
    prompts: list[_Prompt] = []
    pairs = _pairs(asks, errors)
    alone = engine.config.decoder.bidirectional_images or engine.config.point_head is not None
    # The batch has no gaps between positions; a scene from a file can have some, too.
    alone = (
        alone
        or engine.image_tokens is not None
        or any(isinstance(image, Scene) and image.positions is not None for image, _ in pairs)
    )
    batched = hasattr(engine.runtime, "prefill_batch") and not alone
    batch_runtime = cast("BatchRuntime", engine.runtime) if batched else None
    for index, (image, question) in enumerate(pairs):
        try:
            if batch_runtime is not None:
                prompts.append(_prompt(engine, index, image, question, sampling))
                continue
            stream = stream_answer(engine, image, question, sampling, form=form)
        except EngineError:  # not specific to this pair
            raise
        except MolmoEdgeError as error:
            if errors == "raise":
                raise
            results[index] = error
        else:
            results[index] = _answer(partial(getattr, stream, "answer"), errors)
    if batch_runtime is not None and prompts:
        results |= _run(engine, batch_runtime, prompts, sampling, form, errors)
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


def _answer(answer: Callable[[], Answer], errors: Errors) -> Answer | MolmoEdgeError:
    """The answer, or with errors="return" why its text does not fit its schema. Failures of the model are raised."""
    try:
        return answer()
    except AnswerFormError as error:
        if errors == "raise":
            raise
        return error


def _run(
    engine: Engine,
    runtime: BatchRuntime,
    prompts: Sequence[_Prompt],
    sampling: Sampling,
    form: AnswerForm | None,
    errors: Errors,
) -> dict[int, Answer | MolmoEdgeError]:
    tokenizer = engine.tokenizer
    most = [prompt.most for prompt in prompts]
    began = time.perf_counter()
    rows = [np.concatenate([prompt.scene.embeddings, runtime.embed(prompt.ids)]) for prompt in prompts]
    prefilled = runtime.prefill_batch(rows, max(most))
    prefill = time.perf_counter() - began
    vocab_size = engine.config.decoder.vocab_size
    constraints = None if form is None else [form.begin() for _ in prompts]
    answers = generate_batch(
        runtime,
        prefilled,
        sampling,
        most,
        eos_id=tokenizer.special.eos,
        vocab_size=vocab_size,
        constraints=constraints,
    )
    decode = time.perf_counter() - began - prefill
    results: dict[int, Answer | MolmoEdgeError] = {}
    for i, (prompt, ids) in enumerate(zip(prompts, answers, strict=True)):
        text = tokenizer.decode(ids).lstrip()
        ended = constraints is not None and constraints[i].complete
        answer = partial(
            finished,
            prompt.scene,
            Generated(ids, text, parse_points(text), prefill, decode, ended=ended),
            len(prompt.ids),
            prompt.most,
            encoded_before=prompt.encoded_before,
            form=form,
        )
        results[prompt.index] = _answer(answer, errors)
    return results
