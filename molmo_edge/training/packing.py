"""Every annotation of an image in one sequence, behind one image block.

Reference: olmo/data/model_preprocessor.py, MultiModalPreprocessor.__call__ (golden `packing`). A text token
sees the image and its own annotation only, and each annotation's positions restart right after the image,
so that training on the pack equals training on the annotations one by one at the price of one image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from molmo_edge.tokenizer import Tokenizer

IMAGE_SEGMENT = 10000  # larger than any annotation's number: all annotations see the image, it sees none of them
NO_TARGET = -1


@dataclass(frozen=True)
class Packed:
    """One training sequence of n tokens; arrays are int32 [n] unless said otherwise."""

    input_ids: np.ndarray
    targets: np.ndarray  # the next token within the same annotation
    loss_weights: np.ndarray  # float32; 0 where the target is not part of an answer
    segments: np.ndarray  # IMAGE_SEGMENT, or the number of the annotation from 1
    positions: np.ndarray
    answer_starts: tuple[int, ...]  # per annotation: where its last answer's first token is the input


def pack(
    tokenizer: Tokenizer,
    image_tokens: np.ndarray,
    annotations: Sequence[Sequence[str]],
    *,
    weighting: str = "root_subsegments",
) -> Packed:
    """Pack annotations, each a list of messages (prompt, answer, prompt, answer, ...) with their leading spaces.

    image_tokens: int32 [m], without BOS. weighting: "root_subsegments" divides each annotation's loss
    weights by the square root of the number of annotations, "none" leaves them 1.
    """
    special = tokenizer.special
    head = [special.bos, *image_tokens.tolist()]
    ids, targets, weights = list(head), [*head[1:], NO_TARGET], [0.0] * len(head)
    segments, positions = [IMAGE_SEGMENT] * len(head), list(range(len(head)))
    answer_starts = []
    weight = 1.0 / math.sqrt(len(annotations)) if weighting == "root_subsegments" else 1.0
    for number, messages in enumerate(annotations, start=1):
        tokens: list[int] = []
        answered: list[float] = []  # 1 where the token belongs to an answer or ends one
        start = 0
        for turn, message in enumerate(messages):
            answer = turn % 2 == 1
            start = len(ids) + len(tokens)
            part = tokenizer.encode(message) + ([special.eos] if answer else [])
            tokens += part
            answered += [float(answer)] * len(part)
        answer_starts.append(start)
        # The image's last token predicts nothing: the first token of an annotation is never an answer.
        ids += tokens[:-1]
        targets += tokens[1:]
        weights += [weight * a for a in answered[1:]]
        segments += [number] * (len(tokens) - 1)
        positions += range(len(head), len(head) + len(tokens) - 1)
    return Packed(
        np.array(ids, np.int32),
        np.array(targets, np.int32),
        np.array(weights, np.float32),
        np.array(segments, np.int32),
        np.array(positions, np.int32),
        tuple(answer_starts),
    )


def attention_mask(segments: np.ndarray) -> np.ndarray:
    """bool [n, n]: may query i (row) see key j (column)? Causal, and never another annotation."""
    n = len(segments)
    return (segments[:, None] <= segments[None, :]) & np.tri(n, dtype=bool)
