"""`import molmo_edge` is fast and imports nothing heavy; the checkout's sibling folders are subpackages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import molmo_edge
import molmo_edge.runtimes

HOME = Path(molmo_edge.__file__).parent.parent


def python(code: str, cwd: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(HOME)}
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


HEAVY = ("torch", "onnxruntime", "transformers", "huggingface_hub", "onnx", "matplotlib")


def test_import_alone_is_quick(tmp_path: Path) -> None:
    code = "import time; t = time.perf_counter(); import molmo_edge; print(time.perf_counter() - t)"
    assert min(float(python(code, tmp_path)) for _ in range(3)) < 0.3


@pytest.mark.parametrize(
    ("code", "without"),
    [
        ("import molmo_edge", (*HEAVY, "numpy", "PIL", "tokenizers")),
        ("from molmo_edge import *", HEAVY),
        ("from molmo_edge import Molmo", (*HEAVY, "molmo_edge.sdk.annotation", "molmo_edge.sdk.svg", "PIL.ImageDraw")),
        ("import molmo_edge.runtimes", (*HEAVY, "numpy")),
        ("import molmo_edge.cli", (*HEAVY, "numpy", "PIL", "tokenizers")),
    ],
)
def test_heavy_modules_wait_until_they_are_needed(code: str, without: tuple[str, ...], tmp_path: Path) -> None:
    loaded = python(f"{code}; import sys; print(*sys.modules)", tmp_path).split()
    assert not set(without) & set(loaded)


def test_asking_imports_neither_torch_nor_random_numbers(tiny_bundle: Path, golden: Path, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = sys.modules["numpy.random"] = None  # any import of them fails
from molmo_edge import Molmo
answer = Molmo({str(tiny_bundle)!r}).ask({str(golden / "astronaut.png")!r}, "What?", max_new_tokens=2)
print(len(answer.token_ids))
"""
    assert python(code, tmp_path) == "2"


def test_the_three_folders_are_subpackages(tmp_path: Path) -> None:
    code = "import molmo_edge.runtimes, molmo_edge.quantize, molmo_edge.runtimes.onnx as m; print(m.__name__)"
    assert python(code, tmp_path) == "molmo_edge.runtimes.onnx"


def test_no_other_folder_becomes_a_subpackage(tmp_path: Path) -> None:
    code = "import importlib.util as u; print([u.find_spec(f'molmo_edge.{n}') for n in ('tests', 'examples', 'build')])"
    assert python(code, tmp_path) == "[None, None, None]"


def test_a_wrong_name_says_so() -> None:
    with pytest.raises(AttributeError, match="'Molma'"):
        molmo_edge.Molma  # noqa: B018
    assert {"Molmo", "Answer", "Point", "Scene", "Stream"} <= set(dir(molmo_edge))


def test_the_error_family_is_at_the_top() -> None:
    from molmo_edge.errors import MolmoEdgeError

    assert molmo_edge.MolmoEdgeError is MolmoEdgeError
    assert set(molmo_edge.__all__) <= set(dir(molmo_edge))
    assert all(hasattr(molmo_edge, name) for name in molmo_edge.__all__)
    with pytest.raises(AttributeError, match="'open_runtimes'"):
        molmo_edge.runtimes.open_runtimes  # noqa: B018
    assert all(hasattr(molmo_edge.runtimes, name) for name in molmo_edge.runtimes.__all__)
