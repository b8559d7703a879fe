"""Settings of glibc's allocator for training on a CPU.

By default it returns each large tensor to the system and requests it again, which makes a step five times slower. The
settings are read when a process starts, so a process that was started without them restarts itself.
"""

from __future__ import annotations

import os
import sys

SETTINGS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**11)}


def keep_freed_memory() -> None:
    """Restart this Python process with SETTINGS, unless it has them or another allocator is preloaded.

    Does nothing on systems other than Linux. Call it before the process has done anything else.
    """
    if sys.platform != "linux" or "LD_PRELOAD" in os.environ or any(name in os.environ for name in SETTINGS):
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **SETTINGS})
