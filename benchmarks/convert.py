"""Memory and speed of converting a checkpoint to safetensors, compared with a plain copy on the same disk.

    python benchmarks/make_random_checkpoint.py --preset molmoe-1b --out /data/random-molmoe
    python benchmarks/convert.py /data/random-molmoe --scratch /data

Copies the weights, deletes the copy, and converts them to bfloat16, each in its own process. Times start with a cold
page cache if it can be emptied (as root) and end when all data is on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.tensor_names import hub_shapes
from molmo_edge.checkpoints.tensor_sources import stored_bytes
from molmo_edge.checkpoints.weight_files import open_tensors

_COPY = "import shutil, sys; shutil.copyfile(sys.argv[1], sys.argv[2])"
_EXPORT = "from molmo_edge.cli import main; main()"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path("."), help="directory for the copy and the result")
    parser.add_argument("--keep", type=Path, help="keep the converted checkpoint in this directory")
    args = parser.parse_args()
    weights = [p for p in sorted(args.checkpoint.iterdir()) if p.suffix in (".bin", ".safetensors", ".pt")]
    tensors = open_tensors(args.checkpoint)
    names = hub_shapes(read_config(args.checkpoint))
    largest = max(stored_bytes(tensors, [name]) for name in names)
    source = sum(path.stat().st_size for path in weights)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        copy = 0.0
        for path in weights:
            copy += timed(_COPY, str(path), f"{scratch}/copy")
            os.unlink(f"{scratch}/copy")
        before = peak()
        out = args.keep or Path(scratch) / "converted"
        convert = timed(
            _EXPORT, "export", str(args.checkpoint), "--engine", "torch", "--precision", "bf16", "--out", str(out), "-q"
        )
        memory = peak()
        if memory <= before:
            raise SystemExit("the copy took more memory than the conversion: the conversion's peak is unknown")
        written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    figures = {
        "source_gb": source / 1e9,
        "written_gb": written / 1e9,
        "copy_s": copy,
        "convert_s": convert,
        "copy_mb_s": source / 1e6 / copy,
        "convert_mb_s": source / 1e6 / convert,  # of the source
        "ratio_of_source": copy / convert,
        "ratio_of_all_bytes": (source + written) / convert / (2 * source / copy),
        "peak_gb": memory / 1e9,
        "largest_tensor_gb": largest / 1e9,
        "above_largest_tensor_gb": (memory - largest) / 1e9,
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


def timed(program: str, *arguments: str) -> float:
    """Seconds until the program's output is on the disk."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        print("the page cache could not be emptied", file=sys.stderr)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)
    os.sync()
    return time.perf_counter() - began


def peak() -> int:
    """Peak resident bytes of the largest child process so far."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


if __name__ == "__main__":
    main()
