"""Temporary folders of killed exports, locks between processes, full disks, and stamps of verified files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from molmo_edge.checkpoints import bundle as bundle_module
from molmo_edge.checkpoints.bundle import open_bundle
from molmo_edge.export import ExportError, export_checkpoint
from molmo_edge.system.cache import cache_directory

Cli = Callable[..., tuple[int, str, str]]
GOLDEN = Path(__file__).parent / "golden"
WAIT = 120  # seconds until a child must have started

# An export that reports its start and then waits, as a long-running one.
CHILD = """
import sys, time
from molmo_edge.export import {function}
{patch}
def wait(*_, **__):
    print("begun", flush=True)
    time.sleep(600)
{function}(sys.argv[1], sys.argv[2]{arguments})
"""
CHECKPOINT = {"function": "export_checkpoint", "patch": "", "arguments": ", on_progress=lambda *_: wait()"}
BUNDLE = {
    "function": "export_bundle",
    "patch": "import molmo_edge.export.bundle as b; b.check_runs = lambda *_: wait()",
    "arguments": "",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOLMO_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def begin(cache: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`begin(CHECKPOINT, out)` starts an export of a golden checkpoint and returns when it is running."""
    children: list[subprocess.Popen[str]] = []

    def start(kind: dict[str, str], out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHILD.format(**kind), str(GOLDEN / "qwen"), str(out)]
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "MOLMO_EDGE_CACHE": str(cache)}
        )
        children.append(child)
        timer = threading.Timer(WAIT, child.kill)
        timer.start()
        assert child.stdout is not None
        assert child.stdout.readline() == "begun\n"
        timer.cancel()
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def end(child: subprocess.Popen[str], number: int) -> None:
    child.send_signal(number)
    child.wait()


def inside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("kind", [CHECKPOINT, BUNDLE], ids=["checkpoint", "bundle"])
def test_the_next_export_removes_what_a_killed_one_left(
    kind: dict[str, str], begin: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    end(begin(kind, place / "model"), signal.SIGKILL)
    assert inside(place)  # the killed process could not clean up
    export_checkpoint(GOLDEN / "qwen", place / "model")
    assert inside(place) == ["model"]
    end(begin(kind, place / "other"), signal.SIGKILL)
    export_checkpoint(GOLDEN / "qwen", place / "third")
    assert inside(place) == ["model", "third"]
    end(begin(kind, place / "other"), signal.SIGKILL)
    export_checkpoint(GOLDEN / "qwen", tmp_path / "elsewhere")  # removes recorded folders of other directories
    assert inside(place) == ["model", "third"]


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_doctor_removes_what_a_killed_export_left_and_nothing_else(
    begin: Callable[..., subprocess.Popen[str]], tmp_path: Path, cli: Cli
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    mine = place / ".notes-partial"
    mine.mkdir()
    alive = begin(CHECKPOINT, place / "alive")
    end(begin(CHECKPOINT, place / "killed"), signal.SIGKILL)
    found = json.loads(cli("doctor", "--json")[1])["removed"]
    assert len(found) == 1
    assert str(place / ".killed") in found[0]
    assert any("alive" in name for name in inside(place))
    assert not any("killed" in name for name in inside(place))
    assert alive.poll() is None
    assert mine.is_dir()
    assert json.loads(cli("doctor", "--json")[1])["removed"] is None


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_two_exports_to_one_place(begin: Callable[..., subprocess.Popen[str]], tmp_path: Path, cli: Cli) -> None:
    place = tmp_path / "place"
    place.mkdir()
    first = begin(BUNDLE, place / "model")
    status, out, err = cli("export", GOLDEN / "qwen", "--engine", "torch", "--out", place / "model", "--quiet")
    assert (status, out) == (1, "")
    said = (
        f"another process ({first.pid}) is writing {place / 'model'}: wait until it ends, or choose another directory"
    )
    assert err == f"molmo-edge: {said}\n"
    export_checkpoint(GOLDEN / "qwen", place / "beside")
    assert first.poll() is None
    end(first, signal.SIGTERM)  # releases the lock
    export_checkpoint(GOLDEN / "qwen", place / "model")
    assert inside(place) == ["beside", "model"]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("empty", [True, False])
def test_what_is_made_meanwhile_is_left_as_it_is(tmp_path: Path, empty: bool) -> None:
    out = tmp_path / "place" / "model"

    def make(_done: int, _total: int) -> None:
        out.mkdir(exist_ok=True)
        if not empty:
            (out / "theirs").touch()

    with pytest.raises(ExportError, match=r"another process created .* during this export"):
        export_checkpoint(GOLDEN / "qwen", out, on_progress=make)
    assert inside(out.parent) == ["model"]
    assert inside(out) == ([] if empty else ["theirs"])


@pytest.mark.usefixtures("cache")
def test_a_disk_that_is_too_small_is_reported_with_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    from molmo_edge.export import export_bundle

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=150_000_000))
    for precision in ("fp32", "int8", "q4", "fp16", {"decoder": "fp16"}):
        with pytest.raises(ExportError, match=r"needs about \d+ MB, and 200 MB to spare, but .* has only 150 MB free"):
            export_bundle(GOLDEN / "molmoe", tmp_path / "out" / "model", precision)
    assert inside(tmp_path / "out") == []


