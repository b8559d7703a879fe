"""How much memory there is, and giving it back."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path


def meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes ("MemAvailable", "SwapFree", ...); empty where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


def available_memory() -> int | None:
    """Bytes that a new process can take without others being pushed out, swap not counted; None where unknown."""
    return meminfo().get("MemAvailable")


def give_back() -> None:
    """Return freed memory to the system, where the C library would keep it.

    Thousands of small weights that stay, each made through large buffers that go, leave glibc's heap full of holes:
    an NF4 model of 5 GB took 20 GB.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
