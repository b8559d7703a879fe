"""A precision for each part of a model, chosen by what each costs: greedy, within a size or a loss.

Every step rounds the part further whose added loss is smallest for each megabyte that it saves. What a step adds is
taken from the parts measured alone, which is cheap and nearly right; what a whole choice loses is then measured, and a
loss budget is held to the measured value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molmo_edge.evaluation.ablation import PARTS, AblationResult, Bench, component_of, size_of
from molmo_edge.evaluation.stats import Estimate
from molmo_edge.export import ExportError


@dataclass(frozen=True)
class Choice:
    """A precision for each part; what is not named is float32."""

    words: Mapping[str, str] = field(default_factory=dict)
    predicted: float = 0.0  # mean KL: the sum of the parts'
    saved: int = 0  # bytes, the sum of the parts'

    def with_part(self, other: AblationResult, instead: AblationResult | None) -> Choice:
        predicted = self.predicted + other.kl - (instead.kl if instead else 0.0)
        saved = self.saved + other.saved - (instead.saved if instead else 0)
        return Choice({**self.words, other.part: other.precision}, predicted, saved)

    def to_precision(self) -> dict[str, str]:
        """As `molmo_edge.export.export_bundle` takes it."""
        return dict(self.words)


@dataclass(frozen=True)
class Found:
    choice: Choice
    bytes: int  # of its graphs
    metrics: dict[str, Estimate]

    @property
    def kl(self) -> float:
        return self.metrics["kl_mean"].value

    def to_dict(self) -> dict[str, Any]:
        return {
            "precision": self.choice.to_precision(),
            "bytes": self.bytes,
            "predicted_kl": self.choice.predicted,
            "figures": {name: figure.to_dict() for name, figure in self.metrics.items()},
        }


def steps(parts: Iterable[AblationResult]) -> list[Choice]:
    """From float32 to all that the parts allow, one part a step, the cheapest of all possible steps each time."""
    options: dict[str, list[AblationResult]] = {}
    for option in parts:
        options.setdefault(option.part, []).append(option)
    now: dict[str, AblationResult | None] = dict.fromkeys(options)
    path = [Choice()]
    while True:
        best: tuple[float, AblationResult] | None = None
        for part, some in options.items():
            current = now[part]
            for option in some:
                saves = option.saved - (current.saved if current else 0)
                if saves <= 0:
                    continue
                price = (option.kl - (current.kl if current else 0.0)) / saves
                if best is None or price < best[0]:
                    best = price, option
        if best is None:
            return path
        path.append(path[-1].with_part(best[1], now[best[1].part]))
        now[best[1].part] = best[1]


def search(
    bench: Bench,
    parts: Sequence[AblationResult],
    *,
    max_bytes: int | None = None,
    max_kl: float | None = None,
    on_try: Callable[[str], Callable[[], None]] = lambda what: lambda: None,
) -> Found:
    """The first choice on the path of `max_bytes` at most, or the last that loses `max_kl` nats a token at most.

    `parts`: what `ablate` found. Give one of the two. Raises ExportError where no choice is small or exact enough, with
    the nearest one.
    """
    if (max_bytes is None) == (max_kl is None):
        raise ExportError("a search needs a size or a loss to stay within, and only one of them")
    path = steps(parts)
    if max_bytes is not None:
        for choice in path:
            # Sizes add up exactly but for the few bytes of a graph's nodes, so the first that may fit is built.
            if _whole(bench) - choice.saved <= max_bytes * 1.001:
                files = build(bench, choice)
                if sum(map(size_of, files.values())) <= max_bytes:
                    return _measured(bench, choice, files, on_try)
                _forget(bench, files)
        least = (_whole(bench) - path[-1].saved) / 1e6
        raise ExportError(f"nothing fits {max_bytes / 1e6:.1f} MB: the smallest choice takes {least:.1f} MB")
    assert max_kl is not None
    if len(path) == 1:
        raise ExportError("none of these precisions saves anything: keep the model as it is")
    low, high = 1, len(path) - 1  # of a path along which the loss grows
    best = nearest = None
    while low <= high:
        middle = (low + high) // 2
        nearest = _measured(bench, path[middle], build(bench, path[middle]), on_try)
        if nearest.kl <= max_kl:
            best, low = nearest, middle + 1
        else:
            high = middle - 1
    if best is None:
        assert nearest is not None
        raise ExportError(
            f"even {_said(nearest.choice)} alone loses {nearest.kl:.2g} nats a token, more than {max_kl:g}: keep the "
            "model as it is, or allow more"
        )
    return best


def build(bench: Bench, choice: Choice) -> dict[str, Path]:
    """The graphs of a choice; those in float32 are the bench's own."""
    files = dict(bench.files)
    for component, words in by_component(choice.words).items():
        files[component] = bench.build(component, words)
    return files


def by_component(words: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """{component: what is asked of it and its parts}."""
    found: dict[str, dict[str, str]] = {}
    for part, word in words.items():
        found.setdefault(component_of(part), {})[part] = word
    return found


def _measured(
    bench: Bench, choice: Choice, files: Mapping[str, Path], on_try: Callable[[str], Callable[[], None]]
) -> Found:
    figures = bench.measure(files, on_try(_said(choice)))
    found = Found(choice, sum(map(size_of, files.values())), figures)
    _forget(bench, files)
    return found


def _forget(bench: Bench, files: Mapping[str, Path]) -> None:
    for name, path in files.items():
        if path != bench.files[name]:
            bench.delete(path)


def _said(choice: Choice) -> str:
    return ", ".join(f"{part} {choice.words[part]}" for part in PARTS if part in choice.words) or "float32"


def _whole(bench: Bench) -> int:
    return sum(map(size_of, bench.files.values()))
