"""What doctor and bench read of /proc, /sys and /etc, on trees as of a Jetson and a Raspberry Pi."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from molmo_edge.system import machine
from molmo_edge.system.energy import EnergyMeter, input_rail, rapl_packages


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    zone, monitor = "sys/class/thermal/thermal_zone0", "sys/class/hwmon/hwmon3"
    return write(
        tmp_path,
        {
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
            "usr/local/cuda/version.json": json.dumps({"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}),
            "var/lib/nvpmodel/status": "pmode:0001 fmode:fanNull",
            "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >\n",
            "proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 2097152 0 5\n",
            "proc/meminfo": "MemTotal: 7800000 kB\nCmaTotal: 262144 kB\nCmaFree: 131072 kB\n",
            f"{zone}/type": "cpu-thermal\n",
            f"{zone}/temp": "48500\n",
            f"{zone}/trip_point_0_type": "active\n",
            f"{zone}/trip_point_0_temp": "40000\n",
            f"{zone}/trip_point_1_type": "passive\n",
            f"{zone}/trip_point_1_temp": "99000\n",
            f"{zone}/trip_point_2_type": "critical\n",
            f"{zone}/trip_point_2_temp": "104500\n",
            "sys/class/thermal/thermal_zone1/temp": "",  # a sensor that sleeps
            "sys/class/hwmon/hwmon0/in1_label": "VDD_CPU\n",
            f"{monitor}/in1_label": "VDD_IN\n",
            f"{monitor}/in1_input": "5000\n",
            f"{monitor}/curr1_input": "2000\n",
        },
    )


@pytest.fixture
def pi(tmp_path: Path) -> Path:
    return write(
        tmp_path,
        {
            "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
            "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
            "proc/swaps": "Filename Type Size Used Priority\n/var/swap file 204784 0 -2\n",
            "proc/meminfo": "MemTotal: 8000000 kB\nCmaTotal: 65536 kB\nCmaFree: 1024 kB\n",
        },
    )


def test_a_jetson(jetson: Path) -> None:
    assert (machine.board(jetson) or "").startswith("NVIDIA Jetson Orin Nano")
    assert machine.jetson_release(jetson) == {"l4t": "36.4.3", "jetpack": "6", "sm": "sm_87", "cuda": "12.6.11"}
    assert machine.power_mode(jetson) == "nvpmodel 1 (25W)"
    assert machine.swap(jetson) == ["/dev/zram0 2.0 GiB"]
    assert machine.cma(jetson) == "256 MiB, 128 MiB free"
    assert machine.throttling(jetson) == []
    assert [str(zone) for zone in machine.thermal_zones(jetson)] == ["cpu-thermal 48 (limit 99)"]


@pytest.mark.parametrize(
    ("model", "sm"),
    [
        ("NVIDIA Jetson AGX Thor Developer Kit", "sm_110"),
        ("Jetson-AGX Xavier", "sm_72"),
        ("NVIDIA Jetson Nano", "sm_53"),
    ],
)
def test_the_compute_capability(tmp_path: Path, model: str, sm: str) -> None:
    write(tmp_path, {"proc/device-tree/model": model + "\0", "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0"})
    assert machine.jetson_release(tmp_path) == {"l4t": "38.2.0", "jetpack": "7", "sm": sm}


def test_a_raspberry_pi(pi: Path) -> None:
    assert machine.board(pi) == "Raspberry Pi 5 Model B Rev 1.0"
    assert machine.jetson_release(pi) is None
    assert machine.power_mode(pi) == "CPU governor ondemand"
    assert machine.throttling(pi) == ["under-voltage", "throttled"]
    assert machine.swap(pi) == ["/var/swap 0.2 GiB"]
    assert machine.cma(pi) == "64 MiB, 1 MiB free"
    assert EnergyMeter(pi).source is None


def test_a_machine_without_any_of_it(tmp_path: Path) -> None:
    known = (machine.board, machine.jetson_release, machine.cuda_version, machine.power_mode, machine.cma)
    assert [probe(tmp_path) for probe in known] == [None] * 5
    assert [probe(tmp_path) for probe in (machine.swap, machine.thermal_zones, machine.throttling)] == [[], [], []]
    with EnergyMeter(tmp_path) as meter:
        pass
    assert (meter.joules, meter.source) == (None, None)


def test_damaged_files_are_as_missing_ones(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "usr/local/cuda/version.json": "{",
            "proc/swaps": "one\ntwo three\n",
            "sys/devices/platform/soc/soc:firmware/get_throttled": "none",
            "sys/class/thermal/thermal_zone0/temp": "hot",
            "sys/class/powercap/intel-rapl:0/energy_uj": "many",
        },
    )
    assert machine.cuda_version(tmp_path) is None
    assert machine.swap(tmp_path) == []
    assert machine.throttling(tmp_path) == []
    assert machine.thermal_zones(tmp_path) == []
    assert rapl_packages(tmp_path) == []


@pytest.mark.parametrize(("before", "after", "joules"), [(1_000_000, 3_500_000, 2.5), (9_000_000, 1_000_000, 2.0)])
def test_rapl_adds_packages_and_survives_a_wrap(tmp_path: Path, before: int, after: int, joules: float) -> None:
    counter = "sys/class/powercap/intel-rapl:0/energy_uj"
    write(
        tmp_path,
        {
            counter: f"{before}\n",
            "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "10000000\n",
            "sys/class/powercap/intel-rapl:0:0/energy_uj": "5\n",  # a part of the package
        },
    )
    with EnergyMeter(tmp_path) as meter:
        write(tmp_path, {counter: f"{after}\n"})
    assert meter.source == "RAPL"
    assert meter.joules == pytest.approx(joules)


def test_the_power_of_a_jetson_is_integrated(jetson: Path) -> None:
    rail = input_rail(jetson)
    assert rail is not None
    assert rail[0].name == "in1_input"
    began = time.perf_counter()
    with EnergyMeter(jetson) as meter:
        time.sleep(0.12)
    most = 10 * (time.perf_counter() - began)  # 5 V, 2 A
    assert meter.source == "INA3221"
    assert meter.joules is not None
    assert 10 * 0.12 * 0.9 < meter.joules <= most


def test_doctor_reports_the_machine(cli: Any) -> None:
    status, out, _ = cli("doctor", "--json")
    facts = json.loads(out)
    assert status == (1 if facts["problems"] else 0)
    named = ("board", "jetson", "cuda", "swap", "cma", "power_mode", "throttled", "temperatures", "energy", "disk")
    assert set(named) <= set(facts)
    assert {"network", "next", "llama_cpp_build", "bitsandbytes_kernels"} <= set(facts)


def test_bench_reports_energy(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # without the comparison, which takes longer
    status, out, _ = cli("bench", "--repeat", 1, "--max-new-tokens", 2, "--max-crops", 0, "--json", "--quiet")
    assert status == 0
    (timing,) = json.loads(out)["timings"]
    assert (timing["joules"] is None) == (timing["tokens_per_joule"] is None)
