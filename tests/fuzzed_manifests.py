"""Edits of single fields of a manifest, as by hand or by mixing up two bundles."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Edit:
    place: Place
    value: Any  # the new value; None: the field is removed

    def __str__(self) -> str:
        return (
            f"{'.'.join(map(str, self.place))} = {'(removed)' if self.value is None else json.dumps(self.value)[:60]}"
        )

    def apply(self, manifest: dict[str, Any]) -> dict[str, Any]:
        edited = copy.deepcopy(manifest)
        within = edited
        for key in self.place[:-1]:
            within = within[key]  # type: ignore[index]
        if self.value is None:
            del within[self.place[-1]]  # type: ignore[arg-type]
        else:
            within[self.place[-1]] = self.value  # type: ignore[index]
        return edited


def edits(manifest: dict[str, Any], count: int, *, seed: int = 0, within: tuple[str, ...] = ()) -> list[Edit]:
    """Choose `count` edits, of every field of `manifest` (or of the sections `within`) about equally often."""
    chance = random.Random(seed)
    by_place: dict[Place, list[Edit]] = {}
    for place, value in _leaves(manifest):
        if within and place[0] not in within:
            continue
        # A long list counts as one field, or most edits would be of the ids of an answer.
        field = place[:3] if place[0] == "check" else place
        others = [other for other in _others(value, chance) if other != value]  # 2 * 0 is not an edit
        by_place.setdefault(field, []).extend(Edit(place, other) for other in [*others, None])
    chosen: list[Edit] = []
    for choices in by_place.values():
        chance.shuffle(choices)
    while len(chosen) < count and any(by_place.values()):
        fields = [field for field, left in by_place.items() if left]
        chance.shuffle(fields)
        chosen += [by_place[field].pop() for field in fields]
    assert len(chosen) >= count, f"there are only {len(chosen)} edits of this manifest"
    return chosen[:count]


def read(bundle: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bundle / "molmo_edge.json").read_text())
    return content


def _leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every field and every list except the manifest's own hash."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if (*place, key) != ("sha256",):
                yield from _leaves(inner, (*place, key))
        return
    if isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _leaves(inner, (*place, i))
    if place:
        yield place, value


def _others(value: Any, chance: random.Random) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1, value * 2, value + 2, value + chance.randint(3, 50), -value - 1]
    if isinstance(value, float):
        return [value * 1.01 + 1e-4, value * 2 + 1, value + 0.001, value + chance.random(), -value - 0.5]
    if isinstance(value, str):
        swapped = [chance.choice("0123456789abcdef") + value[1:], f"{value}x", value[:-1], value.swapcase()]
        words = ["default", "dino", "gelu", "quick_gelu", "openai", "onnx", "gguf", "fp32", "int8", "q8"]
        return [*swapped, *words]
    if isinstance(value, list):
        return [value[:-1], [*value, *value[-1:]], value[::-1]]
    return []
