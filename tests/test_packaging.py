"""Every package is listed, and wheel, sdist, editable and plain installs work, also from within the checkout."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP_LEVEL = {"export": "molmo_edge.export", "quantize": "molmo_edge.quantize", "runtimes": "molmo_edge.runtimes"}
PROBE = """
import molmo_edge, molmo_edge.runtimes.onnx, molmo_edge.quantize, molmo_edge.cli, importlib.util
from molmo_edge import Molmo, Answer, Point
assert importlib.util.find_spec("molmo_edge.export") is not None
assert importlib.util.find_spec("molmo_edge.tests") is None
print(molmo_edge.__file__)
"""

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs the source tree")


def packages_in(root: Path) -> set[str]:
    """Dotted names of all folders with an __init__.py that belong to the package."""
    found = set()
    for folder, package in {"molmo_edge": "molmo_edge", **TOP_LEVEL}.items():
        for init in (root / folder).rglob("__init__.py"):
            found.add(".".join((package, *init.parent.relative_to(root / folder).parts)))
    return found


def test_pyproject_lists_every_package() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = setup["tool"]["setuptools"]["packages"]
    assert set(listed) == packages_in(ROOT)
    assert len(listed) == len(set(listed))


def test_all_means_all() -> None:
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    named = set(everything.removeprefix("molmo-edge[").removesuffix("]").split(","))
    assert named == set(extras) - {"all", "docs", "test", "dev", "optimum"}  # optimum restricts the versions of others


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy without build/: setuptools would include its stale files in a wheel."""
    junk = shutil.ignore_patterns(
        ".git", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache", ".venv", ".hypothesis", "golden"
    )
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "molmo-edge", ignore=junk)


@pytest.fixture(scope="module")
def artefacts(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dist/ with an sdist, and the wheel that is built from that sdist."""
    pytest.importorskip("build")
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", str(dist), str(source))
    return dist


def run(*command: str, cwd: Path | None = None) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def fresh_python(directory: Path) -> Path:
    """A virtual environment with the packages of this one except molmo-edge."""
    run(sys.executable, "-m", "venv", "--without-pip", str(directory))
    python = directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    dependencies = directory / "dependencies"
    dependencies.mkdir()
    for entry in {e for name in ("purelib", "platlib") for e in Path(sysconfig.get_path(name)).iterdir()}:
        if "molmo_edge" not in entry.name and not (dependencies / entry.name).exists():
            (dependencies / entry.name).symlink_to(entry)
    site = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    (Path(site) / "dependencies.pth").write_text(f"{dependencies}\n")
    return python


def install(python: Path, *what: str) -> None:
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--force-reinstall", *what)


def script(python: Path) -> str:
    return run(str(python.parent / "molmo-edge"), "--version")


@pytest.mark.slow
def test_wheel_and_sdist_hold_what_they_must(artefacts: Path, source: Path) -> None:
    (wheel,) = artefacts.glob("*.whl")
    (sdist,) = artefacts.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in packages_in(source):
        assert f"{package.replace('.', '/')}/__init__.py" in names
    assert {"molmo_edge/py.typed", "molmo_edge/fonts/DejaVuSans-subset.ttf"} <= names
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"molmo_edge"}
    licenses = {name.partition("/licenses/")[2] for name in names}
    assert {"LICENSE", "NOTICE", "molmo_edge/fonts/LICENSE_DEJAVU"} <= licenses
    nano = source / "molmo_edge" / "nano"
    assert (nano / "molmo_edge.json").is_file()
    for file in nano.rglob("*"):
        if file.is_file():
            assert str(file.relative_to(source)).replace(os.sep, "/") in names
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
        about = archive.extractfile(
            next(name for name in archive.getnames() if name.count("/") == 1 and "PKG-INFO" in name)
        )
        assert about is not None
        metadata = email.message_from_string(about.read().decode())
    assert {"LICENSE", "pyproject.toml", "export/__init__.py", "runtimes/__init__.py", "tests/test_sdk.py"} <= packed
    assert {"docs/export.md", "benchmarks/RESULTS.md", "examples/coffee.jpg", "molmo_edge/nano/MODEL_CARD.md"} <= packed
    assert metadata["Author"]
    assert metadata.get_all("Project-URL")
    assert metadata["Description-Content-Type"].startswith("text/markdown")
    shown = metadata.get_payload()
    assert "molmo-edge point examples/taxis.jpg" in shown
    assert not re.search(r"\]\((?!https?:)", shown), "a link that leads nowhere on a package index"


@pytest.mark.slow
def test_installed_from_the_wheel(artefacts: Path, source: Path, tmp_path: Path) -> None:
    python = fresh_python(tmp_path / "venv")
    install(python, *map(str, artefacts.glob("*.whl")))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert Path(run(str(python), "-c", PROBE, cwd=empty)).is_relative_to(tmp_path / "venv")
    assert script(python).startswith("molmo-edge ")
    # Started in the checkout, Python finds the checkout's molmo_edge and its sibling folders first.
    assert Path(run(str(python), "-c", PROBE, cwd=source)).is_relative_to(source)


@pytest.mark.slow
def test_installed_from_the_sdist(artefacts: Path, tmp_path: Path) -> None:
    python = fresh_python(tmp_path / "venv")
    install(python, *map(str, artefacts.glob("*.tar.gz")))
    assert Path(run(str(python), "-c", PROBE, cwd=tmp_path)).is_relative_to(tmp_path / "venv")


@pytest.mark.slow
def test_installed_editable(source: Path, tmp_path: Path) -> None:
    python = fresh_python(tmp_path / "venv")
    install(python, "-e", str(source))
    for cwd in (tmp_path, source):
        assert Path(run(str(python), "-c", PROBE, cwd=cwd)).is_relative_to(source)
    assert script(python).startswith("molmo-edge ")


@pytest.mark.slow
def test_plain_install_of_the_folder(source: Path, tmp_path: Path) -> None:
    python = fresh_python(tmp_path / "venv")
    install(python, str(source))
    assert Path(run(str(python), "-c", PROBE, cwd=tmp_path)).is_relative_to(tmp_path / "venv")
    assert Path(run(str(python), "-c", PROBE, cwd=source)).is_relative_to(source)
