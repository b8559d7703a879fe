"""What the README shows runs as it stands there, and its links lead somewhere, from a package index too."""

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

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[[^]]+\]\((?!https?:|#)([^)#]+)[^)]*\)")

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="needs the source tree")


def blocks(language: str = "") -> list[str]:
    """The code blocks of the README in this language."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for word, block in found if word == language]


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md"]


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
    assert re.fullmatch(r'<point x="[\d.]+" y="[\d.]+" alt="cup">cup</point>', answer)
    assert re.fullmatch(r"cup \([\d.]+, [\d.]+\)", point)
    assert int(rest[0]) >= 1
    assert rest[1].strip()
    assert (tmp_path / "annotated.png").is_file()


def test_other_python_is_python() -> None:
    for block in blocks("python"):
        compile(block, "README.md", "exec")


def test_where_a_command_takes_pytorch_the_smaller_build_is_named_before_it() -> None:
    """Pip's own choice on Linux takes 6 GB."""
    wants = [block for block in blocks() if re.search(r"pip install .*\[.*\b(test|torch)\b", block)]
    assert len(wants) >= 2
    for block in wants:
        hint, _, rest = block.partition("\n")
        assert hint.startswith("pip install torch --index-url https://download.pytorch.org/whl/cpu"), block
        assert "pip install" in rest


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
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
    assert "docs/export.md" in shown
    assert "[Molmo](https://arxiv.org/abs/2409.17146)" in shown
    assert "[docs/export.md](https://host/me/it/blob/main/docs/export.md)" in setup.description(
        readme, "https://host/me/it"
    )
    assert setup.source_url('[project.urls]\nSource = "https://host/me/it"\n') == "https://host/me/it"
