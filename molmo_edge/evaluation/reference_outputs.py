"""The reference's features, logits and answers, recorded on disk to compare candidates with.

They are on disk because the logits of a vocabulary of 50,000 take 0.2 MB per token, and in float32 so that a copy of
the reference has a difference of exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.evaluation.questions import Question, by_image
from molmo_edge.frontend.crops import ImageProcessor, Overview, load_image
from molmo_edge.frontend.image_files import ImageError
from molmo_edge.frontend.prompts import Prompt, image_ids, text_ids
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.runtimes import Cache, PartedRuntime, Runtime
from molmo_edge.runtimes.generate import likeliest
from molmo_edge.runtimes.prompt_embeddings import prefill, with_features

_PERTURBATION = 1e-6  # relative, of each pixel: less than the difference between two resizing libraries


class NoQuestionsError(MolmoEdgeError):
    """There is nothing to compare."""


class UnsupportedModelError(MolmoEdgeError):
    """A model that this kind of measurement does not support."""


@dataclass(frozen=True)
class ImageInputs:
    """The inputs of the vision tower and the connector for one image, and its part of the prompt."""

    crops: np.ndarray  # float32 [n, patches^2, 588]
    masks: np.ndarray  # float32 [n, patches^2]
    prompt: Prompt
    size: tuple[int, int]  # width and height of the image, pixels
    overview: Overview | None = None
    pooling: np.ndarray | None = None  # see PreparedImage


@dataclass(frozen=True)
class ModelUnderTest:
    """A loaded model and the settings of its image inputs. Raises UnsupportedModelError for a MolmoPoint."""

    runtime: PartedRuntime
    tokenizer: Tokenizer
    max_crops: int | None = None
    perturbed: bool = False  # pixels are changed by a millionth, to measure noise

    def __post_init__(self) -> None:
        if self.runtime.config.point_head is not None:
            raise UnsupportedModelError(
                "losses of a MolmoPoint are not measured yet: its grounding tokens would be left out"
            )

    def prepare(self, question: Question) -> ImageInputs:
        """The question's image as model inputs. Raises ImageError."""
        config = self.runtime.config.image
        if self.max_crops is not None:
            config = replace(config, max_crops=self.max_crops)
        rgb = load_image(question.image())
        prepared = ImageProcessor(config, self.tokenizer.special)(rgb)
        crops = prepared.crops
        if self.perturbed:
            noise = np.random.default_rng(0).uniform(-_PERTURBATION, _PERTURBATION, crops.shape)
            crops = (crops * (1 + noise)).astype(np.float32)
        size = rgb.shape[1], rgb.shape[0]
        prompt = image_ids(self.tokenizer, prepared)
        return ImageInputs(crops, prepared.masks, prompt, size, prepared.overview, prepared.pooling)


@dataclass(frozen=True)
class ReferenceAnswer:
    """The reference's answer to a question, with the logits on disk."""

    question: Question
    image: int  # index of the image among those recorded
    size: tuple[int, int]  # width and height of the image, pixels
    targets: tuple[int, ...]  # token ids of the answer, with the end token if it was reached
    text: str
    logits: Path  # float32 [len(targets), vocab_size]: what each target was chosen from


@dataclass(frozen=True)
class ReferenceOutputs:
    """What `record_reference` wrote to `folder`."""

    folder: Path
    answers: tuple[ReferenceAnswer, ...]  # grouped by image

    def features(self, image: int) -> tuple[np.ndarray, np.ndarray]:
        """Patch features [n, patches^2, feature_dim] and image features [n, cells^2, d_model] of an image."""
        return np.load(self.folder / f"patches-{image}.npy"), np.load(self.folder / f"cells-{image}.npy")

    def by_image(self) -> Iterator[list[ReferenceAnswer]]:
        """Yield the answers about each image."""
        for _, group in groupby(self.answers, key=lambda answer: answer.image):
            yield list(group)


