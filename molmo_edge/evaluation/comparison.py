"""A candidate compared with the reference's recorded outputs: features, distributions, answers, points and scores.

Distributions are teacher-forced: they are compared at each token of the reference's own answer. The candidate's own
greedy answer continues from the first token at which its choice differs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np

from molmo_edge.evaluation.answer_runs import PrefilledImage
from molmo_edge.evaluation.pointing import drift
from molmo_edge.evaluation.questions import Question
from molmo_edge.evaluation.reference_outputs import ModelUnderTest, ReferenceAnswer, ReferenceOutputs
from molmo_edge.evaluation.text_scores import token_f1
from molmo_edge.frontend.points import Point, parse_points


@dataclass(frozen=True)
class FeatureDistance:
    """1 - cosine between two models' features of an image, over patches or cells."""

    mean: float
    worst: float


@dataclass(frozen=True)
class ComparedImage:
    """The distances between two models' features of an image."""

    image_id: str
    patches: FeatureDistance | None  # of the vision encoder; None where they were not compared, see `compare`
    cells: FeatureDistance | None  # of the connector


@dataclass(frozen=True)
class ComparedAnswer:
    """One question. Arrays have an entry for each token of the reference's answer, the end token included."""

    question: Question
    kl: np.ndarray  # KL(reference || candidate), nats
    same_top: np.ndarray  # bool: the same most likely token
    nll: np.ndarray  # of the token, by the candidate, nats
    nll_reference: np.ndarray
    divergence: int | None  # index of the first token that the candidate would have chosen differently
    reference_text: str
    text: str
    drift: tuple[float, ...]  # percent of the diagonal, of matched points
    unmatched: int  # points that only one of the two answers has
    scores_reference: dict[str, float]
    scores: dict[str, float]
    grounding: np.ndarray | None = None  # bool, which tokens are grounding tokens; None: the model has none

    @property
    def reference_points(self) -> list[Point]:
        """The points in the reference's answer."""
        return parse_points(self.reference_text)

    @property
    def points(self) -> list[Point]:
        """The points in the candidate's answer."""
        return parse_points(self.text)


@dataclass
class Comparison:
    """What `compare` measures for each image and each question."""

    images: list[ComparedImage] = field(default_factory=list)
    answers: list[ComparedAnswer] = field(default_factory=list)


def compare(
    outputs: ReferenceOutputs,
    model: ModelUnderTest,
    *,
    encode_images: bool = True,
    rotated: Collection[str] = (),
    on_answer: Callable[[], None] = lambda: None,
) -> Comparison:
    """Ask the candidate what the reference was asked; both must tokenize alike (`check_comparable`).

    `encode_images` False: the candidate's decoder gets the reference's image features. `rotated`: components whose
    hidden channels are rotated in one of the two models only (`Manifest.rotated`), so that features cannot be compared.
    """
    comparison = Comparison()
    for group in outputs.by_image():
        question = group[0].question
        patches, cells = outputs.features(group[0].image)
        inputs = model.prepare(question)
        compared = ComparedImage(question.image_id, None, None)
        own_patches, own_cells = patches, cells
        if encode_images:
            own_patches, own_cells = inputs.part.features(model.runtime)
            used = inputs.prompt.token_index >= 0  # the decoder sees no other cells: crops overlap
            compared = ComparedImage(
                question.image_id,
                None if "vision_encoder" in rotated else _distance(patches, own_patches),
                None if "decoder" in rotated else _distance(cells[used], own_cells[used]),
            )
        comparison.images.append(compared)
        questions = [answer.question for answer in group]
        prefilled = PrefilledImage(model.runtime, model.tokenizer, inputs, own_patches, own_cells, questions)
        for answer in group:
            comparison.answers.append(_compare_answer(prefilled, answer))
            on_answer()
    return comparison


def _distance(reference: np.ndarray, candidate: np.ndarray) -> FeatureDistance:
    distance = cosine_distance(reference, candidate)
    return FeatureDistance(float(distance.mean()), float(distance.max()))


def cosine_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 - cosine along the last axis in float64: exactly 0 for equal vectors, 1 if only one of them is zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    product, squares = (a * b).sum(-1), (a * a).sum(-1) * (b * b).sum(-1)
    cosine = np.divide(product, np.sqrt(squares), out=np.zeros_like(product), where=squares > 0)
    return np.where((a == b).all(-1), 0.0, np.maximum(0.0, 1 - cosine))


def _compare_answer(prefilled: PrefilledImage, answer: ReferenceAnswer) -> ComparedAnswer:
    question, targets = answer.question, list(answer.targets)
    reference_logits = np.load(answer.logits, mmap_mode="r")
    run = prefilled.begin(question)
    kl, nll, nll_reference, chosen = [], [], [], []
    for i, token in enumerate(targets):  # one by one: the vocabulary may have 150,000 entries
        p, q = log_softmax(reference_logits[i]), log_softmax(run.scores)
        possible = p > -np.inf  # the same ids for both: the order of grounding tokens depends on the tokens alone
        # Rounding can leave a tiny negative sum.
        kl.append(max(0.0, float(np.exp(p[possible]) @ (p[possible] - q[possible]))))
        nll.append(-float(q[token]))
        nll_reference.append(-float(p[token]))
        chosen.append(run.choice)
        if i + 1 < len(targets):
            run.feed(token)
    text = answer.text
    divergence = next((i for i, (a, b) in enumerate(zip(chosen, targets, strict=True)) if a != b), None)
    if divergence is not None:
        run.rewind(divergence)  # drop the tokens that the candidate would not have chosen
        _, own = run.finish(question.max_new_tokens - divergence, first=chosen[divergence])
        text = prefilled.text([*targets[:divergence], *own])
    a, b = parse_points(answer.text), parse_points(text)
    distances = drift(a, b, *answer.size)
    scores_reference, scores = (_scores(question, answer.text, one) for one in (answer.text, text))
    return ComparedAnswer(
        question=question,
        kl=np.array(kl),
        same_top=np.array(chosen) == np.array(targets),
        nll=np.array(nll),
        nll_reference=np.array(nll_reference),
        divergence=divergence,
        reference_text=answer.text,
        text=text,
        drift=tuple(distances),
        unmatched=len(a) + len(b) - 2 * len(distances),
        scores_reference=scores_reference,
        scores=scores,
        grounding=prefilled.are_grounding(targets),
    )


def _scores(question: Question, reference_text: str, text: str) -> dict[str, float]:
    if question.kind == "caption":
        return {"same words (F1)": token_f1(text, reference_text)}
    return question.score(text)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Float64, along the last axis."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide
