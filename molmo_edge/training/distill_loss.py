"""The losses of distillation, as formulas over rows: divergences of distributions, and distances of states.

A row is a token of an answer. Its distributions are over all logits, or over a few classes: the teacher's most likely
tokens, and one class for the remaining mass. Hinton et al. (arXiv 1503.02531): with a temperature, the divergence is
multiplied by its square, so that gradients keep their size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_FLOOR = -60.0  # of log-probabilities: a class without mass must not give an infinite reverse divergence
_CLOSED = -1e9  # of logits; not -inf, whose logsumexp has no gradient if all are closed


def teacher_classes(
    logits: Tensor, top_k: int, temperature: float, shared: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The teacher's logits [m, n] -> float32 log-probabilities [m, k + 1] and the ids of the first k classes [m, k].

    The last class is everything else. shared: (ids of the student [s], ids of the teacher [s]) of the tokens that both
    have; others belong to the last class. top_k 0: all of them. Without `shared`, and with top_k 0 or at least n, all
    logits are classes: [m, n] and [m, 0].
    """
    scaled = logits.float() / temperature
    total = scaled.logsumexp(-1, keepdim=True)
    n = scaled.shape[-1] if shared is None else len(shared[1])
    k = min(top_k, n) if top_k else n
    if shared is None and k == n:
        return scaled - total, torch.zeros(len(scaled), 0, dtype=torch.long, device=scaled.device)
    candidates = scaled if shared is None else scaled.index_select(-1, shared[1])
    best, chosen = candidates.topk(k, dim=-1)
    rows = chosen if shared is None else shared[1][chosen]
    rest = scaled.scatter(-1, rows, _CLOSED).logsumexp(-1, keepdim=True)
    log_probs = (torch.cat([best, rest], dim=-1) - total).clamp(min=_FLOOR)
    return log_probs, chosen if shared is None else shared[0][chosen]


def class_log_probs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """The student's logits [m, n] over the classes of `teacher_classes`: float32 [m, k + 1], or [m, n] without ids."""
    scaled = logits.float() / temperature
    if not ids.shape[-1]:
        return scaled.log_softmax(-1)
    rest = scaled.scatter(-1, ids, _CLOSED).logsumexp(-1, keepdim=True)
    total = scaled.logsumexp(-1, keepdim=True)
    return (torch.cat([scaled.gather(-1, ids), rest], dim=-1) - total).clamp(min=_FLOOR)


def divergence(student: Tensor, teacher: Tensor, reverse: float = 0.0) -> Tensor:
    """Log-probabilities [m, n] of both -> float32 [m]: (1 - reverse) KL(teacher | student) + reverse KL(student |
    teacher).

    The forward divergence covers all that the teacher says, the reverse one avoids what it does not say (MiniLLM,
    arXiv 2306.08543; the mix as in arXiv 2402.03898).
    """
    teacher = teacher.float().clamp(min=_FLOOR)
    teacher = teacher - teacher.logsumexp(-1, keepdim=True)  # rounding of a cache
    difference = teacher - student
    total = (teacher.exp() * difference).sum(-1)
    if not reverse:
        return total
    return (1 - reverse) * total - reverse * (student.exp() * difference).sum(-1)


def token_divergence(
    logits: Tensor, log_probs: Tensor, ids: Tensor, temperature: float = 1.0, reverse: float = 0.0
) -> Tensor:
    """The student's logits [m, n] against the result of `teacher_classes` -> float32 [m], times temperature^2."""
    return temperature**2 * divergence(class_log_probs(logits, ids, temperature), log_probs, reverse)


def choice_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, reverse: float = 0.0) -> Tensor:
    """Scores [m, n] of the same choices by student and teacher -> float32 [m], times temperature^2."""
    ours, theirs = ((scores.float() / temperature).log_softmax(-1) for scores in (student, teacher))
    return temperature**2 * divergence(ours, theirs, reverse)


def state_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """States [..., d] -> float32 [...]: 2 - 2 cos, the mean squared difference of the states scaled to mean square 1.

    Without scaling, a few channels and tokens a hundred times larger than others would be the whole loss.
    """
    return 2 - 2 * F.cosine_similarity(student.float(), teacher.float(), dim=-1)
