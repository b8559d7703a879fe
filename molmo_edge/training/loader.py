"""Micro-batches of one rank, prepared by workers, in the order of the mixture.

A damaged example is replaced by its neighbour, and counted. The choice depends only on the data, so that one damaged
picture among millions neither stops a run nor makes ranks diverge.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from molmo_edge.data.examples import DataSet, Example
from molmo_edge.data.mixture import Draw, Order
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.training.distillation import DistillError, TeacherTargets, join_targets
from molmo_edge.training.encoding import Batch, Encoder, Sample, TeacherSample, collate
from molmo_edge.training.features import FeatureError
from molmo_edge.training.stopping import ignore_interrupts
from molmo_edge.training.workers import Loader

_TRIES = 20  # damaged examples in a row before an error is raised


# From an example, the student's sequence, and the state of the random numbers from before it was encoded.
SecondSample = Callable[[Example, Sample, np.random.Generator], TeacherSample]


class DataError(MolmoEdgeError):
    """Data that cannot be used for training."""


@dataclass(frozen=True)
class Share:
    """The part of each step's batch that a rank computes."""

    batch: int  # sequences per step, over all ranks
    micro: int  # sequences per forward pass
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.batch % (self.ranks * self.micro):
            raise DataError(
                f"a batch of {self.batch} is not a multiple of {self.ranks} ranks x {self.micro} sequences per forward "
                "pass"
            )

    @property
    def steps(self) -> int:
        """Micro-batches per step on this rank."""
        return self.batch // (self.ranks * self.micro)


@dataclass(frozen=True)
class TeacherBatch:
    """What belongs to the teacher of the student that a batch is for."""

    batch: Batch | None = None  # the same examples as the teacher reads them
    pairs: Tensor | None = None  # int64 [p, 2]: which predictions of the student and of the teacher are compared
    targets: TeacherTargets | None = None  # from a cache
    paths: tuple[Path, ...] = ()  # of each sequence, in a cache that is being written

    def pin_memory(self) -> TeacherBatch:
        """Called by a data loader with pin_memory."""
        parts: dict[str, Any] = {name: getattr(self, name) for name in ("batch", "pairs", "targets")}
        return replace(self, **{name: part.pin_memory() for name, part in parts.items() if part is not None})


@dataclass(frozen=True)
class MicroBatch:
    """The sequences of one forward pass."""

    batch: Batch
    replaced: tuple[str, ...]  # why examples were replaced
    teacher: TeacherBatch | None = None

    def pin_memory(self) -> MicroBatch:
        """Called by a data loader with pin_memory."""
        teacher = None if self.teacher is None else self.teacher.pin_memory()
        return MicroBatch(self.batch.pin_memory(), self.replaced, teacher)


class Samples(Dataset[Any]):
    """Encoded samples, indexed by their draw. Random choices depend on (seed, data set, example, epoch) alone."""

    def __init__(self, sets: Sequence[DataSet], encoder: Encoder, seed: int, second: SecondSample | None = None):
        """second: adds what a teacher needs to each sample."""
        self.sets, self.encoder, self.seed, self.second = list(sets), encoder, seed, second

    def __getitem__(self, draw: Draw) -> tuple[Sample, tuple[str, ...]]:
        data = self.sets[draw.source]
        failures: list[str] = []
        for attempt in range(_TRIES):
            index = (draw.example + attempt) % len(data)
            rng = np.random.default_rng([self.seed, draw.source, index, draw.epoch])
            try:
                return self._encoded(data.example(index, rng), rng), tuple(failures)
            except (FeatureError, DistillError):  # not a fault of the example
                raise
            except MolmoEdgeError as error:
                failures.append(f"{data.name} {index}: {error}")
        raise DataError(f"{_TRIES} examples in a row cannot be used. The last one: {failures[-1]}")

    def _encoded(self, example: Example, rng: np.random.Generator) -> Sample:
        if self.second is None:
            return self.encoder(example, rng)
        again = copy.deepcopy(rng)
        sample = self.encoder(example, rng)
        return replace(sample, teacher=self.second(example, sample, again))


class MicroBatches(Sampler[list[Draw]]):
    """The draws of each micro-batch of this rank, from `step` to `steps`."""

    def __init__(self, order: Order, share: Share, step: int, steps: int):
        self.order, self.share, self.step, self.steps = order, share, step, steps

    def __len__(self) -> int:
        return (self.steps - self.step) * self.share.steps

    def __iter__(self) -> Iterator[list[Draw]]:
        s = self.share
        draws = iter(replace(self.order, first=self.step * s.batch))
        mine = slice(s.rank * s.batch // s.ranks, (s.rank + 1) * s.batch // s.ranks)
        for _ in range(self.step, self.steps):
            own = list(islice(draws, s.batch))[mine]
            for start in range(0, len(own), s.micro):
                yield own[start : start + s.micro]


def open_loader(
    samples: Samples,
    order: Order,
    share: Share,
    *,
    step: int,
    steps: int,
    workers: int = 0,
    length: int | None = None,
    pin: bool = False,
) -> Loader[MicroBatch]:
    """Micro-batches from `step` on.

    workers: processes that prepare batches, or 0; their number does not change the batches. length: number of tokens
    that each batch is padded to; None for that of its longest sequence. A worker that hangs for ten minutes ends the
    run with an error instead of letting all ranks wait.
    """
    options: dict[str, Any] = {}
    if workers:
        # Several batches ahead, so that one slow picture does not make the run wait.
        options = {"prefetch_factor": 4, "timeout": 600, "worker_init_fn": ignore_interrupts}
    return Loader(
        samples,
        batch_sampler=MicroBatches(order, share, step, steps),
        num_workers=workers,
        collate=_Collate(length),
        pin_memory=pin,
        **options,
    )


def start(loader: Loader[MicroBatch]) -> Iterator[MicroBatch]:
    """The loader's batches. Workers start immediately, before the first batch is requested.

    An error of a worker is raised here with its own message.
    """
    batches: Iterator[MicroBatch] = iter(loader)
    return batches


@dataclass(frozen=True)
class _Collate:
    length: int | None

    def __call__(self, items: list[tuple[Sample, tuple[str, ...]]]) -> MicroBatch:
        replaced = tuple(reason for _, reasons in items for reason in reasons)
        samples = [sample for sample, _ in items]
        return MicroBatch(collate(samples, self.length), replaced, _join_teacher(samples, self.length))


def _join_teacher(samples: Sequence[Sample], length: int | None) -> TeacherBatch | None:
    found = [sample.teacher for sample in samples if sample.teacher is not None]
    if not found:
        return None
    targets = [one.targets for one in found if one.targets is not None]
    own, pairs, first, second = [], [], 0, 0
    for sample, one in zip(samples, found, strict=True):
        if one.own is not None and one.pairs is not None:
            own.append(one.own)
            pairs.append(torch.from_numpy(one.pairs + np.array([first, second])))
            first, second = first + sample.answered, second + one.own.answered
    return TeacherBatch(
        collate(own, length) if own else None,
        torch.cat(pairs) if pairs else None,
        join_targets(targets) if targets else None,
        tuple(one.path for one in found if one.path is not None),
    )
