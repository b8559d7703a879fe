"""Parameters of OpenAI's APIs that would change the answer, and that this server cannot honour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from molmo_edge.server.errors import bad_request


def check_format(given: Mapping[str, Any] | None, param: str) -> None:
    """Refuse an output format other than text. The place for constrained decoding."""
    kind = None if given is None else given.get("type", "text")
    if kind not in (None, "text"):
        raise bad_request(f"{param} {str(kind)[:40]!r} is not supported: only text is", param, "unsupported_parameter")


def check_unused(given: Mapping[str, Any], ordinary: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse parameters that have another value than None, empty, or one of `ordinary[name]`."""
    for name, values in ordinary.items():
        value = given.get(name)
        if value is not None and value not in values and value not in ([], {}):
            raise bad_request(f"{name} is not supported by this server: leave it out", name, "unsupported_parameter")
