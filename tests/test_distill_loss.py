"""The losses of distillation against plain formulas, and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from molmo_edge.training.distill_loss import (
    choice_divergence,
    class_log_probs,
    divergence,
    state_distance,
    teacher_classes,
    token_divergence,
)


def logits(seed: int, rows: int = 4, n: int = 11) -> Tensor:
    return 3 * torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(student: Tensor, teacher: Tensor, temperature: float, reverse: float) -> Tensor:
    """By definition, from probabilities."""
    q = torch.softmax(student / temperature, -1)
    p = torch.softmax(teacher / temperature, -1)
    forward = (p * (p / q).log()).sum(-1)
    backward = (q * (q / p).log()).sum(-1)
    return temperature**2 * ((1 - reverse) * forward + reverse * backward)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("reverse", [0.0, 0.3, 1.0])
def test_all_logits(temperature: float, reverse: float) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    classes = teacher_classes(teacher, 0, temperature)
    assert classes[1].shape == (4, 0)
    ours = token_divergence(student, *classes, temperature, reverse)
    expected = plain(student, teacher, temperature, reverse)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(choice_divergence(student, teacher, temperature, reverse), ours, rtol=1e-5, atol=1e-6)
    weights = torch.arange(1.0, 5.0)
    (grad,) = torch.autograd.grad((ours * weights).sum(), student)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), student)
    torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-4)
    same = token_divergence(teacher, *classes, temperature, reverse)
    assert same.abs().max() < 1e-4


def merged(probabilities: Tensor, ids: Tensor) -> Tensor:
    """The probabilities of the tokens `ids` [m, k], and the sum of all others."""
    chosen = probabilities.gather(1, ids)
    return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], dim=1)


@pytest.mark.parametrize("reverse", [0.0, 0.5])
def test_the_most_likely_tokens_and_one_class_for_the_rest(reverse: float) -> None:
    student, teacher, temperature = logits(2).requires_grad_(), logits(3), 1.5
    log_probs, ids = teacher_classes(teacher, 3, temperature)
    assert ids.tolist() == teacher.topk(3).indices.tolist()
    p, q = (merged(torch.softmax(x / temperature, -1), ids) for x in (teacher, student))
    torch.testing.assert_close(log_probs.exp().double(), p, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(class_log_probs(student, ids, temperature).exp().double(), q, rtol=1e-4, atol=1e-6)
    expected = (1 - reverse) * (p * (p / q).log()).sum(-1) + reverse * (q * (q / p).log()).sum(-1)
    ours = token_divergence(student, log_probs, ids, temperature, reverse)
    torch.testing.assert_close(ours.double(), temperature**2 * expected, rtol=1e-3, atol=1e-4)
    (grad,) = torch.autograd.grad(ours.sum(), student)
    (wanted,) = torch.autograd.grad(temperature**2 * expected.sum(), student)
    torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-4)
    # Merging classes can only lose information.
    every = token_divergence(student, *teacher_classes(teacher, 0, temperature), temperature, reverse)
    assert (ours <= every + 1e-5).all()


def test_tokens_of_another_vocabulary() -> None:
    student, teacher = logits(4, n=7), logits(5, n=11)
    shared = torch.tensor([6, 0, 3, 5]), torch.tensor([10, 2, 4, 1])
    log_probs, ids = teacher_classes(teacher, 0, 1.0, shared)
    p = torch.softmax(teacher, -1)[:, shared[1]]
    q = torch.softmax(student, -1)[:, shared[0]]
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], dim=1) for x in (p, q))
    torch.testing.assert_close(
        token_divergence(student, log_probs, ids).double(), (p * (p / q).log()).sum(-1), rtol=1e-3, atol=1e-5
    )
    two, best = teacher_classes(teacher, 2, 1.0, shared)
    assert two.shape == (4, 3)
    assert (two[:, 0] >= two[:, 1]).all()
    assert set(best.flatten().tolist()) <= set(shared[0].tolist())


def test_classes_without_mass_stay_finite() -> None:
    student = torch.tensor([[100.0, 0.0, -100.0]], requires_grad=True)
    teacher = torch.tensor([[-100.0, 0.0, 100.0]])
    for top_k in (0, 1, 2):
        for reverse in (0.0, 0.5, 1.0):
            loss = token_divergence(student, *teacher_classes(teacher, top_k, 1.0), 1.0, reverse)
            (grad,) = torch.autograd.grad(loss.sum(), student)
            assert loss.isfinite().all()
            assert grad.isfinite().all()
    every = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2])  # no token is left for the last class
    loss = token_divergence(student, *teacher_classes(teacher, 0, 1.0, every), 1.0, 0.5)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert loss.isfinite().all()
    assert grad.isfinite().all()


def test_float16_classes_change_little() -> None:
    student, teacher = logits(6, n=300), logits(7, n=300)
    log_probs, ids = teacher_classes(teacher, 64, 1.0)
    exact, rounded = (token_divergence(student, classes, ids) for classes in (log_probs, log_probs.half()))
    torch.testing.assert_close(rounded, exact, rtol=2e-3, atol=2e-3)
    half = log_probs.half()
    assert divergence(half.float().log_softmax(-1), half).abs().max() < 1e-5, "normalised after rounding"


def test_states_are_compared_by_direction() -> None:
    ours, theirs = logits(8).requires_grad_(), logits(9)
    a, b = (x / x.square().mean(-1, keepdim=True).sqrt() for x in (ours, theirs))
    expected = (a - b).square().mean(-1)
    distance = state_distance(ours, 1000 * theirs)
    torch.testing.assert_close(distance.double(), expected, rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad(distance.sum(), ours)
    (wanted,) = torch.autograd.grad(expected.sum(), ours)
    torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-5)
