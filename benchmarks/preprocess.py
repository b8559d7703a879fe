"""Time to crop images, median of 20 runs: `python benchmarks/preprocess.py [--max-crops 12]`."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import numpy as np

from molmo_edge.config import ImageConfig
from molmo_edge.frontend.crops import ImageProcessor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-crops", type=int, default=12)
    args = parser.parse_args()
    process = ImageProcessor(dataclasses.replace(ImageConfig(), max_crops=args.max_crops))
    rng = np.random.default_rng(0)
    for width, height in ((640, 480), (1920, 1080), (4000, 3000)):
        rgb = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        times = []
        for _ in range(21):
            began = time.perf_counter()
            prepared = process(rgb)
            times.append(time.perf_counter() - began)
        median = 1000 * statistics.median(times[1:])
        print(f"{width}x{height}: {median:6.1f} ms, {len(prepared.crops)} crops (first call {1000 * times[0]:.1f} ms)")


if __name__ == "__main__":
    main()
