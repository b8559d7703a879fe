"""Teacher and student with different tokenizers: which of their predictions can be compared, and over which classes.

Rule. Both models read the same answer, as bytes. A prediction of the student is compared with one of the teacher if
the tokens that they predict begin at the same byte, because both then continue the same text; the other positions have
no teacher. Where the texts of the two answers differ (Molmo v1 and Molmo2 write points differently), positions after
the first difference have none either. The two distributions are compared over the tokens that both vocabularies have,
identified by their bytes, and one class for all others; the ends of an answer are the same token.

Comparing at boundaries that coincide is what FuseLLM (arXiv 2401.10491) and approximate likelihood matching (arXiv
2503.20083) build on. ULD (arXiv 2402.12030) compares sorted probabilities instead and needs no shared tokens, but
cannot tell which token a probability belongs to.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.training.packing import Packed


class Run(NamedTuple):
    """One answer of a sequence."""

    first: int  # its first prediction, counted among the predictions of answers of the sequence
    starts: tuple[int, ...]  # for each prediction, the byte at which its token begins
    text: bytes
    lead: int  # spaces before the text


def answer_runs(packed: Packed, tokenizer: Tokenizer) -> dict[tuple[int, int], Run]:
    """The answers of a sequence by (number of the annotation, number of the answer in it)."""
    at = np.flatnonzero(packed.loss_weights)
    segments, targets = packed.segments[at], packed.targets[at]
    ended = np.concatenate([[True], targets[:-1] == tokenizer.special.eos]) if len(at) else np.zeros(0, bool)
    ended |= np.diff(at, prepend=-2) > 1
    ended |= np.diff(segments, prepend=-2) != 0
    runs: dict[tuple[int, int], Run] = {}
    for first, end in pairwise([*np.flatnonzero(ended).tolist(), len(at)]):
        segment = int(segments[first])
        number = sum(key[0] == segment for key in runs)
        eos = tokenizer.special.eos
        # Tokens without text, such as grounding tokens, stand for a byte that no text has.
        parts = [
            b"" if token == eos else tokenizer.token_bytes(token) or b"\0" for token in targets[first:end].tolist()
        ]
        text = b"".join(parts)
        lead = len(text) - len(text.lstrip(b" "))
        starts = accumulate((len(part) for part in parts[:-1]), initial=-lead)
        runs[segment, number] = Run(first, tuple(starts), text[lead:], lead)
    return runs


def aligned(student: dict[tuple[int, int], Run], teacher: dict[tuple[int, int], Run]) -> np.ndarray:
    """int64 [p, 2]: pairs of predictions to compare, each counted among those of answers of its sequence."""
    pairs = []
    for key, ours in student.items():
        theirs = teacher.get(key)
        if theirs is None:
            continue
        same = next(
            (n for n, (a, b) in enumerate(zip(ours.text, theirs.text, strict=False)) if a != b),
            min(len(ours.text), len(theirs.text)),
        )
        # A first token with a space before it and one without are different tokens for the same text.
        least = 1 if ours.lead != theirs.lead else min(0, -ours.lead)
        at = {start: theirs.first + n for n, start in enumerate(theirs.starts)}
        pairs += [
            (ours.first + n, at[start]) for n, start in enumerate(ours.starts) if least <= start <= same and start in at
        ]
    return np.array(pairs, np.int64).reshape(-1, 2)


def shared_tokens(
    student: Tokenizer, teacher: Tokenizer, student_logits: int, teacher_logits: int
) -> tuple[Tensor, Tensor] | None:
    """int64 [s] ids of the student and of the teacher of the tokens that both have; None if all logits correspond."""
    if student.definition == teacher.definition and student_logits == teacher_logits:
        return None
    ours, theirs = _by_bytes(student, student_logits), _by_bytes(teacher, teacher_logits)
    both = [(ours[text], theirs[text]) for text in ours if text in theirs]
    both.append((student.special.eos, teacher.special.eos))
    pairs = torch.tensor(both, dtype=torch.long)
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()


def _by_bytes(tokenizer: Tokenizer, n_logits: int) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for token in range(n_logits):
        if token not in tokenizer.special_ids and (text := tokenizer.token_bytes(token)):
            found.setdefault(text, token)
    return found
