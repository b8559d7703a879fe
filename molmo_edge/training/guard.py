"""Skipping of harmful steps: non-finite losses or gradients, and spikes of the loss.

The loss and the norms are summed over all ranks, so every rank makes the same decision.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from molmo_edge.errors import MolmoEdgeError


class DivergedError(MolmoEdgeError):
    """Too many steps in a row were skipped."""


@dataclass
class Guard:
    """Compares the loss of a step with a running mean and variance."""

    deviations: float = 8.0  # standard deviations above the mean that count as a spike
    settled: int = 100  # steps before spikes are detected: early losses fall fast and vary
    patience: int = 20  # steps skipped in a row before the run ends
    memory: float = 0.98  # decay of the running mean per step
    mean: float = 0.0
    variance: float = 0.0
    seen: int = 0
    skipped: int = 0
    in_a_row: int = 0

    def judge(self, loss: float, norms: Iterable[float]) -> str | None:
        """Return the reason to skip a step with this loss and these gradient norms, or None.

        Raises DivergedError when `patience` steps in a row were skipped.
        """
        reason = self._reason(loss, norms)
        if reason is None:
            weight = max(1 - self.memory, 1 / (self.seen + 1))
            difference = loss - self.mean
            self.mean += weight * difference
            self.variance = (1 - weight) * (self.variance + weight * difference**2)
            self.seen, self.in_a_row = self.seen + 1, 0
            return None
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= self.patience:
            raise DivergedError(
                f"{self.in_a_row} steps in a row were skipped, the last one because {reason}: resume from an "
                "earlier checkpoint with lower learning rates"
            )
        return reason

    def _reason(self, loss: float, norms: Iterable[float]) -> str | None:
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if unsound := [norm for norm in norms if not math.isfinite(norm)]:
            return f"its gradient's norm is {unsound[0]}"
        limit = self.mean + self.deviations * max(math.sqrt(self.variance), 0.01 * abs(self.mean))
        if self.seen >= self.settled and loss > limit:
            return f"its loss {loss:.3f} is far above the mean {self.mean:.3f} of earlier steps"
        return None

    def state(self) -> dict[str, Any]:
        """The fields as a dict, for checkpoints."""
        return asdict(self)
