"""Answers about one prefilled image, token by token: a model's own, or a given one (teacher forcing)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from molmo_edge.evaluation.questions import Question
from molmo_edge.frontend.prompts import Prompt, text_ids
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.runtimes import PartedRuntime
from molmo_edge.runtimes.generate import likeliest
from molmo_edge.runtimes.grounding import Grounding, GroundingInputs
from molmo_edge.runtimes.prompt_embeddings import prefill, with_features
from molmo_edge.runtimes.protocol import PointRuntime
from molmo_edge.sdk.encoding import CollectedParts, EncodedPart


@dataclass(frozen=True)
class ImageInputs:
    """The inputs of the vision tower and the connector for one image, and its part of the prompt."""

    part: EncodedPart
    prompt: Prompt
    size: tuple[int, int]  # width and height of the image, pixels

    def grounding(
        self, runtime: PartedRuntime, tokenizer: Tokenizer, patches: np.ndarray, cells: np.ndarray
    ) -> GroundingInputs | None:
        """The inputs of grounding tokens, before the prompt has run; None for a model without them.

        `patches` and `cells`: as in PrefilledImage.
        """
        if runtime.config.point_head is None:
            return None
        collected = CollectedParts()
        collected.add(self.part, patches, cells)
        return collected.inputs(cast(PointRuntime, runtime), self.prompt.ids, tokenizer.special.im_patch)


class PrefilledImage:
    """An image, prefilled once, with room in the cache for each of its questions and answers."""

    def __init__(
        self,
        runtime: PartedRuntime,
        tokenizer: Tokenizer,
        inputs: ImageInputs,
        patches: np.ndarray,
        cells: np.ndarray,
        questions: Sequence[Question],
    ) -> None:
        """`patches` and `cells`: the features of vision tower and connector, as `ReferenceOutputs.features`."""
        self.runtime, self.tokenizer = runtime, tokenizer
        decoder = runtime.config.decoder
        rows = with_features(runtime, inputs.prompt, cells)
        room = max(len(self._ids(question)) + question.max_new_tokens for question in questions)
        cache: Any = runtime.new_cache(min(decoder.max_position_embeddings, len(rows) + room))
        prefill(runtime, rows, np.arange(len(rows)) > 0, cache)  # all but BOS are image tokens
        self._cache = cache
        grounding = inputs.grounding(runtime, tokenizer, patches, cells)
        self._grounding = None if grounding is None else replace(grounding, states=cache.states)

    def begin(self, question: Question) -> AnswerRun:
        """The answer to a question, before its first token. Raises EngineError if the question does not fit."""
        cache = self._cache.copy()
        logits = self.runtime.forward(self.runtime.embed(self._ids(question)), cache)
        grounding = None if self._grounding is None else self._grounding.begin(cache.states)
        return AnswerRun(self.runtime, self.tokenizer, cache, logits, grounding)

    def text(self, ids: Sequence[int]) -> str:
        """As in `Molmo.ask`: without the end token, and without the space that every answer begins with.

        Points of grounding tokens are written as coordinates, which `parse_points` and all scores read.
        """
        kept = [i for i in ids if i != self.tokenizer.special.eos]
        if self._grounding is None:
            return self.tokenizer.decode(kept).lstrip()
        tokens, text, plain = self._grounding.token_ids, "", list[int]()
        for i in kept:
            if i < tokens.first:
                plain.append(i)
            else:
                text, plain = text + self.tokenizer.decode(plain) + tokens.token(i), []
        text = (text + self.tokenizer.decode(plain)).lstrip()
        return self._grounding.with_coordinates(text)

    def are_grounding(self, ids: Sequence[int]) -> np.ndarray | None:
        """bool, which of an answer's ids are grounding tokens; None for a model without them."""
        return None if self._grounding is None else np.array(ids) >= self._grounding.token_ids.first

    def _ids(self, question: Question) -> np.ndarray:
        return text_ids(self.tokenizer, [question.text])


class AnswerRun:
    """An answer in progress.

    `scores`: float32 [n_ids], the logits of the next token. With grounding tokens n_ids counts those of the prompt,
    ids that may not follow have -inf, and the probability of the patch token is shared among the patches
    (`Grounding.logits`): where a model decodes, only its likeliest patch has a probability, and two models that choose
    neighbouring patches would differ without bound. `choice`: the id that the model takes.
    """

    def __init__(
        self, runtime: PartedRuntime, tokenizer: Tokenizer, cache: Any, logits: np.ndarray, grounding: Grounding | None
    ) -> None:
        """`cache`: holds the prompt; `logits`: [embedding_size or more] after it."""
        self._runtime, self._cache, self._grounding = runtime, cache, grounding
        self._eos, self._vocabulary = tokenizer.special.eos, runtime.config.decoder.vocab_size
        self._start = cache.length
        self._take(logits)

    def feed(self, token: int) -> None:
        """Append a token."""
        row = self._runtime.embed(np.array([token])) if self._grounding is None else self._grounding.embed(token)
        self._take(self._runtime.forward(row, self._cache))

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens. `feed` or `finish` from there: the scores are not restored."""
        self._cache.length = self._start + length
        if self._grounding is not None:
            del self._grounding.history[length:]

    def finish(self, most: int, first: int | None = None) -> tuple[np.ndarray, list[int]]:
        """Continue greedily for at most `most` ids, or what fits: the scores [n, n_ids] and the n ids chosen from them.

        `first`: the first id, instead of the choice. The end token is included.
        """
        scores, ids = [self.scores], [self.choice if first is None else first]
        while ids[-1] != self._eos and len(ids) < most and self._cache.length < self._cache.capacity:
            self.feed(ids[-1])
            scores.append(self.scores)
            ids.append(self.choice)
        return np.stack(scores), ids

    def _take(self, logits: np.ndarray) -> None:
        if self._grounding is None:
            self.scores = logits[: self._vocabulary]
            self.choice = likeliest(self.scores)
        else:
            state = self._cache.states[-1]
            self.scores = self._grounding.logits(logits, state, "shared")
            self.choice = likeliest(self._grounding.logits(logits, state))
