"""Ctrl-C at any time gives exit status 130 and prints nothing to stderr."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

import molmo_edge
from molmo_edge.cli import main
from molmo_edge.runtimes import Unavailable

HOME = Path(molmo_edge.__file__).parent.parent
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent differently there")

# Python runs this before the program. It sends SIGINT when the program begins to import MODULE. BECOMES is what the
# KeyboardInterrupt is turned into, as Python and extension modules do; empty: it is left as it is.
HOOK = """
import os, signal, sys

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):  # the handler runs between two instructions
        pass

class Lost:
    __del__ = lambda self: interrupt()

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != os.environ["MODULE"]:
            return None
        sys.meta_path.remove(self)
        becomes = os.environ["BECOMES"]
        if becomes == "lost":
            Lost()
            return None
        try:
            interrupt()
        except KeyboardInterrupt:
            if becomes == "BadParameter":
                import typer
                raise typer.BadParameter("odd") from None
            if becomes:
                raise getattr(__import__("builtins"), becomes)("numpy.core.multiarray failed to import") from None
            raise

sys.meta_path.insert(0, Finder())
"""


@posix
@pytest.mark.parametrize(
    ("module", "becomes"),
    [
        ("dataclasses", ""),
        ("typer", ""),
        ("typer", "RuntimeError"),
        ("molmo_edge.cli.ask", ""),
        ("molmo_edge.frontend.image_files", ""),
        ("PIL.Image", "BadParameter"),
        ("numpy", "RuntimeError"),
        ("numpy", "SystemError"),
        ("onnxruntime", ""),
        ("onnxruntime", "ImportError"),
        ("onnxruntime", "lost"),
    ],
)
def test_an_interrupt_during_an_import_is_quiet(module: str, becomes: str, tmp_path: Path, golden: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{HOME}", "MODULE": module, "BECOMES": becomes}
    command = [sys.executable, "-m", "molmo_edge.cli", "ask", str(golden / "coffee.png"), "What?"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.usefixtures("capfd")
def test_handlers_of_a_program_that_calls_main_are_left_as_they_were() -> None:
    handler, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    with pytest.raises(SystemExit):
        main(["--version"])
    assert signal.getsignal(signal.SIGINT) is handler
    assert sys.unraisablehook is hook


def test_an_error_without_an_interrupt_keeps_its_message(cli: object, tmp_path: Path) -> None:
    status, _, err = cli("ask", tmp_path / "none.jpg", "What?")  # type: ignore[operator]
    assert status == 1
    assert "there is no image" in err


def test_an_onnxruntime_that_does_not_load_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from molmo_edge.runtimes import onnx_sessions

    class Broken:
        def find_spec(self, name: str, *_: object) -> types.ModuleType | None:
            if name == "onnxruntime":
                raise ImportError("libstdc++.so.6: version `GLIBCXX_3.4.99' not found")
            return None

    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(Unavailable, match=r"installed but does not load \(libstdc"):
        onnx_sessions.import_onnxruntime()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Unavailable, match="not installed"):
        onnx_sessions.import_onnxruntime()
