"""Fewer bits for a GGUF, by llama.cpp itself: its K-quants, its mixes of them, its importance weights."""

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
from molmo_edge.runtimes.llama_library import last_words, load_library
from molmo_edge.system.cores import physical_cores

FLOATS = ("f32", "f16", "bf16")
# By llama.cpp's own numbers (llama_ftype). The two-bit types are not among them: they need an importance matrix, and
# nothing here measured what they make of a Molmo.
_FTYPES = {
    "q8_0": 7, "q6_k": 18, "q5_k_m": 17, "q5_k_s": 16, "q5_1": 9, "q5_0": 8, "q4_k_m": 15, "q4_k_s": 14, "q4_1": 3,
    "q4_0": 2, "iq4_nl": 25, "iq4_xs": 30, "q3_k_l": 13, "q3_k_m": 12, "q3_k_s": 11,
}  # fmt: skip
GGUF_WORDS = (*FLOATS, *_FTYPES)
WEIGHED = tuple(word for word in _FTYPES if word != "q8_0")  # rounded with an importance matrix, where there is one
_AT_ONCE = 512_000_000  # bytes of a tensor's rows that llama.cpp holds while it rounds them
_CHILD = "from molmo_edge.quantize.llama_quantize import _main; _main()"


def quantize_gguf(source: Path, out: Path, kind: str, importance: Mapping[str, np.ndarray] | None = None) -> None:
    """Round the GGUF `source` (f32, f16 or bf16) to `kind`, one of GGUF_WORDS that is no float, and write `out`.

    `importance`: by tensor, how much an error in each input column counts, float32 [in], of experts [n, in] (see
    molmo_edge.quantize.importance). llama.cpp keeps vectors and the router, and takes another type where a row does
    not fill that type's blocks of 256.

    In a process of its own: llama.cpp takes minutes, in which nothing else could interrupt it. Raises QuantizeError
    where it fails.
    """
    load_library()  # says what is missing
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        weights = Path(scratch) / "importance.npz"
        if importance:
            np.savez(weights, **importance)  # type: ignore[arg-type]
        command = [sys.executable, "-c", _CHILD, str(source), str(out), kind, str(weights) if importance else ""]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        run = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if run.returncode:
        said = run.stderr.strip().splitlines()
        why = said[-1] if said else f"it ended with status {run.returncode}"
        raise QuantizeError(f"llama.cpp cannot make {kind} of this decoder: {why}")


def _main() -> None:
    """In the process of its own: source, out, kind, and the importances or nothing."""
    source, out, kind, weights = sys.argv[1:]
    importance: Mapping[str, np.ndarray] = np.load(weights) if weights else {}
    llama_cpp = load_library()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.max_buf_size = _FTYPES[kind], physical_cores(), _AT_ONCE
    held: list[Any] = []  # what the C side points into
    if importance:
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()  # the last, empty, ends the list
        for entry, (name, values) in zip(entries, importance.items(), strict=False):
            flat = np.ascontiguousarray(values, np.float32).reshape(-1)
            entry.name, entry.size = name.encode(), flat.size
            entry.data = flat.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            held.append(flat)
        params.imatrix = entries
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), params):
        sys.exit(last_words() or "it does not say why")
