"""Threads and memory respect the limits of a container; more threads than cores are refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import molmo_edge
from molmo_edge import Molmo
from molmo_edge.runtimes import EngineError

ROOT = Path(molmo_edge.__file__).parent.parent
COUNT = os.cpu_count() or 1


def machine(folder: Path, proc: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A fake /proc/self/cgroup and /sys/fs/cgroup."""
    (folder / "self").write_text(proc)
    for name, text in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "self", folder / "cgroup"


V1 = "12:cpu,cpuacct:/docker/ab\n5:memory:/docker/ab\n1:name=systemd:/docker/ab\n"


@pytest.mark.parametrize(
    ("proc", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),  # of the parent group
        ("0::/../b\n", {"cpu.max": "200000 100000\n"}, 2.0),  # as seen from a namespace
        ("0::/host/only\n", {"cpu.max": "200000 100000\n"}, 2.0),  # a path outside of the container
        ("0::/\n", {}, None),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 3.0),
        (V1, {"cpu/docker/ab/cpu.cfs_quota_us": "50000\n", "cpu/docker/ab/cpu.cfs_period_us": "100000\n"}, 0.5),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        (V1 + "0::/\n", {"unified/cpu.max": "100000 100000\n", "cpu/cpu.cfs_quota_us": "-1\n"}, 1.0),
        ("nonsense\n", {"cpu.max": "nonsense"}, None),
    ],
)
def test_cpu_quota(tmp_path: Path, proc: str, files: dict[str, str], quota: float | None) -> None:
    from molmo_edge.system.cgroups import cpu_quota

    assert cpu_quota(*machine(tmp_path, proc, files)) == quota


@pytest.mark.parametrize(
    ("proc", "files", "left"),
    [
        ("0::/\n", {"memory.max": "1000\n", "memory.current": "400\n"}, 600),
        ("0::/\n", {"memory.max": "1000\n", "memory.current": "1100\n"}, 0),
        ("0::/\n", {"memory.max": "max\n", "memory.current": "400\n"}, None),
        (
            "0::/a\n",
            {"a/memory.max": "900", "a/memory.current": "100", "memory.max": "700", "memory.current": "1"},
            699,
        ),
        ("0::/\n", {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 1\ninactive_file 500\n"}, 600),
        (V1, {"memory/memory.limit_in_bytes": "1000\n", "memory/memory.usage_in_bytes": "300\n"}, 700),
    ],
)
def test_memory_that_a_container_leaves(tmp_path: Path, proc: str, files: dict[str, str], left: int | None) -> None:
    from molmo_edge.system.cgroups import memory_left

    assert memory_left(*machine(tmp_path, proc, files)) == left


def test_available_memory_is_what_the_container_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from molmo_edge.system.memory import available_memory

    monkeypatch.setattr("molmo_edge.system.memory.meminfo", lambda: {"MemAvailable": 5000})
    assert available_memory(*machine(tmp_path, "0::/\n", {"memory.max": "1000", "memory.current": "400"})) == 600
    assert available_memory(*machine(tmp_path, "0::/\n", {"memory.max": "9000", "memory.current": "400"})) == 5000


class TestThreads:
    @pytest.fixture
    def quota(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], tuple[Path, Path]]:
        """Fake a container with a quota in thousandths of a CPU, on a machine with eight cores."""

        def make(thousandths: int) -> tuple[Path, Path]:
            monkeypatch.setattr("os.cpu_count", lambda: 8)
            monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
            return machine(tmp_path, "0::/\n", {"cpu.max": f"{100 * thousandths} 100000\n"})

        return make

    def test_the_quota_is_the_default(self, quota: Callable[[int], tuple[Path, Path]]) -> None:
        from molmo_edge.system.cores import choose_threads

        assert choose_threads(None, *quota(1500)) == 2
        assert choose_threads(None, *quota(300)) == 1

    def test_without_a_limit_the_engine_chooses(self, quota: Callable[[int], tuple[Path, Path]]) -> None:
        from molmo_edge.system.cores import choose_threads

        assert choose_threads(None, *quota(64_000)) is None

    def test_affinity_is_a_limit(
        self, quota: Callable[[int], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from molmo_edge.system.cores import available_cores, choose_threads

        files = quota(64_000)
        monkeypatch.setattr("os.sched_getaffinity", lambda _: {5}, raising=False)
        assert (available_cores(*files), choose_threads(None, *files)) == (1, 1)
        with pytest.raises(EngineError, match="container has 1 core"):
            choose_threads(2, *files)

    def test_more_than_the_quota_is_refused(self, quota: Callable[[int], tuple[Path, Path]]) -> None:
        from molmo_edge.system.cores import choose_threads

        assert choose_threads(2, *quota(1500)) == 2
        with pytest.raises(EngineError, match="at most 2, got 3: this machine or container has 2 cores"):
            choose_threads(3, *quota(1500))

    @pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "2"])
    def test_what_is_no_number_of_threads_is_refused(self, wrong: Any) -> None:
        with pytest.raises(EngineError, match="threads must be a positive integer"):
            Molmo(threads=wrong)


@pytest.mark.parametrize("kind", ["bundle", "checkpoint"])
def test_a_model_refuses_more_threads_than_cores(kind: str, tiny_bundle: Path, golden: Path) -> None:
    model = tiny_bundle if kind == "bundle" else golden / "molmoe"
    with pytest.raises(EngineError, match=f"threads must be at most {COUNT}, got {COUNT + 1}"):
        Molmo(model, threads=COUNT + 1)


@pytest.mark.parametrize("command", ["ask", "chat", "bench", "verify", "eval", "loss"])
def test_a_command_refuses_more_threads_than_cores(command: str, cli: Any, golden: Path) -> None:
    photo = golden / "astronaut.png"
    arguments = {"ask": [photo, "What?"], "chat": [photo], "eval": ["nano", "--tasks", "x"], "loss": ["nano", "nano"]}
    status, _, said = cli(command, *arguments.get(command, []), "--threads", COUNT + 1)
    assert status == 2
    assert f"threads must be at most {COUNT}, got {COUNT + 1}" in " ".join(re.sub("[│╭╮╰╯─]", " ", said).split())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux does")
def test_a_container_runs_as_many_threads_as_its_quota(tmp_path: Path) -> None:
    proc, root = machine(tmp_path, "0::/\n", {"cpu.max": "100000 100000\n"})
    code = f"""
import os, sys
from pathlib import Path
try:
    import molmo_edge.system.cores as cores
    cores.choose_threads.__defaults__ = (Path({str(proc)!r}), Path({str(root)!r}))
except ImportError:
    pass
import numpy as np
from molmo_edge import Molmo
os.cpu_count = lambda: 2
molmo = Molmo()
molmo.ask(np.zeros((64, 64, 3), np.uint8), "What?", max_new_tokens=2)
print(len(os.listdir("/proc/self/task")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == 1  # a session with one thread runs in the calling thread