@pytest.mark.usefixtures("cache")
def test_a_disk_that_fills_up_says_how_much_was_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    from molmo_edge.export import component_graphs, export_bundle

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "decoder.onnx")

    monkeypatch.setitem(component_graphs.BUILDERS, "decoder", full)
    with pytest.raises(
        ExportError, match=r"is full: this export needs about \d+ MB, \d+ MB are written and .*B are free"
    ):
        export_bundle(GOLDEN / "molmoe", tmp_path / "out" / "model")
    assert inside(tmp_path / "out") == []
    monkeypatch.setitem(component_graphs.BUILDERS, "decoder", lambda *_: os.stat("/nowhere/at/all"))
    with pytest.raises(FileNotFoundError):  # other errors are not converted
        export_bundle(GOLDEN / "molmoe", tmp_path / "out" / "model")


@pytest.mark.usefixtures("cache")
@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """In a new namespace, in which every user may mount a small file system."""
    script = f"""
    mount -t tmpfs -o size=150k tmpfs {tmp_path} && exec {sys.executable} -c '
from molmo_edge.export import export_checkpoint, staging
staging.SPARE_BYTES = -10**9
export_checkpoint("{GOLDEN / "qwen"}", "{tmp_path}/model", "fp32")'
    """
    run = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    if "unshare" in run.stderr or "mount" in run.stderr:
        pytest.skip("no namespaces here")
    assert "is full: this export needs about" in run.stderr.splitlines()[-1]


def test_a_work_folder_is_one_threads_and_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    from molmo_edge.system.scratch import BusyError, work_folder

    place = tmp_path / "place"
    place.mkdir()
    with work_folder(place / "x") as folder:
        (folder / "deep").mkdir()
        with pytest.raises(BusyError, match=rf"another process \({os.getpid()}\) is writing"), work_folder(place / "x"):
            pass
        assert folder.is_dir()
        with work_folder(place / "y") as other:
            assert other != folder
    with pytest.raises(KeyError), work_folder(place / "x"):
        raise KeyError
    assert inside(place) == []
    assert list((cache / "work").iterdir()) == []


def test_work_folders_need_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from molmo_edge.system.scratch import work_folder

    (tmp_path / "file").touch()
    monkeypatch.setenv("MOLMO_EDGE_CACHE", str(tmp_path / "file" / "cache"))
    with work_folder(tmp_path / "x") as folder:
        assert folder.is_dir()
    assert inside(tmp_path) == ["file"]


