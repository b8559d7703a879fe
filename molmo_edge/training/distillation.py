"""What distillation adds to the student: its settings, the targets that a teacher gives, and the projections.

The trainer stays the one trainer: a teacher gives targets for a batch, and the student's forward pass returns further
sums (`forward.Sums`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from molmo_edge.config import MolmoConfig
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.training.distill_loss import state_distance


class DistillError(MolmoEdgeError):
    """A teacher and a student, or settings, that do not fit together."""


@dataclass(frozen=True)
class DistillConfig:
    """The weights of the losses of distillation, and how distributions are compared."""

    divergence: float = 1.0  # weight of the divergence of the distributions of answer tokens
    reverse: float = 0.0  # share of the reverse divergence: 0 forward, 1 reverse
    temperature: float = 1.0  # of both distributions
    top_k: int = 64  # the teacher's most likely tokens, beside one class for all others; 0: all logits
    cross_entropy: float = 1.0  # weight of the cross entropy on the data, also of points
    hidden: float = 0.0  # weight of the distance of hidden states of answer tokens
    image: float = 0.0  # weight of the distance of image features, the connector's outputs
    grounding: float = 0.0  # weight of the divergence of the choices of grounding heads

    def __post_init__(self) -> None:
        for name in ("divergence", "cross_entropy", "hidden", "image", "grounding"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise DistillError(f"{name} is the weight of a loss: it must be 0 or larger, not {getattr(self, name)}")
        if not 0 <= self.reverse <= 1:
            raise DistillError(f"reverse is the share of the reverse divergence, from 0 to 1, not {self.reverse}")
        if not 0 < self.temperature < float("inf"):
            raise DistillError(f"the temperature must be positive, not {self.temperature}")
        if self.top_k < 0:
            raise DistillError(f"top_k must be 0 (all logits) or larger, not {self.top_k}")
        if not (self.divergence or self.hidden or self.image or self.grounding):
            raise DistillError("all weights of the teacher's losses are 0: without a teacher, use `molmo-edge train`")


class TeacherTargets(NamedTuple):  # a tuple, so that FSDP finds its tensors
    """What a teacher says about the m answer tokens and the k image tokens of a batch. Losses without weight: empty."""

    log_probs: Tensor  # float [m, classes], see `distill_loss.teacher_classes`
    ids: Tensor  # int64 [m, classes - 1], or [m, 0] if the classes are all logits
    matched: Tensor  # float32 [m]: 1, or 0 for tokens about which the teacher says nothing
    hidden: Tensor  # float [m, student's layers, teacher's d_model]
    cells: Tensor  # float [k, teacher's d_model]
    patches: Tensor  # float32 [., patches + 1]: scores of the grounding head's choices
    slots: Tensor  # float32 [., slots]
    locations: Tensor  # float32 [., locations]

    def to(self, device: torch.device) -> TeacherTargets:
        """Return a copy on `device`."""
        return TeacherTargets(*(tensor.to(device, non_blocking=True) for tensor in self))

    def pin_memory(self) -> TeacherTargets:
        """Called by a data loader with pin_memory."""
        return TeacherTargets(*(tensor.pin_memory() for tensor in self))


def join_targets(parts: Sequence[TeacherTargets]) -> TeacherTargets:
    """The targets of a batch from those of its sequences, in their order; none may have scores of choices."""
    columns = zip(*parts, strict=True)
    return TeacherTargets(*(torch.cat([t for t in tensors if len(t)] or tensors[:1]) for tensors in columns))


def matching_layers(student: int, teacher: int) -> list[int]:
    """For each of the student's layers, a layer of the teacher at the same share of its depth; last with last."""
    return [-(-(layer + 1) * teacher // student) - 1 for layer in range(student)]


class Distillation(nn.Module):
    """The student's projections to the widths of the teacher. They are trained, and dropped at the end."""

    def __init__(self, config: DistillConfig, student: MolmoConfig, teacher: MolmoConfig):
        """Raises DistillError if a loss needs parts that the two do not have in common."""
        super().__init__()
        self.config = config
        d, width, layers = student.decoder.d_model, teacher.decoder.d_model, student.decoder.n_layers
        if config.image and _cells(student) != _cells(teacher):
            raise DistillError("image features can be matched only if teacher and student have the same image tokens")
        if config.grounding:
            _check_heads(student, teacher)
        self.hidden = nn.ModuleList(_projection(d, width) for _ in range(layers if config.hidden else 0))
        self.image = _projection(d, width) if config.image else None

    def hidden_loss(self, states: list[Tensor], targets: TeacherTargets, weights: Tensor) -> Tensor:
        """States [m, d] after each layer, weights [m] -> the weighted sum of their distances, a mean over layers."""
        total = torch.zeros((), device=weights.device)
        for projection, ours, theirs in zip(self.hidden, states, targets.hidden.unbind(1), strict=True):
            total = total + (state_distance(projection(ours.float()), theirs) * targets.matched * weights).sum()
        return self.config.hidden * total / len(self.hidden)

    def image_loss(self, cells: Tensor, targets: TeacherTargets) -> Tensor:
        """The features of image tokens [k, d] -> the mean of their distances."""
        assert self.image is not None
        if len(cells) != len(targets.cells):
            raise DistillError(f"the student has {len(cells)} image tokens, the teacher {len(targets.cells)}")
        distance = state_distance(self.image(cells.float()), targets.cells)
        return self.config.image * distance.sum() / max(1, len(cells))


def _projection(student: int, teacher: int) -> nn.Module:
    return nn.Identity() if student == teacher else nn.Linear(student, teacher, bias=False)


def _cells(config: MolmoConfig) -> tuple[object, ...]:
    """What determines the image tokens of a picture."""
    i = config.image
    return i.layout, i.patches, i.pool, i.overlap_margins, i.max_crops, i.resize, i.crop_size


def _check_heads(student: MolmoConfig, teacher: MolmoConfig) -> None:
    ours, theirs = student.point_head, teacher.point_head
    if ours is None or theirs is None:
        raise DistillError("the grounding loss needs a grounding head in both teacher and student")
    if (ours.n_locations, ours.no_more_class) != (theirs.n_locations, theirs.no_more_class):
        raise DistillError("the grounding heads of teacher and student choose among different things")
    if bool(ours.votes) != bool(theirs.votes):
        raise DistillError("only one of teacher and student has a grounding head with votes: give both the same kind")
