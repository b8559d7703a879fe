"""Read computed tensors of llama.cpp while it runs, through its evaluation callback.

llama.cpp's own outputs are logits and the states after the final norm. Its scheduler shows a callback each tensor of
the graph: once to ask whether to stop there, and, if so, once more when the tensor is computed.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from molmo_edge.runtimes.llama_library import load_library


def tensor_reader() -> Callable[[int, bool], tuple[str, np.ndarray]]:
    """A function (address of a ggml_tensor, whether to read values) -> (name, float32 values in memory order)."""
    name, size, get = _functions()

    def read(tensor: int, wanted: bool) -> tuple[str, np.ndarray]:
        values = np.empty(size(tensor) // 4 if wanted else 0, np.float32)
        if wanted:
            get(tensor, values.ctypes.data, 0, values.nbytes)
        return name(tensor).decode(), values

    return read


@functools.cache
def _functions() -> tuple[Any, Any, Any]:
    """ggml's functions for a tensor's name, its size in bytes, and a copy of its values."""
    from llama_cpp._ctypes_extensions import load_shared_library
    from llama_cpp._ggml import libggml_base_path

    base = load_shared_library("ggml-base", libggml_base_path)  # Windows needs the library that exports a symbol
    name, size, get = base.ggml_get_name, base.ggml_nbytes, base.ggml_backend_tensor_get
    name.argtypes, name.restype = [ctypes.c_void_p], ctypes.c_char_p
    size.argtypes, size.restype = [ctypes.c_void_p], ctypes.c_size_t
    get.argtypes, get.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t], None
    return name, size, get


class StateReader:
    """Collects the output of one layer during the runs of a context."""

    def __init__(self, layer: int, width: int) -> None:
        """`layer`: counted from 0, and not the last one, which llama.cpp computes for some positions only."""
        self._width = width
        self._parts: list[np.ndarray] = []
        name, size, get = _functions()
        wanted, parts = f"l_out-{layer}".encode(), self._parts  # as build_cvec's result is named in llama.cpp's graphs

        def watch(tensor: int, ask: bool, _data: object) -> bool:
            if ask:
                found: bool = name(tensor) == wanted
                return found
            values = np.empty(size(tensor) // 4, np.float32)
            get(tensor, values.ctypes.data, 0, values.nbytes)
            parts.append(values)
            return True  # otherwise llama.cpp would skip the rest of the graph without an error

        self.callback = load_library().ggml_backend_sched_eval_callback(watch)

    def take(self) -> np.ndarray:
        """The states of the positions that have run since the last call, float32 [n, width]."""
        states = np.concatenate([np.empty(0, np.float32), *self._parts]).reshape(-1, self._width)
        self._parts.clear()
        return states
