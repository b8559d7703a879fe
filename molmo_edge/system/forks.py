"""Engines, locks and `os.fork`.

A forked child has the memory of its parent but none of its threads. An engine that waits for one of its own threads
in the child, in a call or in a destructor that joins them, waits forever, and so does a thread that waits for a lock
which another thread held at the fork. Therefore:

- `os.fork` waits until the loads given to `watch_load` are done. Forking in the middle of a load could leave a lock of
  the engine taken, or a static variable half initialised.
- `os.fork` waits until other threads have finished their imports, because Python locks a module while it is imported.
- `os.fork` waits for the locks given to `hold_at_fork`.
- Native objects given to `leak_in_children` are never destroyed in a child.
- The method `forked` of objects given to `on_fork` is called in the child before anything else runs there.
- `check` raises in a child for objects made by its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import RLock
from types import ModuleType
from typing import Any, Protocol

from molmo_edge.errors import EngineError

_generation = 0  # number of forks between the first process and this one
_loads: set[Future[Any]] = set()
_locks: list[RLock] = []
_leaked: weakref.WeakSet[Any] = weakref.WeakSet()
_listeners: weakref.WeakSet[Any] = weakref.WeakSet()


class Forkable(Protocol):
    """An object that has to be told when the process was forked."""

    def forked(self) -> None:
        """Called in the child, where no other thread runs."""
        ...


def generation() -> int:
    """Return a number that differs between a process and its forked children."""
    return _generation


def check(born: int, name: str) -> None:
    """Raise EngineError if the object `name` was made in a parent process; `born`: `generation()` when it was made."""
    if born != _generation:
        raise EngineError(
            f"{name} was opened before this process was forked, so its threads do not exist here: open it after the "
            'fork, or start processes with multiprocessing\'s "spawn" or "forkserver"'
        )


def watch_load(load: Future[Any]) -> None:
    """Make `os.fork` wait for `load`."""
    _loads.add(load)
    load.add_done_callback(_loads.discard)


def hold_at_fork(lock: RLock) -> None:
    """Take `lock` for each `os.fork`, so that no other thread has it at that moment."""
    _locks.append(lock)


def leak_in_children(native: Any) -> None:
    """Never destroy `native` in a child. It must support weak references."""
    _leaked.add(native)


def on_fork(engine: Forkable) -> None:
    """Call `engine.forked()` in each child while `engine` is alive."""
    _listeners.add(engine)


def finalize(owner: Any, free: Callable[..., object], *arguments: Any) -> None:
    """Like `weakref.finalize`, but without calling `free` in children, whose copies have no threads."""
    weakref.finalize(owner, _free, _generation, free, arguments)


def _free(born: int, free: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    if born == _generation:
        free(*arguments)


def _before() -> None:
    wait(list(_loads))
    _finish_imports()
    for lock in _locks:  # last: an import may need one
        lock.acquire()


def _release_locks() -> None:
    for lock in _locks:
        lock.release()


def _finish_imports() -> None:
    """Wait until other threads have imported what they are importing."""
    for name, module in list(sys.modules.items()):
        if not issubclass(type(module), ModuleType):  # other objects can say that they are of this class
            continue
        spec = ModuleType.__getattribute__(module, "__dict__").get("__spec__")  # getattr would load a lazy module
        if getattr(spec, "_initializing", False):
            with contextlib.suppress(Exception):  # the importing thread raises it
                importlib.import_module(name)  # waits for another thread, but not for this one


def _in_child() -> None:
    global _generation
    _release_locks()
    _generation += 1
    _loads.clear()
    for native in _leaked:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(native))
    _leaked.clear()
    for engine in _listeners:
        engine.forked()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_before, after_in_parent=_release_locks, after_in_child=_in_child)
