"""CPU and memory limits of a container or a systemd slice on Linux: cgroup v1 and v2."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc/self/cgroup")  # groups of this process, by controller
ROOT = Path("/sys/fs/cgroup")


def cpu_quota(proc: Path = PROC, root: Path = ROOT) -> float | None:
    """CPU time that this process may use, in CPUs (1.5: one and a half CPUs); None without a limit."""
    quotas = []
    for version, group in _groups("cpu", proc, root):
        if version == 2:
            quota, period = [*_words(group / "cpu.max"), "", ""][:2]
        else:
            quota, period = ("".join(_words(group / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(quota) and int(period):  # else "max", "-1", or no such file
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_left(proc: Path = PROC, root: Path = ROOT) -> int | None:
    """Bytes that this process can still allocate; None without a limit. The page cache counts as free."""
    left = []
    for version, group in _groups("memory", proc, root):
        names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
        limit, used = ("".join(_words(group / f"memory.{name}")) for name in names)
        if limit.isdigit() and used.isdigit():
            left.append(max(0, int(limit) - max(0, int(used) - _cached(group))))
    return min(left, default=None)


def _groups(controller: str, proc: Path, root: Path) -> Iterator[tuple[int, Path]]:
    """Version and directory of each group of this process: its own first, then the parents."""
    try:
        lines = proc.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        lines = ["0::/"]
    for line in lines:
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if not names:
            version, mounts = 2, (root / "unified", root)
        elif controller in names.split(","):
            version, mounts = 1, (root / names, root / controller)
        else:
            continue
        mount = next((mount for mount in mounts if mount.is_dir()), None)
        if mount is None:
            continue
        # In a container the path may be that of the host, while the mount shows only the container's own group.
        parts = [part for part in path.split("/") if part]
        for depth in range(0 if ".." in parts else len(parts), -1, -1):
            yield version, mount.joinpath(*parts[:depth])


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return []


def _cached(group: Path) -> int:
    words = _words(group / "memory.stat")
    found = dict(zip(words[::2], words[1::2], strict=False))
    return int(found.get("total_inactive_file") or found.get("inactive_file") or 0)


def whole_cpus(quota: float) -> int:
    """Number of threads that can use a quota fully."""
    return max(1, math.ceil(quota))
