"""How much memory there is, and the refusal where something would not fit."""

from __future__ import annotations

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


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
