"""A missing optional package gives a one-line error that names its extra; the extras match pyproject.toml."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pickled import copy_pickled_molmoe

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
OPTIONAL = (
    "av",
    "bitsandbytes",
    "datasets",
    "fastapi",
    "gguf",
    "jinja2",
    "llama_cpp",
    "llguidance",
    "matplotlib",
    "mcp",
    "onnx",
    "optimum",
    "prometheus_client",
    "resvg_py",
    "safetensors",
    "scipy",
    "supervision",
    "tensorboard",
    "torch",
    "uvicorn",
)
BLOCKED = """
import sys
for package in {packages!r}:
    sys.modules[package] = None  # as if it were not installed
from molmo_edge.cli import main
main()
"""
PHOTO = GOLDEN / "coffee.png"
MODEL = ("--model", GOLDEN / "qwen")
OUT = ("--out", "run", "--device", "cpu")
TRAINING = ("--from", GOLDEN / "qwen", "--out", "run", "--device", "cpu", "--steps", 1)


def run(folder: Path, blocked: tuple[str, ...], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a separate process in `folder`."""
    return subprocess.run(
        [sys.executable, "-c", BLOCKED.format(packages=blocked), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        input="",
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """points/ with one annotated photo, pickled/ with a checkpoint as the hub has MolmoE's, and an empty data/."""
    folder = tmp_path_factory.mktemp("inputs")
    copy_pickled_molmoe(folder / "pickled")
    (folder / "data").mkdir()
    (folder / "points").mkdir()
    (folder / "points" / "coffee.png").write_bytes(PHOTO.read_bytes())
    (folder / "points" / "points.csv").write_text("image,label,x,y\ncoffee.png,cup,10,10\ncoffee.png,cup,20,30\n")
    return folder


COMMANDS: list[tuple[str, str, tuple[object, ...]]] = [
    # missing package, extra, command
    ("torch", "train", ("train", "points", "points", *TRAINING)),
    ("torch", "train", ("train", "caption", "--data", "data", *TRAINING)),
    ("torch", "train", ("train", "multitask", "--data", "data", *TRAINING)),
    ("torch", "train", ("distill", "--teacher", GOLDEN / "qwen", "--student", GOLDEN / "qwen", "--data", "data", *OUT)),
    ("torch", "train", ("train", "student", "--from", GOLDEN / "qwen", "--experts", 2, *OUT)),
    ("torch", "train", ("train", "start", "--decoder", GOLDEN, "--tower", GOLDEN, "--out", "started")),
    ("datasets", "eval", ("train", "fetch", "pixmo_cap", "--data", "data")),
    ("bitsandbytes", "quantize", ("train", "points", "points", *TRAINING, "--base", "nf4")),
    ("onnx", "export", ("export", GOLDEN / "qwen", "--out", "bundle")),
    ("onnx", "export", ("export", "nano", "--engine", "torch", "--out", "checkpoint")),
    ("gguf", "gguf", ("export", GOLDEN / "qwen", "--engine", "gguf", "--out", "bundle")),
    ("llama_cpp", "gguf", ("export", GOLDEN / "qwen", "--engine", "gguf", "--out", "bundle")),
    ("torch", "torch", ("export", "pickled", "--engine", "torch", "--out", "checkpoint")),
    ("torch", "torch", ("export", GOLDEN / "qwen", "--precision", "q4", "--calibrate", "points", "--out", "bundle")),
    *((package, "serve", ("serve", "--port", 0)) for package in ("fastapi", "prometheus_client", "uvicorn")),
    ("mcp", "mcp", ("mcp",)),
    ("onnx", "eval", ("loss", "nano", "nano")),
    ("matplotlib", "eval", ("loss", "nano", "nano", "--report", "report")),
    ("torch", "torch,export", ("loss", "nano", "nano", "--noise", "bf16", "--limit", 1)),
    ("jinja2", "eval", ("loss", "nano", "nano", "--report", "report")),
    ("scipy", "eval", ("loss", "nano", "nano")),
    ("scipy", "eval", ("eval", "--limit", 1, "--out", "answers")),
    ("scipy", "eval", ("ablate", "nano")),
    ("onnx", "eval", ("ablate", "nano")),
    ("onnx", "eval", ("quantize", "nano", "--out", "small", "--max-mb", 5)),
    ("datasets", "eval", ("eval", "--tasks", "chart_qa", "--data", "data", "--out", "answers")),
    ("torch", "torch", ("eval", GOLDEN / "qwen", "--limit", 1, "--out", "answers")),
    ("torch", "torch", ("ask", PHOTO, "What?", *MODEL)),
    ("torch", "torch", ("point", PHOTO, "cup", *MODEL)),
    ("torch", "torch", ("count", PHOTO, "cups", *MODEL)),
    ("torch", "torch", ("caption", PHOTO, *MODEL)),
    ("torch", "torch", ("chat", PHOTO, *MODEL)),
    ("torch", "torch", ("bench", PHOTO, *MODEL)),
    ("torch", "torch", ("bench", PHOTO, "--checkpoint", GOLDEN / "qwen", "--repeat", 1, "--max-new-tokens", 2)),
]


def title(value: object) -> str:
    return "-".join(str(part) for part in value if "/" not in str(part)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(("missing", "extra", "command"), COMMANDS, ids=title)
def test_a_missing_package_is_one_line_that_names_its_extra(
    folder: Path, missing: str, extra: str, command: tuple[object, ...]
) -> None:
    done = run(folder, (missing,), *command)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("molmo-edge: ")]
    assert f'pip install "molmo-edge[{extra}]"' in line
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith(f"{line}\n")


@pytest.mark.parametrize("command", [("ask", PHOTO, "What?", "--max-new-tokens", 2), ("doctor",), ("verify",)])
def test_the_core_needs_no_extra(folder: Path, command: tuple[object, ...]) -> None:
    # llama-cpp-python, which needs Jinja, may be installed here: doctor would call one that does not load a problem.
    blocked = tuple(package for package in OPTIONAL if package not in ("llama_cpp", "jinja2"))
    assert run(folder, blocked, *command).returncode == 0


def test_help_needs_no_extra(folder: Path) -> None:
    for command in (("train", "points"), ("train", "caption"), ("export",), ("loss",)):
        assert run(folder, OPTIONAL, *command, "--help").returncode == 0


def test_a_missing_module_of_no_extra_is_a_bug() -> None:
    from molmo_edge.system.extras import with_extra

    def broken() -> None:
        raise ModuleNotFoundError("No module named 'molmo_edge.nonsense'", name="molmo_edge.nonsense")

    with pytest.raises(ModuleNotFoundError):
        with_extra(broken, "ask")()


def test_each_package_is_in_the_extras_that_errors_name() -> None:
    from molmo_edge.system.extras import EXTRAS_OF, extras

    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        f'{line}; extra == "{extra}"' for extra, lines in project["optional-dependencies"].items() for line in lines
    ]
    known = extras(lines)
    assert set(known) == set(project["optional-dependencies"])
    distributions = {
        "llama_cpp": "llama-cpp-python",
        "optimum": "optimum-onnx",
        "prometheus_client": "prometheus-client",
        "resvg_py": "resvg-py",
    }
    assert set(EXTRAS_OF) == set(OPTIONAL)
    for module, named in EXTRAS_OF.items():
        for extra in named:
            assert distributions.get(module, module) in {requirement.name for requirement in known[extra]}
    assert {str(requirement) for requirement in known["quantize"]} == {"onnx>=1.16", "torch>=2.7", "bitsandbytes>=0.46"}
    assert {requirement.name for requirement in known["dev"]} >= {"ruff", "pytest", "torch"}  # by way of `test`


def test_doctor_lists_every_extra(folder: Path) -> None:
    declared = importlib.metadata.metadata("molmo-edge").get_all("Provides-Extra")
    facts = json.loads(run(folder, (), "doctor", "--json").stdout)
    assert list(facts["extras"]) == list(facts["extra_packages"]) == declared
    shown = run(folder, (), "doctor").stdout
    for extra, packages in facts["extra_packages"].items():
        (line,) = [line for line in shown.splitlines() if line.startswith(f"extra {extra} ")]
        assert facts["extras"][extra] == (not packages["missing"])
        if packages["missing"]:
            assert f'pip install "molmo-edge[{extra}]"' in packages["install"]
            assert packages["install"] in line
            assert all(missing in line for missing in packages["missing"])
        else:
            assert packages["install"] is None
            assert "pip install" not in line
        assert all(f"{name} {version}" in line for name, version in packages["installed"].items())


def test_too_old_is_missing_and_the_extra_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from molmo_edge.cli.doctor import extra_line, extra_packages
    from molmo_edge.system.extras import extras

    installed = {"torch": "2.6.1+cpu", "onnx": "1.16.0", "optimum-onnx": "0.2.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr("importlib.metadata.version", version)
    found = extras(
        [
            "numpy>=1.24",
            'torch>=2.7; extra == "torch"',
            "onnx>=1.16; extra == 'export'",
            'molmo-edge[export,torch]; extra == "more"',
            'optimum-onnx[onnxruntime]<0.2,>=0.1; python_version >= "3.10" and extra == "more"',
        ]
    )
    assert extra_packages("export", found["export"]) == {
        "installed": {"onnx": "1.16.0"},
        "missing": [],
        "install": None,
    }
    assert extra_packages("more", found["more"])["missing"] == ["torch>=2.7", "optimum-onnx>=0.1,<0.2"]
    assert "torch>=2.7 (2.6.1+cpu is installed)" in extra_line("more", found["more"])
    assert extra_line("export", found["export"]) == "onnx 1.16.0"
