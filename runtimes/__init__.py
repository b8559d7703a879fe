"""Engines behind one protocol (imported as `molmo_edge.runtimes`): numpy in, numpy out.

Runtimes do not depend on the SDK, and the SDK does not depend on tensor libraries. Names load on first use, so that
importing this package imports neither numpy nor an engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from molmo_edge.config import DEVICES
from molmo_edge.errors import EngineError, Unavailable

if TYPE_CHECKING:
    from molmo_edge.runtimes.choose_engine import check_model_room, open_files, open_runtime
    from molmo_edge.runtimes.llama_options import LlamaOptions
    from molmo_edge.runtimes.protocol import BatchRuntime, Cache, ImageBlockRuntime, PartedRuntime, Runtime

__all__ = [
    "DEVICES",
    "BatchRuntime",
    "Cache",
    "EngineError",
    "ImageBlockRuntime",
    "LlamaOptions",
    "PartedRuntime",
    "Runtime",
    "Unavailable",
    "check_model_room",
    "open_files",
    "open_runtime",
]

_MODULES = {
    "choose_engine": ("check_model_room", "open_files", "open_runtime"),
    "llama_options": ("LlamaOptions",),
    "protocol": ("BatchRuntime", "Cache", "ImageBlockRuntime", "PartedRuntime", "Runtime"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
