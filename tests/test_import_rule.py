"""Imports only go down the list of layers (docs/architecture.md), and no modules import each other in a circle."""

from __future__ import annotations

import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from import_graph import LAYERS, ROOT, imports, layer, module_files

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs the source tree")


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Each import from a lower layer to a higher one."""
    height = {name: -place for place, name in enumerate(LAYERS)}
    return [
        f"{module} ({layer(module)}) imports {imported} ({layer(imported)})"
        for module, targets in sorted(graph.items())
        for imported in sorted(targets)
        if height[layer(imported)] > height[layer(module)]
    ]


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one cycle, in order; empty without one."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_imports_only_go_down() -> None:
    assert upward(imports()) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert cycle(imports()) == []


def test_the_graph_covers_the_whole_package() -> None:
    names = set(module_files())
    assert {"molmo_edge", "molmo_edge.molmo", "molmo_edge.export", "molmo_edge.runtimes.onnx"} <= names
    assert {layer(name) for name in names} >= set(LAYERS) - {"server"}


@pytest.mark.parametrize(
    ("file", "statement", "expected"),
    [
        ("runtimes/onnx.py", "import molmo_edge.cli.ask", ["molmo_edge.runtimes.onnx (runtimes) imports"]),
        ("quantize/gptq.py", "from molmo_edge import export", ["molmo_edge.quantize.gptq (quantize) imports"]),
        ("quantize/gptq.py", "def f():\n    from molmo_edge.export import ExportError", ["molmo_edge.quantize.gptq"]),
        ("molmo_edge/config.py", "if TYPE_CHECKING:\n    from molmo_edge.cli import ask", ["molmo_edge.config (base)"]),
        ("molmo_edge/config.py", "from .cli import ask", ["molmo_edge.config (base) imports molmo_edge.cli.ask"]),
        (
            "molmo_edge/config.py",
            "from molmo_edge import __version__",
            ["molmo_edge.config (base) imports molmo_edge "],
        ),
        ("export/bundle.py", "from molmo_edge.quantize import gptq\nimport onnx", []),
    ],
)
def test_every_form_of_import_counts(tmp_path: Path, file: str, statement: str, expected: list[str]) -> None:
    for name in ("molmo_edge/__init__.py", "molmo_edge/cli/ask.py", "export/__init__.py", "quantize/gptq.py", file):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / file).write_text(statement)
    found = upward(imports(tmp_path))
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True))


def test_a_circle_is_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_a_module_without_a_layer_is_named() -> None:
    with pytest.raises(ValueError, match="LAYER_OF"):
        layer("molmo_edge.somewhere")


def test_the_pictures_of_the_architecture_are_current() -> None:
    """They are drawn from the source: run docs/draw_architecture.py after a new import between packages."""
    command = [sys.executable, "docs/draw_architecture.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_picture_of_the_data_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "images" / "data.svg").read_text(encoding="utf-8")
    names = re.findall(r"[\w/]+\.py", text)
    assert len(names) >= 5
    for name in names:
        folders = ("", "molmo_edge", "molmo_edge/frontend")
        assert any((ROOT / folder / name).is_file() for folder in folders), name
