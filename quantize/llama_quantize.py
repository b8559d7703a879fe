"""Quantise a GGUF with llama.cpp's own quantiser: its K-quants, their mixtures, and its importance matrices."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge.quantize import QuantizeError
from molmo_edge.runtimes.llama_library import load_library, take_errors
from molmo_edge.system.cores import physical_cores

_BUFFER = 512_000_000  # bytes of a tensor's rows that llama.cpp holds while it rounds them
_CHILD = "from molmo_edge.quantize.llama_quantize import main; main()"


def quantize_gguf(source: Path, out: Path, file_type: str, importance: Mapping[str, np.ndarray] | None = None) -> None:
    """Write the GGUF `source` (f32, f16 or bf16) to `out` as `file_type`, such as "q4_k_m" (gguf.LlamaFileType).

    `importance`: for each tensor the weight of an error in each input column, float32 [in], of experts [n, in] (see
    molmo_edge.quantize.importance). llama.cpp leaves vectors and the router as they are, and falls back to another
    type where a row is not a multiple of the type's blocks of 256.

    Runs in a child process, since llama.cpp takes minutes and cannot be interrupted. Raises QuantizeError if it fails.
    """
    load_library()  # raises here, not in the child process, if it is missing
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        importance_file = Path(scratch) / "importance.npz"
        if importance:
            np.savez(importance_file, **importance)  # type: ignore[arg-type]
        arguments = [str(source), str(out), file_type, str(importance_file) if importance else ""]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", _CHILD, *arguments]
        run = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if run.returncode:
        lines = run.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"it exited with status {run.returncode}"
        raise QuantizeError(f"llama.cpp cannot make {file_type} of this decoder: {reason}")


def main() -> None:
    """The child process. Arguments: source, out, file type, and the file of importances or an empty string."""
    from gguf import LlamaFileType

    source, out, file_type, importance_file = sys.argv[1:]
    importance: Mapping[str, np.ndarray] = np.load(importance_file) if importance_file else {}
    llama_cpp = load_library()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = LlamaFileType[f"MOSTLY_{file_type.upper()}"].value
    params.nthread, params.max_buf_size = physical_cores(), _BUFFER
    keep_alive: list[Any] = []  # llama.cpp holds pointers into these arrays
    if importance:
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()  # an empty entry ends the list
        for entry, (name, values) in zip(entries, importance.items(), strict=False):
            flat = np.ascontiguousarray(values, np.float32).reshape(-1)
            entry.name, entry.size = name.encode(), flat.size
            entry.data = flat.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            keep_alive.append(flat)
        params.imatrix = entries
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), params):
        sys.exit(take_errors() or "it gives no reason")
