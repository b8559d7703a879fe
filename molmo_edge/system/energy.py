"""The energy that a machine uses, where it reports it: RAPL on x86, INA3221 power monitors on Jetsons.

`root`: see molmo_edge.system.machine.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType

from molmo_edge.system.machine import ROOT

_INTERVAL = 0.05  # seconds between readings of a power monitor
_INPUT = ("VDD_IN", "POM_5V_IN", "VIN_SYS_5V0", "VIN")  # rails that carry the power of a whole Jetson


class EnergyMeter:
    """Measures the joules of a block: `with EnergyMeter() as meter: ...; meter.joules`.

    `joules` is None if the machine reports no energy. With RAPL it is that of the processor packages, with an INA3221
    that of the board's input, integrated over readings.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.joules: float | None = None
        self.source: str | None = None
        self._packages = rapl_packages(root)
        self._rail = None if self._packages else input_rail(root)
        if self._packages or self._rail:
            self.source = "RAPL" if self._packages else "INA3221"
        self._stop = threading.Event()
        self._sum = 0.0

    def __enter__(self) -> EnergyMeter:
        self._before = [_number(package / "energy_uj") for package in self._packages]
        if self._rail is not None:
            self._thread = threading.Thread(target=self._integrate, args=(self._rail,), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._packages:
            self.joules = sum(
                _since(package, before) for package, before in zip(self._packages, self._before, strict=True)
            )
        elif self._rail is not None:
            self._stop.set()
            self._thread.join()
            self.joules = self._sum

    def _integrate(self, rail: tuple[Path, Path]) -> None:
        last, watts, done = time.perf_counter(), _watts(rail), False
        while not done:
            done = self._stop.wait(_INTERVAL)
            now, then = time.perf_counter(), watts
            watts = _watts(rail)
            self._sum += (now - last) * (then + watts) / 2
            last = now


def rapl_packages(root: Path = ROOT) -> list[Path]:
    """The processor packages whose counters this user may read; since 2020 often root only."""
    zones = sorted((root / "sys/class/powercap").glob("intel-rapl:*"))
    return [zone for zone in zones if zone.name.count(":") == 1 and _number(zone / "energy_uj") is not None]


def input_rail(root: Path = ROOT) -> tuple[Path, Path] | None:
    """Voltage in mV and current in mA of the board's input, of an INA3221."""
    for folder in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        for label in sorted(folder.glob("in*_label")):
            number = label.name.removeprefix("in").removesuffix("_label")
            rail = folder / f"in{number}_input", folder / f"curr{number}_input"
            if _label(label) in _INPUT and all(_number(part) is not None for part in rail):
                return rail
    return None


def _since(package: Path, before: int | None) -> float:
    now = _number(package / "energy_uj")
    if now is None or before is None:
        return 0.0
    if now < before:  # the counter wrapped
        now += _number(package / "max_energy_range_uj") or 0
    return (now - before) / 1e6


def _watts(rail: tuple[Path, Path]) -> float:
    millivolts, milliamperes = (_number(part) or 0 for part in rail)
    return millivolts * milliamperes / 1e6


def _label(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
