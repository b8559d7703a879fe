"""Objects that belong to their process: pickling or copying one says so, and what to do."""

from __future__ import annotations

from typing import Any, ClassVar

from molmo_edge.errors import MolmoEdgeError


class CopyError(MolmoEdgeError, TypeError):
    """An object that cannot be pickled or copied. A TypeError, as Python itself raises for such objects."""


class NotCopied:
    """A base that refuses pickle, copy.copy and copy.deepcopy. They are used by multiprocessing and by data loaders."""

    _instead: ClassVar[str]  # what to do

    def __reduce_ex__(self, protocol: Any) -> Any:
        name = type(self).__name__
        raise CopyError(f"a {name} cannot be pickled or copied, it belongs to this process: {self._instead}")
