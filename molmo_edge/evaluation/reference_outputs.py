"""What the reference did with each image and question, kept on disk for candidates to be held against.

The disk, not memory: logits of a vocabulary of 50,000 take 0.2 MB a token. Float32, so that a copy of the reference
measures exactly nothing.
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
from molmo_edge.frontend.prompts import Prompt, image_ids, text_ids
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.runtimes import Cache, PartedRuntime, Runtime
from molmo_edge.runtimes.generate import likeliest
from molmo_edge.runtimes.prompt_embeddings import with_features


class NoQuestionsError(MolmoEdgeError):
    """Nothing to keep."""


_PERTURBATION = 1e-6  # of a pixel's value: less than two resizing libraries differ by


@dataclass(frozen=True)
class ModelUnderTest:
    """A model as it is measured."""

    runtime: PartedRuntime
    tokenizer: Tokenizer
    max_crops: int | None = None
    perturbed: bool = False  # pixels by a millionth: what is then found is no loss, but noise

    def prepare(self, question: Question) -> ImageInputs:
        """The question's image, cropped. Raises ImageError."""
        image = question.image()
        config = self.runtime.config.image
        if self.max_crops is not None:
            config = replace(config, max_crops=self.max_crops)
        rgb = load_image(image)
        prepared = ImageProcessor(config, self.tokenizer.special)(rgb)
        crops = prepared.crops
        if self.perturbed:
            noise = np.random.default_rng(0).uniform(-_PERTURBATION, _PERTURBATION, crops.shape)
            crops = (crops * (1 + noise)).astype(np.float32)
        size = rgb.shape[1], rgb.shape[0]
        return ImageInputs(crops, prepared.masks, image_ids(self.tokenizer, prepared), size, prepared.overview)


@dataclass(frozen=True)
class ImageInputs:
    crops: np.ndarray  # float32 [n, patches^2, 588]
    masks: np.ndarray  # float32 [n, patches^2]
    prompt: Prompt
    size: tuple[int, int]  # width and height of the image, pixels
    overview: Overview | None = None


@dataclass(frozen=True)
class ReferenceAnswer:
    """One question, as the reference answered it."""

    question: Question
    image: int  # its number in the trace
    size: tuple[int, int]  # width and height of the image
    targets: tuple[int, ...]  # ids of the answer, and the end where it came to one
    text: str
    logits: Path  # float32 [len(targets), vocab_size]: what each target was chosen from


@dataclass(frozen=True)
class ReferenceOutputs:
    folder: Path
    answers: tuple[ReferenceAnswer, ...]  # those about one image side by side
    tokenizer: Tokenizer

    def features(self, image: int) -> tuple[np.ndarray, np.ndarray]:
        """Patch features [n, patches^2, feature_dim] and image features [n, cells^2, d_model] of an image."""
        return np.load(self.folder / f"patches-{image}.npy"), np.load(self.folder / f"cells-{image}.npy")

    def by_image(self) -> Iterator[list[ReferenceAnswer]]:
        for _, some in groupby(self.answers, key=lambda answered: answered.image):
            yield list(some)


def record_reference(
    subject: ModelUnderTest, questions: Sequence[Question], folder: Path, on_answer: Callable[[], None] = lambda: None
) -> ReferenceOutputs:
    """Ask the reference, greedily, and keep what it did in `folder`, which it makes. Words alone are left out.

    Raises NoQuestionsError where nothing is left.
    """
    asked = [question for question in questions if not question.words_alone]
    if not asked:
        raise NoQuestionsError("there is nothing to compare: no question is about an image")
    folder.mkdir(parents=True)
    runtime, tokenizer = subject.runtime, subject.tokenizer
    found: list[ReferenceAnswer] = []
    for image, group in enumerate(by_image(asked)):
        seen = subject.prepare(group[0])
        patches = runtime.encode_crops(seen.crops, seen.overview)
        cells = runtime.connect(patches, seen.masks)
        np.save(folder / f"patches-{image}.npy", patches)
        np.save(folder / f"cells-{image}.npy", cells)
        prefilled = PrefilledImage(runtime, tokenizer, with_features(runtime, seen.prompt, cells), group)
        for question in group:
            logits, targets = prefilled.answer(question)
            path = folder / f"logits-{len(found)}.npy"
            np.save(path, logits)
            text = answer_text(tokenizer, targets)
            found.append(ReferenceAnswer(question, image, seen.size, tuple(targets), text, path))
            on_answer()
    return ReferenceOutputs(folder, tuple(found), tokenizer)


class PrefilledImage:
    """An image, prefilled once, with room for each of its questions and their answers."""

    def __init__(self, runtime: Runtime, tokenizer: Tokenizer, rows: np.ndarray, questions: Sequence[Question]) -> None:
        self.runtime, self._tokenizer, self.rows = runtime, tokenizer, rows
        self._vocabulary = runtime.config.decoder.vocab_size
        most = runtime.config.decoder.max_position_embeddings
        room = max(len(self.ids(question)) + question.max_new_tokens for question in questions)
        self._cache = runtime.new_cache(min(most, len(rows) + room))
        runtime.forward(rows, self._cache)

    def ids(self, question: Question) -> np.ndarray:
        return text_ids(self._tokenizer, [question.text])

    def begin(self, question: Question) -> tuple[np.ndarray, Cache]:
        """The logits [vocab_size] that the first id is chosen from, and a cache behind the question.

        Raises EngineError where the question alone does not fit.
        """
        cache = self._cache.copy()
        return self._logits(self.runtime.embed(self.ids(question)), cache), cache

    def feed(self, token: int, cache: Cache) -> np.ndarray:
        """The logits behind one more id."""
        return self._logits(self.runtime.embed(np.array([token], np.int64)), cache)

    def answer(self, question: Question) -> tuple[np.ndarray, list[int]]:
        """Greedy: float32 logits [n, vocab_size], and the n ids chosen from them, the end included."""
        logits, cache = self.begin(question)
        return self.go_on(logits, cache, question.max_new_tokens)

    def go_on(self, logits: np.ndarray, cache: Cache, most: int) -> tuple[np.ndarray, list[int]]:
        """As `answer`, behind what `cache` holds, `most` ids at most and as many as fit."""
        seen, ids = [logits], [likeliest(logits)]
        while ids[-1] != self._tokenizer.special.eos and len(ids) < most and cache.length < cache.capacity:
            seen.append(self.feed(ids[-1], cache))
            ids.append(likeliest(seen[-1]))
        return np.stack(seen), ids

    def _logits(self, rows: np.ndarray, cache: Cache) -> np.ndarray:
        return self.runtime.forward(rows, cache)[: self._vocabulary]


def answer_text(tokenizer: Tokenizer, targets: Sequence[int]) -> str:
    """As `Molmo.ask` gives it: without the end, and without the space that every answer begins with."""
    return tokenizer.decode([i for i in targets if i != tokenizer.special.eos]).lstrip()
