"""molmo-edge: Molmo on laptops and Jetsons. `Molmo().ask(image, question)`."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.machinery import PathFinder

from molmo_edge.system.privacy import switch_off_reports
from molmo_edge.system.version import __version__

TYPE_CHECKING = False  # `typing` takes longer to import than all of this module
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

    from molmo_edge.answer import Answer
    from molmo_edge.chat import Chat, ConversationFull
    from molmo_edge.errors import MolmoEdgeError
    from molmo_edge.frontend.points import Point
    from molmo_edge.molmo import Molmo
    from molmo_edge.runtimes.llama_options import LlamaOptions
    from molmo_edge.sdk.engine import Scene
    from molmo_edge.sdk.streaming import AnswerTimeout, Stream
    from molmo_edge.sdk.video import Video

__all__ = [
    "Answer",
    "AnswerTimeout",
    "Chat",
    "ConversationFull",
    "LlamaOptions",
    "Molmo",
    "MolmoEdgeError",
    "Point",
    "Scene",
    "Stream",
    "Video",
    "__version__",
]

# Here, because this package imports other libraries only after this line.
switch_off_reports()

# Loaded on first use: `import molmo_edge` imports neither numpy nor an engine.
_MODULES = {
    "Answer": "molmo_edge.answer",
    "AnswerTimeout": "molmo_edge.sdk.streaming",
    "Chat": "molmo_edge.chat",
    "ConversationFull": "molmo_edge.chat",
    "LlamaOptions": "molmo_edge.runtimes.llama_options",
    "Molmo": "molmo_edge.molmo",
    "MolmoEdgeError": "molmo_edge.errors",
    "Point": "molmo_edge.frontend.points",
    "Scene": "molmo_edge.sdk.engine",
    "Stream": "molmo_edge.sdk.streaming",
    "Video": "molmo_edge.sdk.video",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


class _CheckoutFinder:
    """Finds `molmo_edge.export`, `.quantize` and `.runtimes` in the top-level folders of a checkout.

    An installed molmo_edge contains the three as subpackages. Python started in the root of a checkout finds the
    checkout's `molmo_edge/` first, where they are sibling folders. Extending `__path__` by the root would work too,
    but would also turn every other folder into a subpackage (`molmo_edge.tests`).
    """

    folders = ("export", "quantize", "runtimes")

    def __init__(self, root: str) -> None:
        self.root = root

    def find_spec(
        self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parent, _, child = name.rpartition(".")
        if parent != __name__ or child not in self.folders:
            return None
        return PathFinder.find_spec(name, [self.root])


_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if all(os.path.isfile(os.path.join(_root, *file)) for file in (("runtimes", "__init__.py"), ("pyproject.toml",))):
    sys.meta_path.append(_CheckoutFinder(_root))
del _root
