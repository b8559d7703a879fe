"""Forks: what an engine has to do about them.

A forked child has the memory of its parent and none of its threads. An engine that waits for one of its own threads
there waits for ever: in a call, and in a destructor that joins them. So:

- `os.fork` waits until the loads that `watch_load` knows are done. A child that is made in the middle of one could
  find a lock of the engine taken, or a static variable half initialised.
- Native objects given to `leak_in_children` are never destroyed in a child.
- Objects given to `on_fork` are told: their method `forked` is called in the child, before anything else runs there.
- `check` raises in a child for what was made by its parent.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, Protocol

from molmo_edge.errors import EngineError

_generation = 0  # forks between the first process and this one
_loads: set[Future[Any]] = set()
_leaked: weakref.WeakSet[Any] = weakref.WeakSet()
_told: weakref.WeakSet[Any] = weakref.WeakSet()


class Forkable(Protocol):
    def forked(self) -> None:
        """Called in the child: no other thread runs."""
        ...


def generation() -> int:
    """A number that differs between a process and the children that it forks."""
    return _generation


def check(born: int, what: str) -> None:
    """Raise EngineError where `what` was made in a parent process; `born`: `generation()` when it was made."""
    if born != _generation:
        raise EngineError(
            f"{what} was opened before this process was forked, and its threads are gone: open it after the fork, or "
            'start processes with multiprocessing\'s "spawn" or "forkserver"'
        )


def watch_load(load: Future[Any]) -> None:
    """Let `os.fork` wait for `load`."""
    _loads.add(load)
    load.add_done_callback(_loads.discard)


def leak_in_children(native: Any) -> None:
    """Never destroy `native`, which can be weakly referenced, in a child."""
    _leaked.add(native)


def on_fork(engine: Forkable) -> None:
    """Call `engine.forked()` in each child, if it is alive then."""
    _told.add(engine)


def finalize(owner: Any, free: Callable[..., object], *arguments: Any) -> None:
    """As `weakref.finalize`, but `free` is not called in children: their copy of what it frees has no threads."""
    weakref.finalize(owner, _free, _generation, free, arguments)


def _free(born: int, free: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    if born == _generation:
        free(*arguments)


def _before() -> None:
    wait(list(_loads))


def _in_child() -> None:
    global _generation
    _generation += 1
    _loads.clear()
    for native in _leaked:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(native))
    _leaked.clear()
    for engine in _told:
        engine.forked()


if hasattr(os, "register_at_fork"):  # elsewhere there is no fork
    os.register_at_fork(before=_before, after_in_child=_in_child)