def record_reference(
    model: ModelUnderTest,
    questions: Sequence[Question],
    folder: Path,
    on_answer: Callable[[], None] = lambda: None,
    on_skipped: Callable[[str], None] | None = None,
) -> ReferenceOutputs:
    """Ask the reference greedily and record its outputs in `folder`, which must not exist.

    Questions without an image are left out. Where an image cannot be read, its questions are left out and the reason is
    passed to `on_skipped`; without `on_skipped` an ImageError is raised. Raises NoQuestionsError if none are left.
    """
    asked = [question for question in questions if not question.words_alone]
    if not asked:
        raise NoQuestionsError("there is nothing to compare: no question is about an image")
    folder.mkdir(parents=True)
    runtime, tokenizer = model.runtime, model.tokenizer
    answers: list[ReferenceAnswer] = []
    for image, group in enumerate(by_image(asked)):
        try:
            inputs = model.prepare(group[0])
        except ImageError as error:
            if on_skipped is None:
                raise
            on_skipped(str(error))
            continue
        patches = runtime.encode_crops(inputs.crops, inputs.overview)
        cells = runtime.connect(patches, inputs.masks, inputs.pooling)
        np.save(folder / f"patches-{image}.npy", patches)
        np.save(folder / f"cells-{image}.npy", cells)
        prefilled = PrefilledImage(runtime, tokenizer, with_features(runtime, inputs.prompt, cells), group)
        for question in group:
            logits, targets = prefilled.answer(question)
            path = folder / f"logits-{len(answers)}.npy"
            np.save(path, logits)
            text = answer_text(tokenizer, targets)
            answers.append(ReferenceAnswer(question, image, inputs.size, tuple(targets), text, path))
            on_answer()
    if not answers:
        raise NoQuestionsError("there is nothing to compare: no image can be read")
    return ReferenceOutputs(folder, tuple(answers))


class PrefilledImage:
    """An image, prefilled once, with room in the cache for each of its questions and answers."""

    def __init__(self, runtime: Runtime, tokenizer: Tokenizer, rows: np.ndarray, questions: Sequence[Question]) -> None:
        self.runtime, self._tokenizer = runtime, tokenizer
        self._vocabulary = runtime.config.decoder.vocab_size
        most = runtime.config.decoder.max_position_embeddings
        room = max(len(self._ids(question)) + question.max_new_tokens for question in questions)
        self._cache = runtime.new_cache(min(most, len(rows) + room))
        prefill(runtime, rows, np.arange(len(rows)) > 0, self._cache)  # all but BOS are image tokens

    def begin(self, question: Question) -> tuple[np.ndarray, Cache]:
        """The logits [vocab_size] of the first answer token, and a cache that holds the image and the question.

        Raises EngineError if the question does not fit.
        """
        cache = self._cache.copy()
        return self._logits(self._ids(question), cache), cache

    def feed(self, token: int, cache: Cache) -> np.ndarray:
        """The logits [vocab_size] after one more token."""
        return self._logits(np.array([token], np.int64), cache)

    def answer(self, question: Question) -> tuple[np.ndarray, list[int]]:
        """Greedy: float32 logits [n, vocab_size], and the n ids chosen from them, the end token included."""
        logits, cache = self.begin(question)
        return self.continue_answer(logits, cache, question.max_new_tokens)

    def continue_answer(self, logits: np.ndarray, cache: Cache, most: int) -> tuple[np.ndarray, list[int]]:
        """Like `answer`, from `logits` after the tokens in `cache`, for at most `most` ids or what fits."""
        all_logits, ids = [logits], [likeliest(logits)]
        while ids[-1] != self._tokenizer.special.eos and len(ids) < most and cache.length < cache.capacity:
            all_logits.append(self.feed(ids[-1], cache))
            ids.append(likeliest(all_logits[-1]))
        return np.stack(all_logits), ids

    def _ids(self, question: Question) -> np.ndarray:
        return text_ids(self._tokenizer, [question.text])

    def _logits(self, ids: np.ndarray, cache: Cache) -> np.ndarray:
        return self.runtime.forward(self.runtime.embed(ids), cache)[: self._vocabulary]


def answer_text(tokenizer: Tokenizer, targets: Sequence[int]) -> str:
    """As in `Molmo.ask`: without the end token, and without the space that every answer begins with."""
    return tokenizer.decode([i for i in targets if i != tokenizer.special.eos]).lstrip()
