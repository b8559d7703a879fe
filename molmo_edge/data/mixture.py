"""The order of examples from several data sets at given rates, the same for any number of ranks and workers.

Sample i of a run depends only on the seed. To resume at a step, the choices before it are drawn again, without reading
examples. Reference: olmo/data/iterable_dataset_mixture.py and build_train_dataloader.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from molmo_edge.errors import MolmoEdgeError


class MixtureError(MolmoEdgeError):
    """A mixture without available examples."""


@dataclass(frozen=True)
class Group:
    """Data sets that share a rate, in proportion to the square roots of their sizes."""

    rate: float
    sizes: Mapping[str, int | None]  # data set -> size to use; None: its actual size


class Draw(NamedTuple):
    """One sample of a run."""

    number: int  # in the run
    source: int  # which data set
    example: int  # which of its examples
    epoch: int  # number of complete passes over the data set


def mixture_rates(groups: Sequence[Group], lengths: Mapping[str, int]) -> dict[str, float]:
    """Share of each data set (sum 1): the rate of its group times sqrt(size), divided by the group's sum of sqrt(size).

    `lengths`: examples of the available data sets. Unavailable sets are left out, and the rest of their group takes
    their share. Raises MixtureError if none is available.
    """
    rates: dict[str, float] = {}
    for group in groups:
        roots = {name: np.sqrt(size or lengths[name]) for name, size in group.sizes.items() if lengths.get(name)}
        for name, root in roots.items():
            rates[name] = rates.get(name, 0.0) + group.rate * root / sum(roots.values())
    total = sum(rates.values())
    if not total > 0:
        raise MixtureError("none of the mixture's data sets is available, or all of them are empty")
    return {name: rate / total for name, rate in rates.items()}


@dataclass
class Order:
    """The infinite order of a run's samples. Each iteration starts at sample `first`."""

    lengths: Sequence[int]  # of the data sets, by number
    rates: Sequence[float]
    seed: int
    first: int = 0
    _permutations: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict, repr=False)

    _BLOCK = 4096  # choices drawn at once

    def __iter__(self) -> Iterator[Draw]:
        block, skip = divmod(self.first, self._BLOCK)
        counts = np.zeros(len(self.lengths), np.int64)
        for before in range(block):
            counts += np.bincount(self._choices(before), minlength=len(counts))
        number = block * self._BLOCK
        while True:
            for source in self._choices(block).tolist():
                if skip:
                    skip -= 1
                else:
                    epoch, place = divmod(int(counts[source]), self.lengths[source])
                    yield Draw(number, source, self._shuffled(source, epoch, place), epoch)
                counts[source] += 1
                number += 1
            block += 1

    def _choices(self, block: int) -> np.ndarray:
        """int [_BLOCK]: the data set of each sample of a block."""
        rng = np.random.default_rng([self.seed, block])
        rates = np.asarray(self.rates, np.float64)
        return rng.choice(len(self.rates), size=self._BLOCK, p=rates / rates.sum())

    def _shuffled(self, source: int, epoch: int, place: int) -> int:
        """An epoch has every example once, in its own random order."""
        known = self._permutations.get(source)
        if known is None or known[0] != epoch:
            order = np.random.default_rng([self.seed, source, epoch]).permutation(self.lengths[source])
            known = self._permutations[source] = (epoch, order)
        return int(known[1][place])
