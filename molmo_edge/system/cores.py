"""Choose the number of threads by the machine's cores, the process's affinity and the container's quota."""

from __future__ import annotations

import os
from numbers import Integral
from pathlib import Path

from molmo_edge.errors import EngineError
from molmo_edge.system.cgroups import PROC, ROOT, cpu_quota, whole_cpus


def available_cores(proc: Path = PROC, root: Path = ROOT) -> int:
    """Number of logical cores that this process may use, limited by the quota of its container."""
    return min(len(_affinity()), _quota(proc, root))


def physical_cores(proc: Path = PROC, root: Path = ROOT) -> int:
    """Like `available_cores`, but on Linux the hardware threads of a core count once: more threads are not faster."""
    mine, cores = _affinity(), set()
    for cpu in mine:
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text("ascii")
        except OSError:
            siblings = str(cpu)
        cores.add(siblings)
    return min(len(cores), _quota(proc, root))


def choose_threads(threads: int | None, proc: Path = PROC, root: Path = ROOT) -> int | None:
    """Validate `threads`. For None return the physical cores if something limits them, else None: the engine chooses.

    An engine counts the machine's cores, but a container with more threads than its quota is throttled. Raises
    EngineError for an invalid number, or for more threads than there are cores.
    """
    if threads is None:
        limited = available_cores(proc, root) < (os.cpu_count() or 1)
        return physical_cores(proc, root) if limited else None
    if not isinstance(threads, Integral) or isinstance(threads, bool) or threads < 1:
        raise EngineError(f"threads must be a positive integer, got {threads!r}")
    most = available_cores(proc, root)
    if threads > most:
        cores = "1 core" if most == 1 else f"{most} cores"
        raise EngineError(f"threads must be at most {most}, got {threads}: this machine or container has {cores}")
    return int(threads)


def _affinity() -> set[int]:
    """Indices of the cores that this process may run on."""
    count = os.cpu_count() or 1
    if not hasattr(os, "sched_getaffinity"):
        return set(range(count))
    return set(sorted(os.sched_getaffinity(0))[:count])


def _quota(proc: Path, root: Path) -> int:
    quota = cpu_quota(proc, root)
    return (os.cpu_count() or 1) if quota is None else whole_cpus(quota)
