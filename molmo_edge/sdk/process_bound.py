"""Objects that belong to the process that made them and refuse to be pickled or copied."""

from __future__ import annotations

from typing import Any, ClassVar

from molmo_edge.errors import MolmoEdgeError


class CopyError(MolmoEdgeError, TypeError):
    """An object that cannot be pickled or copied. Also a TypeError, which Python raises for such objects."""


class NotCopied:
    """A base class that refuses pickle, copy.copy and copy.deepcopy; multiprocessing and data loaders use them."""

    _instead: ClassVar[str]  # what to do instead, for the error

    def __reduce_ex__(self, _protocol: Any) -> Any:
        name = type(self).__name__
        raise CopyError(f"a {name} cannot be pickled or copied, it belongs to this process: {self._instead}")
