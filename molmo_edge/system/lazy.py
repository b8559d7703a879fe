"""Values that are computed when they are first needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class cached_property(Generic[_T]):  # noqa: N801 - named as the one of functools
    """Like `functools.cached_property`, without the lock that it has before Python 3.12.

    All instances of a class share that lock: models in different threads would wait for each other, and in a process
    that was forked while another thread computed the value, it would stay locked forever. Without it, threads that
    need the value of an object at the same time each compute it.
    """

    def __init__(self, compute: Callable[[Any], _T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> _T:
        if instance is None:  # asked of the class, as tools for documentation do
            return self  # type: ignore[return-value]
        value = instance.__dict__[self._name] = self._compute(instance)  # found there before this descriptor
        return value
