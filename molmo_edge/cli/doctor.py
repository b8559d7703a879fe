"""`molmo-edge doctor`"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from molmo_edge.cli import options
from molmo_edge.cli.output import note, print_json
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.system import machine
from molmo_edge.system.cores import available_cores
from molmo_edge.system.energy import EnergyMeter
from molmo_edge.system.extras import Requirement, extras, pip_command
from molmo_edge.system.memory import meminfo
from molmo_edge.system.privacy import reports
from molmo_edge.system.version import __version__

_CORE = ("numpy", "pillow", "tokenizers", "onnxruntime", "huggingface_hub", "typer", "rich")


def doctor(*, json: options.Json = False) -> None:
    """Show what is installed on this machine, and what is missing."""
    problems: list[str] = []
    found = extras()
    facts: dict[str, object] = {
        "molmo_edge": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": available_cores(),
        **_memory(),
        "board": machine.board(),
        "jetson": machine.jetson_release(),
        "cuda": machine.cuda_version(),
        "swap": machine.swap(),
        "cma": machine.cma(),
        "power_mode": machine.power_mode(),
        "throttled": machine.throttling(),
        "temperatures": [str(zone) for zone in machine.thermal_zones()],
        "energy": EnergyMeter().source,
        "disk": _disk(),
        "versions": {name: _version(name) for name in _CORE},
        "onnxruntime_providers": _providers(problems),
        "kernels": _kernels(problems),
        "llama_cpp_devices": _llama(problems),
        "llama_cpp_build": _llama_build(),
        "bitsandbytes_kernels": _bitsandbytes(),
        "extras": {extra: all(r.satisfied for r in parts) for extra, parts in found.items()},
        "extra_packages": {extra: extra_packages(extra, parts) for extra, parts in found.items()},
        "model": _model(problems),
        "cache": _cache(problems),
        "removed": _stale(),
        "usage_reports": reports(),
        "network": _network(),
        "next": _next(found),
        "problems": problems,
    }
    if json:
        print_json(facts)
    else:
        for name, value in facts.items():
            if name == "extra_packages":
                for extra, parts in found.items():
                    print(f"{f'extra {extra}':22} {extra_line(extra, parts)}")
            elif name not in ("extras", "problems") and value not in (None, []):
                print(f"{name.replace('_', ' '):22} {_line(value)}")
    for problem in problems:
        note(f"problem: {problem}")
    if problems:
        raise typer.Exit(1)


def extra_packages(extra: str, parts: Sequence[Requirement]) -> dict[str, Any]:
    """The packages of an extra: installed versions, missing or outdated ones, and the command that installs them."""
    missing = [str(r) for r in parts if not r.satisfied]
    return {
        "installed": {r.name: version for r in parts if (version := r.installed) is not None},
        "missing": missing,
        "install": _install(extra) if missing else None,
    }


def _install(extra: str) -> str:
    from molmo_edge.runtimes.llama_library import install_command

    return install_command() if extra == "gguf" else pip_command(extra)  # llama.cpp must be compiled for the machine


def extra_line(extra: str, parts: Sequence[Requirement]) -> str:
    """ "gguf 0.17.1; missing llama-cpp-python>=0.3.36: pip install ..." """
    here = ", ".join(f"{r.name} {r.installed}" for r in parts if r.satisfied)
    missing = []
    for r in parts:
        if not r.satisfied:
            missing.append(f"{r} ({version} is installed)" if (version := r.installed) else str(r))
    return "; ".join(filter(None, [here, f"missing {', '.join(missing)}: {_install(extra)}" if missing else ""]))


def _line(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {'yes' if v is True else v or 'no'}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> dict[str, str | None]:
    """Total and free memory and swap, on systems with /proc."""
    known = meminfo()
    if not known:
        return {"memory": None}
    gib = {name: known.get(name, 0) / 2**30 for name in ("MemTotal", "MemAvailable", "SwapTotal")}
    return {"memory": f"{gib['MemTotal']:.1f} GiB, {gib['MemAvailable']:.1f} GiB free, {gib['SwapTotal']:.1f} GiB swap"}


def _providers(problems: list[str]) -> list[str]:
    try:
        import onnxruntime

        return list(onnxruntime.get_available_providers())
    except ImportError as error:  # a wheel for another Python, or a missing system library
        problems.append(f"onnxruntime cannot be imported ({error}): pip install --force-reinstall onnxruntime")
        return []


def _kernels(problems: list[str]) -> dict[str, str] | None:
    """The compiled kernels and whether they are used; None if they are not installed."""
    from molmo_edge.runtimes import kernels

    try:
        found = kernels.installed()
    except OSError as error:
        problems.append(f"molmo-edge-kernels does not load ({error}): pip install --force-reinstall ./kernels")
        return None
    if found is None:
        return None
    used = "yes" if found.reason is None else f"no: {found.reason}"
    return {"version": found.version, "kernel": found.kernel, "used": used}


def _llama(problems: list[str]) -> list[str] | None:
    """The devices that llama.cpp supports and finds; None if it is not installed. Only GGUF bundles need it."""
    if _version("llama-cpp-python") is None:
        return None
    from molmo_edge.runtimes.llama_library import gpus

    try:
        return [*gpus(), "CPU"]
    except MolmoEdgeError as error:
        problems.append(str(error))
        return []


def _llama_build() -> list[str] | None:
    """The features that llama.cpp was built with ("AVX2", "CUDA"); None if it is not installed or does not load."""
    if _version("llama-cpp-python") is None:
        return None
    from molmo_edge.runtimes.llama_library import build_flags

    try:
        return build_flags()
    except MolmoEdgeError:  # `_llama` reports it
        return None


def _bitsandbytes() -> list[str] | None:
    """The native libraries of bitsandbytes ("cpu", "cuda126"); None if it is not installed. Does not import it."""
    try:
        files = importlib.metadata.files("bitsandbytes") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    stems = [Path(str(file)).stem for file in files if Path(str(file)).stem.startswith("libbitsandbytes_")]
    return sorted({stem.removeprefix("libbitsandbytes_") for stem in stems})


def _disk() -> str:
    """The free space where models are downloaded to."""
    import shutil

    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    there = next(path for path in (cache, *cache.parents) if path.exists())
    return f"{shutil.disk_usage(there).free / 1e9:.1f} GB free for models in {cache}"


def _network() -> dict[str, str]:
    """Which hosts molmo-edge would connect to; docs/privacy.md says when."""
    from huggingface_hub import constants

    offline = "never (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else constants.ENDPOINT
    return {"downloads from": offline, "token": "set" if os.environ.get("HF_TOKEN") else "none in HF_TOKEN"}


def _next(found: dict[str, tuple[Requirement, ...]]) -> list[str]:
    """The commands that install what this machine would profit from most."""
    advice = []
    if found.get("gguf") and not all(r.satisfied for r in found["gguf"]):
        advice.append(f"to run GGUF models with llama.cpp: {_install('gguf')}")
    if found.get("export") and not all(r.satisfied for r in found["export"]):
        advice.append(f"to convert checkpoints to bundles: {_install('export')}")
    known = meminfo()
    if known and known.get("MemTotal", 0) < 9 * 2**30 and not known.get("SwapTotal"):
        advice.append("to export large models on this machine: add swap space")
    return advice


def _model(problems: list[str]) -> str | None:
    from molmo_edge.checkpoints.bundle import default_bundle, open_bundle

    try:
        bundle = open_bundle(default_bundle())
    except MolmoEdgeError as error:
        problems.append(str(error))
        return None
    size = sum(component.bytes for component in bundle.components.values())
    return f"{bundle.name}, {size / 1e6:.0f} MB, {bundle.directory}"


def _stale() -> list[str] | None:
    """Remove the temporary folders of killed exports and comparisons, here and wherever they are recorded."""
    import tempfile

    from molmo_edge.system.scratch import remove_stale

    removed = remove_stale([Path.cwd(), Path(tempfile.gettempdir())])
    return [f"{stale.folder} ({stale.bytes / 1e6:.1f} MB, from a killed process)" for stale in removed] or None


def _cache(problems: list[str]) -> str:
    from molmo_edge.system.cache import cache_directory

    directory = cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problems.append(
            f"the cache {directory} cannot be created ({error.strerror}), so every start computes all hashes again"
        )
    else:
        if not os.access(directory, os.W_OK):
            problems.append(f"the cache {directory} is not writable, so every start computes all hashes again")
    return str(directory)
