"""How much memory there is, and giving it back."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.system.cgroups import PROC, ROOT, memory_left


class RoomError(MolmoEdgeError):
    """A model that does not fit into the memory that is free."""


def meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes ("MemAvailable", "SwapFree", ...); empty where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


def available_memory(proc: Path = PROC, root: Path = ROOT) -> int | None:
    """Bytes that this process can take without others being pushed out, swap not counted.

    On Linux what is available, and in a container no more than its limit leaves; on a Mac all that the machine has, as
    a bound; None where nothing tells. `proc`, `root`: see molmo_edge.system.cgroups.
    """
    if (available := meminfo().get("MemAvailable")) is not None:
        left = memory_left(proc, root)
        return available if left is None else min(available, left)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def check_room(needed: int, what: str) -> None:
    """Raise RoomError where `what` takes more bytes than are free. Linux would end the process instead."""
    free = available_memory()
    if free is not None and needed > free:
        raise RoomError(
            f"{what} takes at least {needed / 1e9:.1f} GB of memory, and only {free / 1e9:.1f} GB are free: end other "
            "programs, or use a model of smaller precision"
        )


def give_back() -> None:
    """Return freed memory to the system, where the C library would keep it.

    Thousands of small weights that stay, each made through large buffers that go, leave glibc's heap full of holes:
    an NF4 model of 5 GB took 20 GB.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
