"""Greedy search for the precision of each part of a model, within a budget of size or of loss.

Every step reduces the precision of the part that adds the least loss per megabyte saved. The loss that a step adds is
estimated from each part measured alone. The loss of a complete choice is then measured, and the budget applies to the
measured value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molmo_edge.checkpoints.manifest import POINT_HEAD
from molmo_edge.evaluation.ablation import PARTS, AblationResult, Bench, component_of, size_of
from molmo_edge.evaluation.stats import Estimate
from molmo_edge.export import ExportError


@dataclass(frozen=True)
class Choice:
    """A precision for each part; parts that are not named are float32."""

    precisions: Mapping[str, str] = field(default_factory=dict)
    predicted: float = 0.0  # mean KL, the sum over the parts
    saved: int = 0  # bytes, the sum over the parts

    def with_part(self, new: AblationResult, old: AblationResult | None) -> Choice:
        """Return the choice with a part changed to the result `new` from `old` (None: float32)."""
        predicted = self.predicted + new.kl - (old.kl if old else 0.0)
        saved = self.saved + new.saved - (old.saved if old else 0)
        return Choice({**self.precisions, new.part: new.precision}, predicted, saved)

    def to_precision(self) -> dict[str, str]:
        """The argument of `molmo_edge.export.export_bundle`."""
        return dict(self.precisions)


@dataclass(frozen=True)
class SearchResult:
    """A choice with its measured size and loss."""

    choice: Choice
    bytes: int  # of the graphs
    metrics: dict[str, Estimate]

    @property
    def kl(self) -> float:
        """Mean KL divergence from the reference, nats per token."""
        return self.metrics["kl_mean"].value

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the predicted and the measured loss."""
        return {
            "precision": self.choice.to_precision(),
            "bytes": self.bytes,
            "predicted_kl": self.choice.predicted,
            "figures": {name: figure.to_dict() for name, figure in self.metrics.items()},
        }


def greedy_path(parts: Iterable[AblationResult]) -> list[Choice]:
    """The choices from float32 to the smallest precisions: each step changes one part, the cheapest step first."""
    options: dict[str, list[AblationResult]] = {}
    for option in parts:
        options.setdefault(option.part, []).append(option)
    chosen: dict[str, AblationResult | None] = dict.fromkeys(options)
    path = [Choice()]
    while True:
        best: tuple[float, AblationResult] | None = None
        for part, candidates in options.items():
            current = chosen[part]
            for option in candidates:
                saves = option.saved - (current.saved if current else 0)
                if saves <= 0:
                    continue
                price = (option.kl - (current.kl if current else 0.0)) / saves
                if best is None or price < best[0]:
                    best = price, option
        if best is None:
            return path
        path.append(path[-1].with_part(best[1], chosen[best[1].part]))
        chosen[best[1].part] = best[1]


def search(
    bench: Bench,
    parts: Sequence[AblationResult],
    *,
    max_bytes: int | None = None,
    max_kl: float | None = None,
    on_try: Callable[[str], Callable[[], None]] = lambda _choice: lambda: None,
) -> SearchResult:
    """The first choice on the path with at most `max_bytes`, or the last with at most `max_kl` nats per token.

    `parts`: the results of `ablate`. Give one of the two limits. Raises ExportError if no choice meets it; the message
    names the nearest one.
    """
    if (max_bytes is None) == (max_kl is None):
        raise ExportError("a search needs max_bytes or max_kl, and only one of them")
    path = greedy_path(parts)
    if max_bytes is not None:
        for choice in path:
            # The sum of sizes is exact but for a few bytes of graph nodes, so a choice that may fit is built.
            if _float32_bytes(bench) - choice.saved <= max_bytes * 1.001:
                files = build(bench, choice)
                if sum(map(size_of, files.values())) <= max_bytes:
                    return _measure(bench, choice, files, on_try)
                _delete(bench, files)
        smallest = (_float32_bytes(bench) - path[-1].saved) / 1e6
        raise ExportError(f"no precisions fit into {max_bytes / 1e6:.1f} MB: the smallest take {smallest:.1f} MB")
    assert max_kl is not None
    if len(path) == 1:
        raise ExportError("none of these precisions makes the model smaller: keep the model unchanged")
    low, high = 1, len(path) - 1  # the loss grows along the path
    best = nearest = None
    while low <= high:
        middle = (low + high) // 2
        nearest = _measure(bench, path[middle], build(bench, path[middle]), on_try)
        if nearest.kl <= max_kl:
            best, low = nearest, middle + 1
        else:
            high = middle - 1
    if best is None:
        assert nearest is not None
        raise ExportError(
            f"even {_describe(nearest.choice)} alone loses {nearest.kl:.2g} nats per token, more than {max_kl:g}: keep "
            "the model unchanged, or allow a larger loss"
        )
    return best


def build(bench: Bench, choice: Choice) -> dict[str, Path]:
    """The graphs of a choice. Components in float32 are the bench's own."""
    files = dict(bench.files)
    for component, precisions in by_component(choice.precisions).items():
        files[component] = bench.build(component, precisions)
    return files


def by_component(precisions: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """{component: the precisions of it and its parts}"""
    grouped: dict[str, dict[str, str]] = {}
    for part, precision in precisions.items():
        grouped.setdefault(component_of(part), {})[part] = precision
    return grouped


def _measure(
    bench: Bench, choice: Choice, files: Mapping[str, Path], on_try: Callable[[str], Callable[[], None]]
) -> SearchResult:
    metrics = bench.measure(files, on_try(_describe(choice)))
    result = SearchResult(choice, sum(map(size_of, files.values())), metrics)
    _delete(bench, files)
    return result


def _delete(bench: Bench, files: Mapping[str, Path]) -> None:
    for name, path in files.items():
        if path != bench.files[name]:
            bench.delete(path)


def _describe(choice: Choice) -> str:
    parts = sorted(choice.precisions, key=(*PARTS, POINT_HEAD).index)
    return ", ".join(f"{part} {choice.precisions[part]}" for part in parts) or "float32"


def _float32_bytes(bench: Bench) -> int:
    return sum(map(size_of, bench.files.values()))
