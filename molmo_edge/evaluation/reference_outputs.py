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
from molmo_edge.evaluation.answer_runs import ImageInputs, PrefilledImage
from molmo_edge.evaluation.questions import Question, by_image
from molmo_edge.frontend.crops import ImageProcessor, load_image
from molmo_edge.frontend.image_files import ImageError
from molmo_edge.frontend.prompts import image_ids
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.runtimes import PartedRuntime
from molmo_edge.sdk.encoding import image_part

_PERTURBATION = 1e-6  # relative, of each pixel: less than the difference between two resizing libraries


class NoQuestionsError(MolmoEdgeError):
    """There is nothing to compare."""


@dataclass(frozen=True)
class ModelUnderTest:
    """A loaded model and the settings of its image inputs."""

    runtime: PartedRuntime
    tokenizer: Tokenizer
    max_crops: int | None = None
    perturbed: bool = False  # pixels are changed by a millionth, to measure noise

    def prepare(self, question: Question) -> ImageInputs:
        """The question's image as model inputs. Raises ImageError."""
        config = self.runtime.config.image
        if self.max_crops is not None:
            config = replace(config, max_crops=self.max_crops)
        rgb = load_image(question.image())
        height, width = rgb.shape[:2]
        prepared = ImageProcessor(config, self.tokenizer.special)(rgb)
        if self.perturbed:
            crops = prepared.crops
            noise = np.random.default_rng(0).uniform(-_PERTURBATION, _PERTURBATION, crops.shape)
            prepared = replace(prepared, crops=(crops * (1 + noise)).astype(np.float32))
        prompt = image_ids(self.tokenizer, prepared)
        grounded = self.runtime.config.point_head is not None
        part = image_part(config, prepared, (height, width), prompt.token_index, grounded=grounded)
        return ImageInputs(part, prompt, (width, height))


@dataclass(frozen=True)
class ReferenceAnswer:
    """The reference's answer to a question, with the logits on disk."""

    question: Question
    image: int  # index of the image among those recorded
    size: tuple[int, int]  # width and height of the image, pixels
    targets: tuple[int, ...]  # token ids of the answer, with the end token if it was reached
    text: str  # with coordinates in place of grounding tokens
    logits: Path  # float32 [len(targets), n_ids]: what each target was chosen from, see `AnswerRun.scores`


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
        patches, cells = inputs.part.features(runtime)
        np.save(folder / f"patches-{image}.npy", patches)
        np.save(folder / f"cells-{image}.npy", cells)
        prefilled = PrefilledImage(runtime, tokenizer, inputs, patches, cells, group)
        for question in group:
            logits, targets = prefilled.begin(question).finish(question.max_new_tokens)
            path = folder / f"logits-{len(answers)}.npy"
            np.save(path, logits)
            text = prefilled.text(targets)
            answers.append(ReferenceAnswer(question, image, inputs.size, tuple(targets), text, path))
            on_answer()
    if not answers:
        raise NoQuestionsError("there is nothing to compare: no image can be read")
    return ReferenceOutputs(folder, tuple(answers))
