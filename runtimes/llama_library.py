"""llama-cpp-python, found or asked for by name: how to install it here, what it can run on, what it said last."""

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

OLDEST = (0, 3, 36)  # the first that this was tried with; its structs are not those of earlier ones
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_EXTRA = '"molmo-edge[gguf]"'

# By device: how llama.cpp's own device names begin, and what builds it so.
BACKENDS = {"cuda": ("CUDA", "GGML_CUDA"), "mps": ("MTL", "GGML_METAL"), "vulkan": ("Vulkan", "GGML_VULKAN")}
_lines: collections.deque[str] = collections.deque(maxlen=8)


@functools.cache
def load_library() -> Any:
    """The module `llama_cpp`, its log silenced. Raises Unavailable with the command that installs it here."""
    try:
        import llama_cpp
    except ModuleNotFoundError as error:
        if error.name != "llama_cpp":
            raise
        raise Unavailable(
            f"this bundle's decoder runs on llama.cpp, which is not installed: {install_command()}"
        ) from None
    except (ImportError, OSError, RuntimeError) as error:  # a library that it was linked with is not here
        raise Unavailable(
            f"llama-cpp-python is installed but does not load ({error}); build it on this machine: "
            f"{install_command(again=True)}"
        ) from None
    version = tuple(int(part) for part in llama_cpp.__version__.split(".")[:3] if part.isdigit())
    if version < OLDEST:
        raise Unavailable(
            f"llama-cpp-python {llama_cpp.__version__} is too old, {'.'.join(map(str, OLDEST))} is needed: "
            f"{install_command(again=True)}"
        )
    llama_cpp.llama_log_set(_keep(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def last_words() -> str:
    """What llama.cpp logged as errors since this was last asked, on one line."""
    lines = list(_lines)  # a copy in one step: llama.cpp's threads may be adding to it
    _lines.clear()
    return "; ".join(line for line in (" ".join(line.split()) for line in lines) if line)


@functools.cache
def _keep(llama_cpp: Any) -> Any:
    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, data: object) -> None:
        if level == _ERROR:
            _lines.append(text.decode("utf-8", errors="replace"))

    return keep


def install_command(device: str = "auto", *, again: bool = False) -> str:
    """The command that builds llama-cpp-python for this machine, and for `device` where one is named.

    `again`: it is there already, but not as it is needed.
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
    """What this Jetson calls itself; None on anything else."""
    try:
        name = Path("/proc/device-tree/model").read_bytes().rstrip(b"\0").decode("utf-8", errors="replace")
    except OSError:
        return None
    return name if "NVIDIA" in name else None


WITHOUT_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"


@functools.cache
def has_amx() -> bool:
    """Whether this build has llama.cpp's AMX kernels.

    They run on weights that are repacked, and end the process with an illegal instruction where GCC built them: its
    `_tile_loadconfig` tells the compiler that 8 of the 64 bytes of the tiles' configuration are read, so the stores to
    the others are dropped (seen with GCC 12.2 and llama.cpp of llama-cpp-python 0.3.36).
    """
    return b"AMX_INT8 = 1" in load_library().llama_print_system_info()


@functools.cache
def gpus() -> list[str]:
    """Names of the devices beside the CPU that this build can use and that are there: ["CUDA0"], ["MTL0"], []."""
    load_library()
    from llama_cpp._ctypes_extensions import load_shared_library
    from llama_cpp._ggml import libggml, libggml_base_path

    base = load_shared_library("ggml-base", libggml_base_path)  # on Windows each symbol has to be asked of its own
    count, get = libggml.ggml_backend_dev_count, libggml.ggml_backend_dev_get
    name, kind = base.ggml_backend_dev_name, base.ggml_backend_dev_type
    count.restype, get.restype, name.restype, kind.restype = (
        ctypes.c_size_t,
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_int,
    )
    get.argtypes, name.argtypes, kind.argtypes = [ctypes.c_size_t], [ctypes.c_void_p], [ctypes.c_void_p]
    devices = [get(i) for i in range(count())]
    return [name(device).decode() for device in devices if kind(device) in (1, 2)]  # a GPU, or one that shares memory


def on_gpu(device: str) -> bool:
    """Whether the decoder goes to a GPU for `device`. Raises Unavailable where one is insisted on that is not here."""
    wanted = {"tensorrt": "cuda", "coreml": "mps"}.get(device, device)
    if wanted == "cpu":
        return False
    found = gpus()
    if wanted == "auto":
        return bool(found)
    if not any(name.startswith(BACKENDS[wanted][0]) for name in found):
        here = f"it has {', '.join(found)}" if found else "it has the CPU alone"
        raise Unavailable(
            f'this llama.cpp cannot run on device="{device}", {here}: {install_command(wanted, again=True)}'
        )
    return True
