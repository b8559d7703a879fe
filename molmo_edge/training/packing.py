"""Packing: all annotations of an image in one sequence that starts with the image.

Reference: olmo/data/model_preprocessor.py, MultiModalPreprocessor.__call__ (golden `packing`). A text token attends to
the image and to its own annotation only, and the positions of each annotation start after the image. Training on the
packed sequence thus equals training on the annotations one by one, but the image is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from molmo_edge.frontend.tokenizer import Tokenizer

IMAGE_SEGMENT = 10000  # larger than any annotation's number: annotations attend to the image, not the reverse


@dataclass(frozen=True)
class Packed:
    """One training sequence of n tokens; arrays are int32 [n] unless stated otherwise."""

    input_ids: np.ndarray
    targets: np.ndarray  # the next token
    loss_weights: np.ndarray  # float32; 0 where the target is not part of an answer
    segments: np.ndarray  # IMAGE_SEGMENT, or the number of the annotation from 1
    positions: np.ndarray
    answer_starts: tuple[int, ...]  # per annotation: where its last answer's first token is the input


def pack(
    tokenizer: Tokenizer,
    image_tokens: np.ndarray,
    annotations: Sequence[Sequence[str | list[int]]],
    *,
    weighting: str = "root_subsegments",
    weights: Sequence[float] | None = None,
    separator: int | None = None,
) -> Packed:
    """Pack annotations, each a list of messages (prompt, answer, prompt, answer, ...): texts with their leading spaces,
    or ids.

    image_tokens: int32 [m], without BOS; empty for text alone. Each annotation has at least one answer. weighting:
    "root_subsegments" divides each annotation's loss weights by the square root of the number of annotations, "none"
    does not. weights: of each annotation, 1 by default. separator: id of a token that follows each annotation except
    the last, as an input without a loss; the reference has none.
    """
    special = tokenizer.special
    ids = [special.bos, *image_tokens.tolist()]
    head = len(ids)
    answered, segments, positions = [0.0] * head, [IMAGE_SEGMENT] * head, list(range(head))
    answer_starts = []
    share = 1.0 / math.sqrt(max(1, len(annotations))) if weighting == "root_subsegments" else 1.0
    for number, messages in enumerate(annotations, start=1):
        first = len(ids)
        weight = share if weights is None else share * weights[number - 1]
        for turn, message in enumerate(messages):
            answer = turn % 2 == 1
            if answer:
                start = len(ids)
            tokens = tokenizer.encode(message) if isinstance(message, str) else message
            ids += [*tokens, special.eos] if answer else tokens
            answered += [weight * answer] * (len(tokens) + answer)
        if separator is not None and number < len(annotations):
            ids.append(separator)
            answered.append(0.0)
        answer_starts.append(start)
        segments += [number] * (len(ids) - first)
        positions += range(head, head + len(ids) - first)
    # One shift over the whole sequence, as in the reference: an annotation's EOS stays an input, whose
    # target, the next annotation's first token, has no weight.
    return Packed(
        np.array(ids[:-1], np.int32),
        np.array(ids[1:], np.int32),
        np.array(answered[1:], np.float32),
        np.array(segments[:-1], np.int32),
        np.array(positions[:-1], np.int32),
        tuple(answer_starts),
    )


def attention_mask(segments: np.ndarray) -> np.ndarray:
    """bool [n, n]: whether query i (row) attends to key j (column): causal, and never to another annotation."""
    n = len(segments)
    return np.asarray((segments[:, None] <= segments[None, :]) & np.tri(n, dtype=bool))
