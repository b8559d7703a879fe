"""llama-cpp-python: loading it, its errors, its devices, and the command that installs it on this machine."""

from __future__ import annotations

import collections
import ctypes
import functools
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from molmo_edge.errors import Unavailable

OLDEST = (0, 3, 36)  # the oldest tested version; earlier ones have other structs
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_EXTRA = '"molmo-edge[gguf]"'

# By device: the prefix of llama.cpp's device names, and the build flag.
BACKENDS = {"cuda": ("CUDA", "GGML_CUDA"), "mps": ("MTL", "GGML_METAL"), "vulkan": ("Vulkan", "GGML_VULKAN")}
_lines: collections.deque[str] = collections.deque(maxlen=8)


@functools.cache
def load_library() -> Any:
    """Return the module `llama_cpp`, with its log silenced. Raises Unavailable with the command that installs it."""
    try:
        import llama_cpp
    except ModuleNotFoundError as error:
        if error.name != "llama_cpp":
            raise
        raise Unavailable(
            f"this bundle's decoder runs on llama.cpp, which is not installed: {install_command()}"
        ) from None
    except (ImportError, OSError, RuntimeError) as error:  # a library that it links to is missing
        raise Unavailable(
            f"llama-cpp-python is installed but does not load ({error}); build it on this machine: "
            f"{install_command(again=True)}"
        ) from None
    version = tuple(int(part) for part in llama_cpp.__version__.split(".")[:3] if part.isdigit())
    if version < OLDEST:
        raise Unavailable(
            f"llama-cpp-python {llama_cpp.__version__} is too old ({'.'.join(map(str, OLDEST))} or later is needed): "
            f"{install_command(again=True)}"
        )
    llama_cpp.llama_log_set(_keep(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def take_errors() -> str:
    """Return, on one line, the errors that llama.cpp logged since the last call."""
    lines = list(_lines)  # an atomic copy: llama.cpp's threads may be appending
    _lines.clear()
    return "; ".join(line for line in (" ".join(line.split()) for line in lines) if line)


@functools.cache
def _keep(llama_cpp: Any) -> Any:
    def keep(level: int, text: bytes, _data: object) -> None:
        if level == _ERROR:
            _lines.append(text.decode("utf-8", errors="replace"))

    return llama_cpp.llama_log_callback(keep)


def install_command(device: str = "auto", *, again: bool = False) -> str:
    """Return the command that builds llama-cpp-python for this machine, with `device` if one is named.

    `again`: reinstall an unsuitable build.
    """
    flags = f"-D{BACKENDS[device][1]}=on" if device in BACKENDS else _likely_flags()
    pip = "pip install " + ("--force-reinstall --no-cache-dir --no-deps llama-cpp-python" if again else _EXTRA)
    if not flags:
        return pip
    return f"$env:CMAKE_ARGS='{flags}'; {pip}" if sys.platform == "win32" else f"CMAKE_ARGS='{flags}' {pip}"


def _likely_flags() -> str:
    if sys.platform == "darwin":
        return "-DGGML_METAL=on" if platform.machine() == "arm64" else ""
    if jetson() or shutil.which("nvidia-smi"):
        return "-DGGML_CUDA=on"
    return "-DGGML_VULKAN=on" if shutil.which("vulkaninfo") else ""


def jetson() -> str | None:
    """Return the model name of this Jetson; None on other machines."""
    try:
        name = Path("/proc/device-tree/model").read_bytes().rstrip(b"\0").decode("utf-8", errors="replace")
    except OSError:
        return None
    return name if "NVIDIA" in name else None


WITHOUT_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"


@functools.cache
def has_amx() -> bool:
    """Return whether this build has llama.cpp's AMX kernels.

    They run on repacked weights and, if built by GCC, crash with an illegal instruction: GCC's `_tile_loadconfig`
    declares that it reads 8 of the 64 bytes of the tile configuration, so the compiler drops the stores to the others
    (seen with GCC 12.2 and the llama.cpp of llama-cpp-python 0.3.36).
    """
    return b"AMX_INT8 = 1" in load_library().llama_print_system_info()


def build_flags() -> list[str]:
    """Return the features that this build has switched on ("AVX2", "CUDA : ARCHS = 870"). Raises Unavailable."""
    text = load_library().llama_print_system_info().decode("utf-8", errors="replace")
    entries = [" ".join(entry.split()) for entry in text.split("|")]
    return [entry.removesuffix(" = 1") for entry in entries if entry and not entry.endswith("= 0")]


@functools.cache
def gpus() -> list[str]:
    """Return the names of the GPUs that this build can use: ["CUDA0"], ["MTL0"], []."""
    load_library()
    from llama_cpp._ctypes_extensions import load_shared_library
    from llama_cpp._ggml import libggml, libggml_base_path

    base = load_shared_library("ggml-base", libggml_base_path)  # on Windows a symbol is found only in its own library
    count, get = libggml.ggml_backend_dev_count, libggml.ggml_backend_dev_get
    name, device_type = base.ggml_backend_dev_name, base.ggml_backend_dev_type
    count.restype, get.restype, name.restype, device_type.restype = (
        ctypes.c_size_t,
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_int,
    )
    get.argtypes, name.argtypes, device_type.argtypes = [ctypes.c_size_t], [ctypes.c_void_p], [ctypes.c_void_p]
    devices = [get(i) for i in range(count())]
    return [name(device).decode() for device in devices if device_type(device) in (1, 2)]  # GPU, integrated GPU


def on_gpu(device: str) -> bool:
    """Return whether the decoder runs on a GPU for `device`. Raises Unavailable if `device` names a missing GPU."""
    wanted = {"tensorrt": "cuda", "coreml": "mps"}.get(device, device)
    if wanted == "cpu":
        return False
    found = gpus()
    if wanted == "auto":
        return bool(found)
    if not any(name.startswith(BACKENDS[wanted][0]) for name in found):
        here = f"it has {', '.join(found)}" if found else "it has only the CPU"
        raise Unavailable(
            f'this build of llama.cpp cannot run on device="{device}", {here}: {install_command(wanted, again=True)}'
        )
    return True
