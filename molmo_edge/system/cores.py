"""How many threads make sense here: cores of the machine, of this process's affinity, of its container."""

from __future__ import annotations

import os
from numbers import Integral
from pathlib import Path

from molmo_edge.errors import EngineError
from molmo_edge.system.cgroups import PROC, ROOT, cpu_quota, whole_cpus


def available_cores(proc: Path = PROC, root: Path = ROOT) -> int:
    """Logical cores that this process may run on, and no more than its container's quota allows."""
    return min(len(_mine()), _quota(proc, root))


def physical_cores(proc: Path = PROC, root: Path = ROOT) -> int:
    """As `available_cores`, but on Linux two threads of one core count once: as many threads are the fastest."""
    mine, cores = _mine(), set()
    for cpu in mine:
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text("ascii")
        except OSError:
            siblings = str(cpu)
        cores.add(siblings)
    return min(len(cores), _quota(proc, root))


def choose_threads(threads: int | None, proc: Path = PROC, root: Path = ROOT) -> int | None:
    """`threads`, checked; for None the cores that are left where something limits them, else None: the engine's choice.

    An engine counts the machine's cores. With more threads than its quota a container is stopped for most of each
    period, and with thousands of threads a machine does not answer any more. Raises EngineError.
    """
    if threads is None:
        limited = available_cores(proc, root) < (os.cpu_count() or 1)
        return physical_cores(proc, root) if limited else None
    if not isinstance(threads, Integral) or isinstance(threads, bool) or threads < 1:
        raise EngineError(f"threads must be a whole number, at least 1, it is {threads!r}")
    most = available_cores(proc, root)
    if threads > most:
        cores = "1 core" if most == 1 else f"{most} cores"
        raise EngineError(f"{threads} threads are more than the {cores} of this machine or container: at most {most}")
    return int(threads)


def _mine() -> set[int]:
    """Numbers of the cores that this process may run on."""
    count = os.cpu_count() or 1
    if not hasattr(os, "sched_getaffinity"):
        return set(range(count))
    return set(sorted(os.sched_getaffinity(0))[:count])


def _quota(proc: Path, root: Path) -> int:
    quota = cpu_quota(proc, root)
    return (os.cpu_count() or 1) if quota is None else whole_cpus(quota)
