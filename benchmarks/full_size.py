"""Time per stage and peak memory of a full-size model, in its own process.

python benchmarks/make_random_checkpoint.py --preset molmoe-1b --out /data/random-molmoe
python benchmarks/full_size.py /data/random-molmoe --precision nf4
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import time
from pathlib import Path

import numpy as np

import molmo_edge
from molmo_edge import Molmo
from molmo_edge.config import PRECISIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint (runs on PyTorch), bundle, or nano")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--image", type=Path, help="photo; default: a synthetic one of 640x480")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, help="default: that of the engine")
    parser.add_argument("--image-tokens", type=float, help="the share of an image's tokens that the decoder sees")
    args = parser.parse_args()
    y, x = np.mgrid[:480, :640]
    synthetic = np.stack([x * 255 // 640, y * 255 // 480, (x // 16 + y // 16) % 2 * 200], axis=-1).astype(np.uint8)
    began = time.perf_counter()
    options = {} if args.image_tokens is None else {"image_tokens": args.image_tokens}  # earlier versions have none
    model = None if args.model == "nano" else args.model
    molmo = Molmo(model, precision=args.precision, device=args.device, threads=args.threads, **options)
    loaded = time.perf_counter() - began
    peak_loading = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answers = [molmo.ask(args.image or synthetic, "Describe this image.", max_new_tokens=args.tokens) for _ in range(2)]
    usage = answers[-1].usage  # of the second answer: the first one selects kernels and allocates buffers
    figures = {
        "load_s": loaded,
        **{f"{stage}_s": seconds for stage, seconds in dataclasses.asdict(usage.seconds).items() if stage != "load"},
        "decode_tokens_per_s": (usage.tokens.generated - 1) / usage.seconds.decode,
        "crops": usage.crops,
        "positions": usage.tokens.image + usage.tokens.prompt,
        "generated": usage.tokens.generated,
        "size_mb": _size(Path(molmo_edge.__file__).parent / "nano" if model is None else Path(model)) / 1e6,
        "peak_loading_gb": peak_loading / 1e9,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
