"""The commands, code and links of README.md and the documentation work as written, from a package index too."""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer
from import_graph import module_files

import molmo_edge.cli

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[[^]]+\]\((?!https?:|#)([^)#]+)[^)]*\)")

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="needs the source tree")


def blocks(language: str = "", page: Path = ROOT / "README.md") -> list[str]:
    """The code blocks of a page in this language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [block for word, block in found if word == language]


def pages() -> list[Path]:
    names = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md", "molmo_edge/nano/MODEL_CARD.md")
    return [*(ROOT / name for name in names), *sorted((ROOT / "docs").glob("*.md"))]


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", pages(), ids=page_id)


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    """setup.py, which runs nothing when it is imported."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("molmo_edge_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_prints_points(tmp_path: Path) -> None:
    """In a folder with nothing but the examples, as somebody who copies it has them."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", blocks("python")[0]]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer, point, *rest = done.stdout.splitlines()
    assert re.fullmatch(r'<point x="[\d.]+" y="[\d.]+" alt="horse">horse</point>', answer)
    assert re.fullmatch(r"horse \([\d.]+, [\d.]+\)", point)
    assert int(rest[0]) >= 1
    assert rest[1].strip()
    assert (tmp_path / "annotated.png").is_file()


@every_page
def test_other_python_compiles(page: Path) -> None:
    for block in blocks("python", page):
        compile(block, page.name, "exec")


@every_page
def test_commands_have_the_options_that_pages_name(page: Path) -> None:
    """Each line `molmo-edge ...` of a code block, and each such command in backquotes."""
    app = typer.main.get_command(molmo_edge.cli.app)
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks(page=page) for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *re.findall(r"`([^`\n]+)`", text)]:
        for words in re.findall(r"molmo-edge ((?:[a-z]\S*|--).*)", line.partition(" #")[0]):
            command, names = app, list(words.split())
            while hasattr(command, "commands") and names and not names[0].startswith("-") and names[0] != "COMMAND":
                assert names[0].rstrip(",;") in command.commands, line
                command = command.commands[names.pop(0).rstrip(",;")]
            options = {
                option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
            }
            for name in names:
                if name.startswith("--") and name != "--" and names[:1] != ["COMMAND"]:
                    assert name.partition("=")[0] in {*options, "--help"}, line


@every_page
def test_files_that_pages_name_exist(page: Path) -> None:
    folders = "molmo_edge|export|quantize|runtimes|recipes|tests|docs|benchmarks|deploy|examples"
    for path in re.findall(rf"`((?:{folders})/[\w./*-]+)`", page.read_text(encoding="utf-8")):
        assert list(ROOT.glob(path.rstrip("/"))), path


def test_where_a_command_takes_pytorch_the_smaller_build_is_named_before_it() -> None:
    """Pip's own choice on Linux takes 6 GB."""
    wants = [block for block in blocks() if re.search(r"pip install .*\[.*\b(test|torch)\b", block)]
    assert len(wants) >= 2
    for block in wants:
        hint, _, rest = block.partition("\n")
        assert hint.startswith("pip install torch --index-url https://download.pytorch.org/whl/cpu"), block
        assert "pip install" in rest


@every_page
def test_python_names_that_pages_name_exist(page: Path) -> None:
    files = module_files()
    for name in re.findall(r"`(molmo_edge(?:\.\w+)+)", page.read_text(encoding="utf-8")):
        if name not in files and not name.endswith((".json", ".py")):
            module, _, member = name.rpartition(".")
            assert module in files, name
            source = files[module].read_text(encoding="utf-8")
            assert re.search(
                rf"^(?:class |def )?{member}\b|\bimport\b.*\b{member}\b|\"{member}\"", source, re.MULTILINE
            ), name


@every_page
def test_links_lead_to_files(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert missing == []


def test_the_sdist_takes_what_is_linked_and_names_what_exists() -> None:
    taken = ["README.md", "LICENSE", "NOTICE", "molmo_edge/*"]  # by setuptools itself
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        word, *patterns = line.split()
        if word in ("include", "graft"):
            for pattern in patterns:
                assert (ROOT / pattern).exists(), f"MANIFEST.in: {pattern}"
            taken += [f"{pattern}/*" if word == "graft" else pattern for pattern in patterns]
    for page in pages():
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            path = (page.parent / link).resolve().relative_to(ROOT.resolve()).as_posix()
            assert any(fnmatch.fnmatch(path, pattern) for pattern in taken), f"{page.name}: {path}"


def test_a_package_index_shows_no_link_that_leads_nowhere(setup: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = setup.description(readme, None)
    assert LINK.findall(readme)
    assert not LINK.findall(shown)
    assert "![" not in shown
    assert "docs/export.md" in shown
    assert "[Molmo](https://arxiv.org/abs/2409.17146)" in shown
    assert "[docs/export.md](https://host/me/it/blob/main/docs/export.md)" in setup.description(
        readme, "https://host/me/it"
    )
    assert "](https://host/me/it/raw/main/examples/answer.jpg)" in setup.description(readme, "https://host/me/it/")
    assert setup.source_url('[project.urls]\nSource = "https://host/me/it"\n') == "https://host/me/it"
