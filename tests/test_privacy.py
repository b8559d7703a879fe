"""No library that molmo-edge loads reports usage: it writes no files under HOME and looks up no names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import molmo_edge

ROOT = Path(molmo_edge.__file__).parent.parent
SILENCED = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "HF_UPDATE_DOWNLOAD_COUNTS")
# The variables of SWITCHES, and others that switch reports off.
OTHERS = ("DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI", "GITHUB_ACTIONS", "TF_BUILD", "ORT_RUNNING_UNIT_TESTS")
UNWRITABLE = "/dev/null/home"  # not even root can create a directory there

ASK = """
import sys, time
import numpy as np
from molmo_edge import Molmo
Molmo().ask(np.zeros((64, 64, 3), np.uint8), "What?", max_new_tokens=2)
"""
# Both libraries contact their host when they are used, not when they are imported.
READ_ROWS = """
import molmo_edge
from huggingface_hub.utils import build_hf_headers
build_hf_headers()
import pyarrow, pyarrow.parquet, datasets
pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), "rows.parquet")
datasets.load_dataset("parquet", data_files={"train": ["rows.parquet"]}, split="train", cache_dir="cache")
"""
# onnxruntime resolves names in C, which a patch of `socket` does not record.
RECORDER = r"""
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    int file = open(getenv("LOOKUPS"), O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (file >= 0) {
        dprintf(file, "%s\n", node ? node : "");
        close(file);
    }
    return EAI_NONAME;
}
"""


@dataclass
class Run:
    out: str
    err: str
    written: list[str]  # files under HOME, relative to it
    looked_up: list[str]  # host names


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """A library that records each host name that a process looks up; None if it cannot be built."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    folder = tmp_path_factory.mktemp("recorder")
    (folder / "recorder.c").write_text(RECORDER)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", "recorder.so", "recorder.c"], cwd=folder, check=True)
    return folder / "recorder.so"


@pytest.fixture
def run(tmp_path: Path, recorder: Path | None) -> Callable[..., Run]:
    """Run Python with an empty home directory."""

    def start(*arguments: str, stdin: str = "", home: str | None = None, **variables: str) -> Run:
        fresh = tmp_path / "home"
        fresh.mkdir()
        environment = {k: v for k, v in os.environ.items() if k not in (*SILENCED, *OTHERS, "XDG_CACHE_HOME")}
        environment |= {"HOME": home or str(fresh), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment |= {"LOOKUPS": str(tmp_path / "lookups"), "HF_HOME": str(tmp_path / "hf")}
        environment |= {"MPLCONFIGDIR": ""} | ({} if recorder is None else {"LD_PRELOAD": str(recorder)}) | variables
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, input=stdin, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        files = [str(path.relative_to(fresh)) for path in fresh.rglob("*") if path.is_file()]
        log = tmp_path / "lookups"
        return Run(done.stdout, done.stderr, files, log.read_text().split() if log.exists() else [])

    return start


def test_ask_writes_no_usage_data(run: Callable[..., Run]) -> None:
    done = run("-c", ASK)
    assert (done.written, done.looked_up) == ([], [])


@pytest.mark.parametrize("command", ["ask", "chat"])
def test_a_command_writes_no_usage_data(command: str, run: Callable[..., Run], golden: Path) -> None:
    question = ["What?"] if command == "ask" else []
    arguments = [command, str(golden / "astronaut.png"), *question, "--max-new-tokens", "2", "--max-crops", "1"]
    done = run("-m", "molmo_edge.cli", *arguments, stdin="What?\nWhy?\n")
    assert done.out
    assert (done.written, done.looked_up) == ([], [])


def test_a_long_lived_process_looks_up_no_name(run: Callable[..., Run], recorder: Path | None) -> None:
    if recorder is None:
        pytest.skip("needs a C compiler on Linux")
    done = run("-c", ASK + "time.sleep(12)")  # onnxruntime 1.32 sends its first events after 9 seconds
    assert (done.written, done.looked_up) == ([], [])


def test_the_recorder_sees_lookups(run: Callable[..., Run], recorder: Path | None) -> None:
    if recorder is None:
        pytest.skip("needs a C compiler on Linux")
    code = "import contextlib, socket\nwith contextlib.suppress(OSError): socket.getaddrinfo('example.invalid', 80)"
    assert run("-c", code).looked_up == ["example.invalid"]


def test_reading_local_rows_looks_up_no_name(run: Callable[..., Run], recorder: Path | None) -> None:
    pytest.importorskip("datasets")
    if recorder is None:
        pytest.skip("needs a C compiler on Linux")
    assert run("-c", READ_ROWS).looked_up == []


def test_bitsandbytes_downloads_no_kernels(run: Callable[..., Run], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **kwargs): open('downloaded', 'w')\n")
    code = (
        "from molmo_edge.modeling.bitsandbytes import import_bitsandbytes; import_bitsandbytes('tests')\n"
        "import kernels  # an app can still import it\n"
    )
    run("-c", code, PYTHONPATH=os.pathsep.join((str(ROOT), str(tmp_path))))
    assert not (tmp_path / "downloaded").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="the home is named otherwise")
