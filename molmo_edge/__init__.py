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

    from molmo_edge.answer import Answer as Answer
    from molmo_edge.errors import MolmoEdgeError as MolmoEdgeError
    from molmo_edge.frontend.points import Point as Point
    from molmo_edge.molmo import Molmo as Molmo

__all__ = ["Answer", "Molmo", "MolmoEdgeError", "Point", "__version__"]

# Here, because every import of another library by this package comes after it.
switch_off_reports()

# Loaded on first use: a program that only imports molmo_edge pays for neither numpy nor an engine.
_HOMES = {
    "Answer": "molmo_edge.answer",
    "Molmo": "molmo_edge.molmo",
    "MolmoEdgeError": "molmo_edge.errors",
    "Point": "molmo_edge.frontend.points",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


class _CheckoutFinder:
    """Finds `molmo_edge.export`, `.quantize` and `.runtimes` in the top-level folders of a checkout.

    An installed molmo_edge holds the three as subpackages. Python started in the root of a checkout finds
    the checkout's `molmo_edge/` first, whatever is installed, and there they are its siblings. Extending
    `__path__` by the root would do too, but would also make `molmo_edge.tests` out of every other folder.
    """

    folders = ("export", "quantize", "runtimes")

    def __init__(self, root: str) -> None:
        self.root = root

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parent, _, child = name.rpartition(".")
        if parent != __name__ or child not in self.folders:
            return None
        return PathFinder.find_spec(name, [self.root])


_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if all(os.path.isfile(os.path.join(_root, *file)) for file in (("runtimes", "__init__.py"), ("pyproject.toml",))):
    sys.meta_path.append(_CheckoutFinder(_root))
del _root
