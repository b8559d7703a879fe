"""Fields of configuration dataclasses: their validation, and their form in JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import field
from typing import Any

from molmo_edge.errors import MolmoEdgeError


class ConfigError(MolmoEdgeError):
    """A configuration that cannot be read, or that contradicts itself."""


_MAY_BE_ZERO = (
    "max_crops",
    "overview",
    "n_experts",
    "top_k",
    "additional_vocab_size",
    "head_dim_override",
    "pooling_heads",
    "votes",
    "peak_drop",
)
_TYPES: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "bool": bool, "str": str}


def added(default: Any, section: type | None = None) -> Any:
    """A field added in a later version: its key is written to JSON only if the value differs from the default.

    `section`: the dataclass of a value that is a section of its own.
    """
    return field(default=default, metadata={"omit_default": True, "section": section})


def check_fields(config: Any) -> None:
    """Raise ConfigError for a field of the wrong type, and for a size that is not positive.

    Manifests and config.json are untrusted input: an error here names the field; a later division by zero would not.
    """
    for f in dataclasses.fields(config):
        name, value = f"{type(config).__name__}.{f.name}", getattr(config, f.name)
        kind, *more = str(f.type).removeprefix("tuple[").removesuffix("]").split(", ")  # ["int", "int"], ["int", "..."]
        if kind not in _TYPES:
            continue  # a section, which validates itself
        if more:
            fits = isinstance(value, tuple) and (more == ["..."] or len(value) == 1 + len(more))
            fits = fits and all(_has_type(v, kind) for v in value)
        else:
            fits = _has_type(value, kind)
        if not fits:
            raise ConfigError(f"{name} must be {f.type}, it is {value!r}")
        if kind in ("int", "float") and not more and not (value > 0 or (value == 0 and f.name in _MAY_BE_ZERO)):
            allowed = "positive or 0" if f.name in _MAY_BE_ZERO else "positive"
            raise ConfigError(f"{name} must be {allowed}, it is {value}")


def _has_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or not isinstance(value, _TYPES[kind]):
        return kind == "bool" and isinstance(value, bool)
    return not isinstance(value, float) or math.isfinite(value)


def check_word(name: str, value: str, known: Iterable[str]) -> None:
    """Raise ConfigError unless `value` is one of `known`. `name`: the field, for the message."""
    if value not in known:
        raise ConfigError(f'{name} "{value}" is not supported (supported: {", ".join(known)})')


def to_json(config: Any) -> Any:
    """A section, with its sections, as a dict; fields of `added` with their default are left out."""
    if isinstance(config, tuple):
        return tuple(to_json(item) for item in config)
    if not dataclasses.is_dataclass(config):
        return config
    values = ((f, getattr(config, f.name)) for f in dataclasses.fields(config))
    return {f.name: to_json(v) for f, v in values if not (f.metadata.get("omit_default") and v == f.default)}


def from_json(kind: type, data: Any) -> Any:
    """The inverse of `to_json` for a section. Raises ConfigError."""
    if not isinstance(data, dict):
        raise ConfigError(f"the configuration has no section for {kind.__name__}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ConfigError(f"{kind.__name__} has no field {', '.join(unknown)}: was this made by a newer molmo-edge?")

    def value(name: str, raw: Any) -> Any:
        section = fields[name].metadata.get("section")
        return from_json(section, raw) if section and raw is not None else as_tuple(raw)

    return kind(**{name: value(name, raw) for name, raw in data.items()})


def as_tuple(value: Any) -> Any:
    """Convert a list of parsed JSON to a tuple; other values are returned unchanged and checked by the section."""
    return tuple(value) if isinstance(value, list) else value
