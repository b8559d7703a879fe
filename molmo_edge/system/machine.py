"""What Linux says about a board: Jetson's JetPack, power mode, swap, CMA, temperatures and their limits.

`root` is the root of the file system; tests pass a folder with files as on a Jetson or a Raspberry Pi. What a system
does not have is None or empty.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from molmo_edge.system.memory import meminfo

ROOT = Path("/")
_JETPACK = {"32": "4", "34": "5", "35": "5", "36": "6", "38": "7"}  # by the major version of L4T
# CUDA's compute capability, by the first of these words in the name of the module.
_SM = (
    ("Thor", "sm_110"),
    ("Orin", "sm_87"),
    ("Xavier", "sm_72"),
    ("TX2", "sm_62"),
    ("TX1", "sm_53"),
    ("Nano", "sm_53"),
)
_THROTTLED = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}


@dataclass(frozen=True)
class Zone:
    """A thermal zone."""

    name: str
    celsius: float
    limit: float | None  # the lowest temperature at which the system slows down or shuts down, in degrees Celsius

    def __str__(self) -> str:
        limit = "" if self.limit is None else f" (limit {self.limit:.0f})"
        return f"{self.name} {self.celsius:.0f}{limit}"


def board(root: Path = ROOT) -> str | None:
    """The name in the device tree: "NVIDIA Jetson Orin Nano ...", "Raspberry Pi 5 Model B Rev 1.0"."""
    return _text(root / "proc/device-tree/model")


def jetson_release(root: Path = ROOT) -> dict[str, str] | None:
    """The versions of L4T, JetPack (its major number) and CUDA, and the compute capability; None on other machines."""
    line = _text(root / "etc/nv_tegra_release")
    found = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", line or "")
    name = board(root) or ""
    if found is None and not ("NVIDIA" in name or "Jetson" in name):
        return None
    facts: dict[str, str] = {}
    if found is not None:
        facts |= {"l4t": f"{found[1]}.{found[2]}", "jetpack": _JETPACK.get(found[1], "unknown")}
    if (sm := next((sm for word, sm in _SM if word in name), None)) is not None:
        facts["sm"] = sm
    if (cuda := cuda_version(root)) is not None:
        facts["cuda"] = cuda
    return facts


def cuda_version(root: Path = ROOT) -> str | None:
    """The version of the CUDA toolkit in /usr/local/cuda."""
    try:
        return str(json.loads((root / "usr/local/cuda/version.json").read_text(encoding="utf-8"))["cuda"]["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def power_mode(root: Path = ROOT) -> str | None:
    """The mode of Jetson's nvpmodel ("MAXN"), else the governor of the CPU's frequency ("ondemand")."""
    status = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status") or "")
    if status is None:
        governor = _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
        return governor and f"CPU governor {governor}"
    modes = re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", _text(root / "etc/nvpmodel.conf") or "")
    number = int(status[1])
    return next((f"nvpmodel {number} ({name})" for mode, name in modes if int(mode) == number), f"nvpmodel {number}")


def throttling(root: Path = ROOT) -> list[str]:
    """What limits a Raspberry Pi now."""
    text = _text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    try:
        bits = int(text or "0", 16)
    except ValueError:
        return []
    return [what for bit, what in _THROTTLED.items() if bits >> bit & 1]


def swap(root: Path = ROOT) -> list[str]:
    """Each swap device with its size: "/dev/zram0 2.0 GiB"."""
    lines = (_text(root / "proc/swaps") or "").splitlines()[1:]
    fields = [line.split() for line in lines]
    return [f"{one[0]} {int(one[2]) / 2**20:.1f} GiB" for one in fields if len(one) >= 3 and one[2].isdigit()]


def cma(root: Path = ROOT) -> str | None:
    """The contiguous memory that is reserved for devices, which programs cannot use fully."""
    known = meminfo(root / "proc/meminfo")
    if not known.get("CmaTotal"):
        return None
    return f"{known['CmaTotal'] / 2**20:.0f} MiB, {known.get('CmaFree', 0) / 2**20:.0f} MiB free"


def thermal_zones(root: Path = ROOT) -> list[Zone]:
    """The temperature of each zone, and the limit that is reached first."""
    zones = []
    for folder in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        celsius = _celsius(folder / "temp")
        if celsius is None:
            continue
        limits = []
        for kind in folder.glob("trip_point_*_type"):
            limit = _celsius(kind.with_name(kind.name.replace("_type", "_temp")))
            if _text(kind) in ("passive", "hot", "critical") and limit is not None and limit > 0:
                limits.append(limit)
        zones.append(Zone(_text(folder / "type") or folder.name, celsius, min(limits, default=None)))
    return zones


def _celsius(path: Path) -> float | None:
    try:
        return int(_text(path) or "") / 1000
    except ValueError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_bytes().rstrip(b"\0").decode("utf-8", errors="replace").strip() or None
    except OSError:  # missing, or not readable as this user; a sleeping sensor
        return None
