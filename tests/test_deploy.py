"""The files in deploy/ name files, extras and options that exist. No Docker daemon is needed, and nothing is built."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

import molmo_edge.cli

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"

pytestmark = pytest.mark.skipif(not DEPLOY.exists(), reason="needs the source tree")


def options_of(command: str) -> set[str]:
    group = typer.main.get_command(molmo_edge.cli.app)
    assert hasattr(group, "commands")
    return {option for parameter in group.commands[command].params for option in parameter.opts}


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.jetson"])
def test_dockerfiles_copy_all_that_the_package_is_built_from(name: str) -> None:
    text = (DEPLOY / name).read_text(encoding="utf-8")
    copied = {word for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE) for word in line.split()[:-1]}
    for path in copied:
        assert (ROOT / path).exists(), path
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"} <= copied  # of the build
    assert {"molmo_edge", "export", "quantize", "runtimes"} <= copied  # the package-dir of pyproject.toml


@pytest.mark.parametrize("file", sorted(DEPLOY.iterdir()), ids=lambda file: file.name)
def test_extras_and_options_exist(file: Path) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    text = file.read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = re.findall(r'"\.\[([a-z,]+)\]"', text) + re.findall(r"EXTRAS=([a-z,]+)", text)
    assert named
    assert {extra for names in named for extra in names.split(",")} <= set(extras)
    serve = options_of("serve")
    used = {
        option for rest in re.findall(r'(?:serve"?,? |OPTIONS=)(.+)', text) for option in re.findall(r"--[a-z-]+", rest)
    }
    assert "--host" in used
    assert used <= serve, used - serve


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd")
    unit = tmp_path / "molmo-edge.service"
    text = (DEPLOY / "molmo-edge.service").read_text(encoding="utf-8")
    unit.write_text(text.replace("/opt/molmo-edge/bin/molmo-edge", "/bin/true"))  # the program must exist
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "molmo-edge.service" not in done.stderr  # a warning about a line of the unit
