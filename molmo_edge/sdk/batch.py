"""Several questions at once. What is wrong with one pair is reported at its place, and the others are answered."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from molmo_edge.answer import Answer, Seconds
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.points import parse_points
from molmo_edge.frontend.prompts import text_ids
from molmo_edge.runtimes import EngineError
from molmo_edge.runtimes.generate import Sampling, generate_batch, most_new_tokens
from molmo_edge.sdk.streaming import finished

if TYPE_CHECKING:
    from molmo_edge.molmo import Molmo, Scene

Errors = Literal["return", "raise"]


@dataclass(frozen=True)
class _Prompt:
    place: int
    scene: Scene
    given: bool  # as a Scene: what encoding took is not counted
    ids: np.ndarray  # of the question
    most: int  # new tokens


def ask_batch(
    molmo: Molmo, asks: Sequence[tuple[Any, str]], sampling: Sampling, errors: Errors
) -> list[Answer | MolmoEdgeError]:
    """See `Molmo.ask_batch`."""
    found: dict[int, Answer | MolmoEdgeError] = {}
    prompts: list[_Prompt] = []
    side_by_side = molmo._runtime.batches
    for place, (image, question) in enumerate(_pairs(asks, errors)):
        try:
            if side_by_side:
                prompts.append(_prompt(molmo, place, image, question, sampling))
                continue
            stream = molmo.stream(image, question, **dataclasses.asdict(sampling))
        except EngineError:  # not of this pair
            raise
        except MolmoEdgeError as error:
            if errors == "raise":
                raise
            found[place] = error
        else:
            found[place] = stream.answer
    if prompts:
        found |= _side_by_side(molmo, prompts, sampling)
    return [found[place] for place in range(len(asks))]


def _pairs(asks: Any, errors: Any) -> Sequence[tuple[Any, str]]:
    from molmo_edge.molmo import QuestionError, _checked  # it imports this module

    if errors not in ("return", "raise"):
        raise QuestionError(f'errors must be "return" or "raise", it is {errors!r}')
    says = "a batch is a list of (image, question) pairs"
    if not isinstance(asks, (list, tuple)) or not asks:
        raise QuestionError(f"{says}, at least one")
    if not all(isinstance(ask, (list, tuple)) and len(ask) == 2 for ask in asks):
        raise QuestionError(says)
    if errors == "raise":  # before any image is encoded
        for _, question in asks:
            _checked(question, "question")
    return asks


def _prompt(molmo: Molmo, place: int, image: Any, question: str, sampling: Sampling) -> _Prompt:
    from molmo_edge.molmo import Scene, _checked

    _checked(question, "question")
    given = isinstance(image, Scene)
    scene = molmo._own(image) if given else molmo._see(image)
    ids = text_ids(molmo._tokenizer, [question])
    return _Prompt(
        place, scene, given, ids, most_new_tokens(sampling, len(scene.embeddings) + len(ids), molmo._context)
    )


def _side_by_side(molmo: Molmo, prompts: Sequence[_Prompt], sampling: Sampling) -> dict[int, Answer | MolmoEdgeError]:
    runtime, tokenizer = molmo._runtime, molmo._tokenizer
    most = [prompt.most for prompt in prompts]
    began = time.perf_counter()
    rows = [np.concatenate([prompt.scene.embeddings, runtime.embed(prompt.ids)]) for prompt in prompts]
    prefilled = runtime.prefill_batch(rows, max(most))
    prefill = time.perf_counter() - began
    vocab_size = molmo.config.decoder.vocab_size
    answers = generate_batch(runtime, prefilled, sampling, most, eos_id=tokenizer.special.eos, vocab_size=vocab_size)
    decode = time.perf_counter() - began - prefill
    whole = Seconds(load=molmo._load_seconds, prefill=prefill, decode=decode)
    found: dict[int, Answer | MolmoEdgeError] = {}
    for prompt, token_ids in zip(prompts, answers, strict=True):
        text, spent, scene = tokenizer.decode(token_ids).lstrip(), whole, prompt.scene
        if not prompt.given:
            spent = dataclasses.replace(whole, preprocess=scene.seconds.preprocess, vision=scene.seconds.vision)
        found[prompt.place] = finished(
            scene,
            text,
            parse_points(text),
            token_ids,
            len(prompt.ids),
            spent,
            complete=len(token_ids) < prompt.most,
        )
    return found
