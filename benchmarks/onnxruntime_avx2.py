"""Copy the installed onnxruntime so that it uses AVX2 at most, to measure on a server what a laptop would do.

    python benchmarks/onnxruntime_avx2.py /tmp/avx2
    PYTHONPATH=/tmp/avx2 MOLMO_EDGE_KERNEL=avx2 python benchmarks/kernels.py bundle BUNDLE

ONNX Runtime asks the processor (xgetbv) which registers the system saves, and uses AVX-512 if its registers are among
them. In the copy this instruction is replaced by two that answer: those of AVX alone. Only for benchmarks on Linux and
x86-64: bytes that look like the instruction are replaced everywhere, and the two use the stack below its end.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
from pathlib import Path

_XGETBV = bytes.fromhex("0f01d0")
_AVX = bytes.fromhex("6a0758")  # push 7; pop rax: the registers of x87, SSE and AVX


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a directory for PYTHONPATH")
    args = parser.parse_args()
    found = importlib.util.find_spec("onnxruntime")
    if found is None or found.origin is None:
        raise SystemExit("onnxruntime is not installed")
    copy = args.out / "onnxruntime"
    shutil.copytree(Path(found.origin).parent, copy)
    libraries = [path for path in copy.rglob("*.so*") if path.is_file() and _XGETBV in path.read_bytes()]
    if not libraries:
        raise SystemExit(f"no library in {copy} asks for the registers: is this Linux on x86-64?")
    for path in libraries:
        code = path.read_bytes()
        path.write_bytes(code.replace(_XGETBV, _AVX))
        print(f"{path}: {code.count(_XGETBV)} places")


if __name__ == "__main__":
    main()