@pytest.mark.usefixtures("cache")
@pytest.mark.skipif(os.name != "posix", reason="flock")
def test_a_file_system_without_locks_asks_for_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    from molmo_edge.system.scratch import BusyError, remove_stale, work_folder

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with work_folder(tmp_path / "x"):
        with pytest.raises(BusyError), work_folder(tmp_path / "x"):
            pass
        assert remove_stale([tmp_path]) == []
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / ".y.molmo-edge-partial").mkdir()
    host = os.uname().nodename
    (tmp_path / ".y.molmo-edge-lock").write_text(f"{gone.pid} elsewhere")
    assert remove_stale([tmp_path]) == []  # of another machine
    (tmp_path / ".y.molmo-edge-lock").write_text(f"{gone.pid} {host}")
    assert [stale.folder.name for stale in remove_stale([tmp_path])] == [".y.molmo-edge-partial"]


@pytest.mark.usefixtures("cache")
def test_temporary_folders_are_found_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons build models of many gigabytes in the system's temporary directory."""
    from molmo_edge.system.scratch import temporary_folder

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    child = (
        "import os; from molmo_edge.system.scratch import temporary_folder as t\n"
        "with t('loss') as f: os.kill(os.getpid(), 9)"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", child], env=env)
    assert len([name for name in inside(tmp_path) if "molmo-edge-loss" in name]) == 2  # the folder and its lock
    with temporary_folder("loss") as folder:
        assert folder.parent == tmp_path
    assert inside(tmp_path) == ["cache"]


# Stamps of verified files.


def test_stamps_of_verified_files_are_pruned(cache: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = cache / "verified"
    open_bundle(tiny_bundle, hashes=True)
    mine = set(inside(stamps))
    for n in range(30):
        (stamps / f"{n:064x}").touch()
        os.utime(stamps / f"{n:064x}", (1e9, 1e9))  # 2001
    open_bundle(tiny_bundle)  # nothing new to record: no pruning
    assert len(inside(stamps)) == 30 + len(mine)
    open_bundle(tiny_bundle, hashes=True)
    assert set(inside(stamps)) == mine
    monkeypatch.setattr(bundle_module, "MOST_STAMPS", 10)
    for n in range(30):
        (stamps / f"{n:064x}").touch()
        os.utime(stamps / f"{n:064x}", (os.stat(stamps).st_mtime - 100,) * 2)
    open_bundle(tiny_bundle, hashes=True)
    assert len(inside(stamps)) == 10
    assert mine <= set(inside(stamps))


def test_a_stamp_in_use_stays(cache: Path, tiny_bundle: Path) -> None:
    open_bundle(tiny_bundle)
    stamps = list((cache / "verified").iterdir())
    for stamp in stamps:
        os.utime(stamp, (1e9, 1e9))
    open_bundle(tiny_bundle)  # computes no hash, but updates the stamps
    assert all(stamp.stat().st_mtime > 1.6e9 for stamp in stamps)


def test_caches_of_earlier_versions_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directories that versions without platformdirs used."""
    import platformdirs
    from platformdirs import macos, unix, windows

    monkeypatch.setenv("MOLMO_EDGE_CACHE", str(tmp_path / "named"))
    assert cache_directory() == tmp_path / "named"
    monkeypatch.delenv("MOLMO_EDGE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(windows, "get_win_folder", lambda _: str(tmp_path / "AppData" / "Local"))
    systems = (
        (unix.Unix, tmp_path / ".cache" / "molmo-edge"),
        (macos.MacOS, tmp_path / "Library" / "Caches" / "molmo-edge"),
        (windows.Windows, tmp_path / "AppData" / "Local" / "molmo-edge"),
    )
    for system, directory in systems:
        monkeypatch.setattr(platformdirs, "PlatformDirs", system)
        assert cache_directory() == directory
    monkeypatch.setattr(platformdirs, "PlatformDirs", unix.Unix)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "molmo-edge"
