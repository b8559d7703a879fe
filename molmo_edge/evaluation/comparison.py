"""A candidate held against what the reference did: features, distributions, answers, points and scores.

Teacher-forced figures are taken at every id of the reference's own answer, given the image and the question as the
candidate sees them. What the candidate would have said by itself goes on from where its choice first differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from molmo_edge.evaluation.pointing import drift
from molmo_edge.evaluation.questions import Question
from molmo_edge.evaluation.reference_outputs import (
    ImageInputs,
    ModelUnderTest,
    PrefilledImage,
    ReferenceAnswer,
    ReferenceOutputs,
    answer_text,
)
from molmo_edge.evaluation.text_scores import token_f1
from molmo_edge.frontend.points import Point, parse_points
from molmo_edge.runtimes.generate import likeliest
from molmo_edge.runtimes.prompt_embeddings import with_features


@dataclass(frozen=True)
class FeatureDistance:
    """How far an image's features lie from the reference's: 1 - cosine, over patches or cells."""

    mean: float
    worst: float


@dataclass(frozen=True)
class ComparedImage:
    image_id: str
    patches: FeatureDistance | None  # of the vision encoder; None where the candidate was given the reference's
    cells: FeatureDistance | None  # of the connector


@dataclass(frozen=True)
class ComparedAnswer:
    """One question. Arrays have an entry for each id of the reference's answer, its end among them."""

    question: Question
    kl: np.ndarray  # KL(reference || candidate), nats
    same_top: np.ndarray  # bool: the same likeliest id
    nll: np.ndarray  # of the id, by the candidate, nats
    nll_reference: np.ndarray
    divergence: int | None  # index of the first id that the candidate would have chosen otherwise
    reference_text: str
    text: str
    drift: tuple[float, ...]  # percent of the diagonal, of points matched between the two answers
    unmatched: int  # points that only one of the two answers has
    scores_reference: dict[str, float]
    scores: dict[str, float]

    @property
    def reference_points(self) -> list[Point]:
        return parse_points(self.reference_text)

    @property
    def points(self) -> list[Point]:
        return parse_points(self.text)


@dataclass
class Comparison:
    images: list[ComparedImage] = field(default_factory=list)
    answers: list[ComparedAnswer] = field(default_factory=list)


def compare(
    trace: ReferenceOutputs,
    subject: ModelUnderTest,
    *,
    encode_images: bool = True,
    on_answer: Callable[[], None] = lambda: None,
) -> Comparison:
    """Ask the candidate what the reference was asked. `see` False: it is given the reference's image features.

    Both must take the same ids: `check_comparable` before.
    """
    found = Comparison()
    for group in trace.by_image():
        first = group[0]
        patches, cells = trace.features(first.image)
        seen = subject.prepare(first.question)
        own_patches, own_cells = _encode(subject, seen) if encode_images else (None, cells)
        kept = seen.prompt.token_index >= 0  # the others' places are another crop's: the decoder never sees them
        found.images.append(
            ComparedImage(
                first.question.image_id,
                None if own_patches is None else _features(patches, own_patches),
                _features(cells[kept], own_cells[kept]) if encode_images else None,
            )
        )
        rows = with_features(subject.runtime, seen.prompt, own_cells)
        prefilled = PrefilledImage(subject.runtime, subject.tokenizer, rows, [answered.question for answered in group])
        for answered in group:
            found.answers.append(_compare_answer(subject, prefilled, answered))
            on_answer()
    return found


def _encode(subject: ModelUnderTest, seen: ImageInputs) -> tuple[np.ndarray, np.ndarray]:
    patches = subject.runtime.encode_crops(seen.crops, seen.overview)
    return patches, subject.runtime.connect(patches, seen.masks)


def _features(exact: np.ndarray, found: np.ndarray) -> FeatureDistance:
    distance = cosine_distance(exact, found)
    return FeatureDistance(float(distance.mean()), float(distance.max()))


def cosine_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 - cosine along the last axis, float64, exactly 0 for equal vectors; of two zero vectors 0, of one 1."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    product, squares = (a * b).sum(-1), (a * a).sum(-1) * (b * b).sum(-1)
    equal = (a == b).all(-1)
    cosine = np.divide(product, np.sqrt(squares), out=np.zeros_like(product), where=squares > 0)
    return np.where(equal, 0.0, np.maximum(0.0, 1 - cosine))


def _compare_answer(subject: ModelUnderTest, prefilled: PrefilledImage, answered: ReferenceAnswer) -> ComparedAnswer:
    question, targets = answered.question, list(answered.targets)
    exact = np.load(answered.logits, mmap_mode="r")
    logits, cache = prefilled.begin(question)
    start, kl, nll, nll_reference, chosen = cache.length, [], [], [], []
    divergence, parting = None, logits
    for i, token in enumerate(targets):  # one at a time: a row may be a vocabulary of 150,000
        p, q = log_softmax(exact[i]), log_softmax(logits)
        # Rounding may leave a tiny negative sum where the two are all but equal.
        kl.append(max(0.0, float(np.exp(p) @ (p - q))))
        nll.append(-float(q[token]))
        nll_reference.append(-float(p[token]))
        chosen.append(likeliest(logits))
        if divergence is None and chosen[-1] != token:
            divergence, parting = i, logits
        if i + 1 < len(targets):
            logits = prefilled.feed(token, cache)
    text = answered.text
    if divergence is not None:
        cache.length = start + divergence  # forget what it would not have said
        _, own = prefilled.go_on(parting, cache, question.max_new_tokens - divergence)
        text = answer_text(subject.tokenizer, [*targets[:divergence], *own])
    a, b = parse_points(answered.text), parse_points(text)
    moved = drift(a, b, *answered.size)
    reference_scores, scores = (_scores(question, answered.text, one) for one in (answered.text, text))
    return ComparedAnswer(
        question=question,
        kl=np.array(kl),
        same_top=np.array(chosen) == np.array(targets),
        nll=np.array(nll),
        nll_reference=np.array(nll_reference),
        divergence=divergence,
        reference_text=answered.text,
        text=text,
        drift=tuple(moved),
        unmatched=len(a) + len(b) - 2 * len(moved),
        scores_reference=reference_scores,
        scores=scores,
    )


def _scores(question: Question, reference_text: str, text: str) -> dict[str, float]:
    if question.kind == "caption":
        return {"same words (F1)": token_f1(text, reference_text)}
    return question.score(text)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64, along the last axis."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
