"""A missing, broken or outdated llama-cpp-python gives an error with the install command for the machine."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from molmo_edge.runtimes import EngineError, Unavailable, llama, llama_library
from molmo_edge.runtimes.llama_library import install_command, load_library
from molmo_edge.runtimes.llama_options import LlamaOptions


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    load_library.cache_clear()
    with monkeypatch.context() as patch:
        yield patch
    load_library.cache_clear()


def machine(patch: pytest.MonkeyPatch, system: str, processor: str, *programs: str, jetson: bool = False) -> None:
    patch.setattr(sys, "platform", system)
    patch.setattr(llama_library.platform, "machine", lambda: processor)
    patch.setattr(llama_library, "jetson", lambda: "NVIDIA Jetson Orin Nano" if jetson else None)
    patch.setattr(llama_library.shutil, "which", lambda name: f"/usr/bin/{name}" if name in programs else None)


@pytest.mark.parametrize(
    ("system", "processor", "programs", "jetson", "command"),
    [
        ("linux", "x86_64", (), False, 'pip install "molmo-edge[gguf]"'),
        ("linux", "aarch64", (), True, "CMAKE_ARGS='-DGGML_CUDA=on' pip install \"molmo-edge[gguf]\""),
        ("linux", "x86_64", ("nvidia-smi",), False, "CMAKE_ARGS='-DGGML_CUDA=on' pip install \"molmo-edge[gguf]\""),
        ("linux", "x86_64", ("vulkaninfo",), False, "CMAKE_ARGS='-DGGML_VULKAN=on' pip install \"molmo-edge[gguf]\""),
        ("darwin", "arm64", (), False, "CMAKE_ARGS='-DGGML_METAL=on' pip install \"molmo-edge[gguf]\""),
        ("darwin", "x86_64", (), False, 'pip install "molmo-edge[gguf]"'),
        (
            "win32",
            "AMD64",
            ("nvidia-smi",),
            False,
            "$env:CMAKE_ARGS='-DGGML_CUDA=on'; pip install \"molmo-edge[gguf]\"",
        ),
    ],
)
def test_the_command_is_the_machine_s(
    system: str,
    processor: str,
    programs: tuple[str, ...],
    jetson: bool,
    command: str,
    unloaded: pytest.MonkeyPatch,
) -> None:
    machine(unloaded, system, processor, *programs, jetson=jetson)
    assert install_command() == command
    unloaded.setitem(sys.modules, "llama_cpp", None)  # importing it raises ModuleNotFoundError
    with pytest.raises(Unavailable) as error:
        load_library()
    assert "not installed" in str(error.value)
    assert str(error.value).endswith(command)


def test_a_device_has_its_own_command(unloaded: pytest.MonkeyPatch) -> None:
    machine(unloaded, "linux", "x86_64")
    assert "-DGGML_VULKAN=on" in install_command("vulkan")
    assert "--force-reinstall --no-cache-dir" in install_command("cuda", again=True)


def test_a_build_that_does_not_load_and_one_that_is_too_old(unloaded: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "llama_cpp":
                raise RuntimeError("libcuda.so.1: cannot open shared object file")

    unloaded.delitem(sys.modules, "llama_cpp", raising=False)
    with unloaded.context() as patch:
        patch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
        with pytest.raises(Unavailable, match=r"does not load \(libcuda.*build it on this machine"):
            load_library()
    old = types.ModuleType("llama_cpp")
    old.__version__ = "0.2.90"  # type: ignore[attr-defined]
    unloaded.setitem(sys.modules, "llama_cpp", old)
    with pytest.raises(Unavailable, match=r"0\.2\.90 is too old \(0\.3\.36 or later is needed\)"):
        load_library()


@pytest.mark.parametrize("amx", [True, False])
def test_weights_are_not_repacked_for_amx(monkeypatch: pytest.MonkeyPatch, amx: bool) -> None:
    """With AMX kernels repacking crashes the process: it is off by default and refused on request."""
    monkeypatch.setattr(llama, "has_amx", lambda: amx)
    monkeypatch.setattr(llama, "available_memory", lambda: 1 << 40)
    monkeypatch.setattr(llama.platform, "machine", lambda: "x86_64")
    bundle: Any = types.SimpleNamespace(components={"decoder": types.SimpleNamespace(precision="q4_0", bytes=1000)})
    assert llama.choose_repack(bundle, LlamaOptions(), gpu=False) is not amx
    assert llama.choose_repack(bundle, LlamaOptions(repack=False), gpu=False) is False
    if amx:
        with pytest.raises(EngineError, match="repack=no, or build it without them"):
            llama.choose_repack(bundle, LlamaOptions(repack=True), gpu=False)
    else:
        assert llama.choose_repack(bundle, LlamaOptions(repack=True), gpu=False)
