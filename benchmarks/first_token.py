"""Time from `import molmo_edge` to the first token about a 640x480 photo, each run in a new process.

`python benchmarks/first_token.py [--model DIR] [--photo FILE] [--runs 5] [--threads 2]` prints a table and, last, one
line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CHILD = """
import json, sys, time
began = time.perf_counter()
import molmo_edge
imported = time.perf_counter()
molmo = molmo_edge.Molmo(sys.argv[3] or None, threads=int(sys.argv[2]) or None)
stream = molmo.stream(sys.argv[1], "How many cups are there?")
next(stream)
first = time.perf_counter()
spent = stream.answer.usage.seconds
print(json.dumps({
    "import": imported - began,
    "first_token": first - began,
    "preprocess": spent.preprocess,
    "vision": spent.vision,
    "prefill": spent.prefill,
    "torch": "torch" in sys.modules,
}))
"""


def resized(photo: Path, folder: Path) -> Path:
    """The photo at 640x480 as a JPEG in `folder`."""
    from PIL import Image

    out = folder / "photo.jpg"
    with Image.open(photo) as image:
        image.convert("RGB").resize((640, 480), Image.Resampling.BICUBIC).save(out, quality=90)
    return out


def run_once(model: str, photo: Path, threads: int) -> dict[str, Any]:
    """The times of one new process in seconds. `model`: "" for nano."""
    command = [sys.executable, "-c", CHILD, str(photo), str(threads), model]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="", help="default: nano")
    parser.add_argument("--photo", type=Path, default=Path(__file__).parent.parent / "examples" / "coffee.jpg")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="0: the default of the engine")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        photo = resized(args.photo, Path(scratch))
        # The first fills the disk cache and verifies the hashes.
        runs = [run_once(args.model, photo, args.threads) for _ in range(args.runs + 1)]
    if any(run["torch"] for run in runs):
        raise SystemExit("torch was imported")
    print(f"{'seconds':12} {'median':>8} {'worst':>8} {'very first':>11}")
    for stage in ("import", "preprocess", "vision", "prefill", "first_token"):
        values = [run[stage] for run in runs[1:] or runs]
        print(f"{stage:12} {statistics.median(values):8.3f} {max(values):8.3f} {runs[0][stage]:11.3f}")
    print(json.dumps({"runs": runs}))


if __name__ == "__main__":
    main()
