"""Measure and release memory."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from pathlib import Path

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.system.cgroups import PROC, ROOT, memory_left


class RoomError(MolmoEdgeError):
    """A model does not fit into the free memory."""


def meminfo(path: Path = Path("/proc/meminfo")) -> dict[str, int]:
    """/proc/meminfo in bytes ("MemAvailable", "SwapFree", ...); empty on systems without it."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


def available_memory(proc: Path = PROC, root: Path = ROOT) -> int | None:
    """Bytes that this process can allocate without swapping.

    On Linux the available memory, limited by the container; on macOS an upper bound, the total memory; None if it is
    unknown. `proc`, `root`: see molmo_edge.system.cgroups.
    """
    if (available := meminfo().get("MemAvailable")) is not None:
        left = memory_left(proc, root)
        return available if left is None else min(available, left)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def check_room(needed: int, what: str) -> None:
    """Raise RoomError if `what` needs more bytes than are free. Otherwise Linux would kill the process later."""
    free = available_memory()
    if free is not None and needed > free:
        raise RoomError(
            f"{what} needs at least {needed / 1e9:.1f} GB of memory, but only {free / 1e9:.1f} GB are free: close "
            "other programs, or use a model with a smaller precision"
        )


def give_back() -> None:
    """Return freed memory to the system that the C library would keep.

    Thousands of small weights, each made by way of large buffers, fragment glibc's heap: an NF4 model of 5 GB took
    20 GB.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def forget_mapped(path: Path, maps: Path = Path("/proc/self/maps")) -> None:
    """Free the pages of a file that this process has mapped but will hardly read again; Linux only.

    They stay in the system's cache, from which a later read takes them. The mapping must not have been written to.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError, ValueError):  # no /proc, or another C library
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        name = str(path.resolve())
        for line in maps.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] == name:
                begin, end = (int(address, 16) for address in fields[0].split("-"))
                advise(begin, end - begin, mmap.MADV_DONTNEED)