def test_an_unwritable_home_prints_no_warning(run: Callable[..., Run], golden: Path) -> None:
    photo = str(golden / "astronaut.png")
    arguments = ["ask", photo, "What?", "--quiet", "--max-new-tokens", "2", "--max-crops", "1"]
    assert run("-m", "molmo_edge.cli", *arguments, home=UNWRITABLE, MOLMO_EDGE_CACHE="").err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="the home is named otherwise")
def test_plots_print_no_warning_without_a_home(run: Callable[..., Run]) -> None:
    pytest.importorskip("matplotlib")
    code = "from molmo_edge.evaluation.plots import check_matplotlib; check_matplotlib()"
    assert run("-c", code, home=UNWRITABLE).err == ""


@pytest.mark.parametrize("first", ["import molmo_edge", "import molmo_edge.runtimes.onnx", "import molmo_edge.cli"])
def test_the_switches_are_set_before_any_library_is_loaded(first: str, run: Callable[..., Run]) -> None:
    code = f"{first}; import json, os; print(json.dumps({{k: os.environ.get(k) for k in {SILENCED}}}))"
    assert json.loads(run("-c", code).out) == dict(zip(SILENCED, ("1", "1", "0"), strict=True))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"ORT_DISABLE_TELEMETRY": "0"}, ("0", "1", "0")),
        ({"HF_HUB_DISABLE_TELEMETRY": "0", "HF_UPDATE_DOWNLOAD_COUNTS": "AUTO"}, ("1", "0", "AUTO")),
        ({"DO_NOT_TRACK": "0"}, ("1", None, "0")),
        ({"ORT_DISABLE_TELEMETRY": ""}, ("1", "1", "0")),  # an empty value counts as unset
    ],
)
def test_a_value_that_the_user_set_wins(
    given: dict[str, str], expected: tuple[str | None, ...], run: Callable[..., Run]
) -> None:
    code = f"import molmo_edge, json, os; print(json.dumps([os.environ.get(k) for k in {SILENCED}]))"
    assert json.loads(run("-c", code, **given).out) == list(expected)


def test_doctor_says_what_each_library_reports(run: Callable[..., Run]) -> None:
    said = json.loads(run("-m", "molmo_edge.cli", "doctor", "--json", ORT_DISABLE_TELEMETRY="0").out)["usage_reports"]
    assert said == {
        "onnxruntime": "on (ORT_DISABLE_TELEMETRY=0)",
        "huggingface_hub": "off (HF_HUB_DISABLE_TELEMETRY=1)",
        "datasets": "off (HF_UPDATE_DOWNLOAD_COUNTS=0)",
    }


def test_the_documentation_names_every_switch() -> None:
    from molmo_edge.system import privacy

    text = (Path(__file__).parent.parent / "docs" / "privacy.md").read_text(encoding="utf-8")
    assert all(f"`{switch.variable}`" in text and f"`{switch.library}`" in text for switch in privacy.SWITCHES)
