"""glibc's allocator gives every large tensor back to the system and takes it anew: on CPUs a step then takes 5 times as
long. It reads its settings when a process starts, so a process that lacks them starts itself again.
"""

from __future__ import annotations

import os
import sys

SETTINGS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**11)}


def keep_freed_memory() -> None:
    """Restart this Python process with SETTINGS, unless it has them, or another allocator is preloaded.

    Linux alone; elsewhere nothing happens. Call it before anything else has begun.
    """
    if sys.platform != "linux" or "LD_PRELOAD" in os.environ or any(name in os.environ for name in SETTINGS):
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **SETTINGS})
