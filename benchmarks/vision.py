"""Time a crop in the vision tower: a bundle's graph against the PyTorch model in float32, in turns.

    python benchmarks/vision.py CHECKPOINT BUNDLE

Prints one line of JSON: seconds per crop of both, their ratio, and the relative difference of their features.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from molmo_edge.checkpoints.bundle import open_bundle
from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.checkpoints.weight_files import open_tensors
from molmo_edge.export.component_errors import sample_crops
from molmo_edge.modeling.weights import load_part
from molmo_edge.runtimes.onnx import OnnxRuntime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = read_config(args.checkpoint)
    model = load_part(config, open_tensors(args.checkpoint), "vision")
    bundle = open_bundle(args.bundle, hashes=False)
    runtime = OnnxRuntime(config, {"vision_encoder": bundle.path("vision_encoder")}, threads=args.threads)
    crop = sample_crops(config)[0][:1]  # [1, patches^2, patch_size^2 * 3]
    spent: dict[str, list[float]] = {"torch": [], "onnxruntime": []}
    features: dict[str, np.ndarray] = {}
    for _ in range(args.runs + 1):  # the first warms up
        for name in spent:
            began = time.perf_counter()
            if name == "torch":
                with torch.inference_mode():
                    features[name] = model(torch.from_numpy(crop)).numpy()
            else:
                features[name] = runtime.encode_crops(crop)
            spent[name].append(time.perf_counter() - began)
    seconds = {name: statistics.median(values[1:]) for name, values in spent.items()}
    difference = features["onnxruntime"] - features["torch"]
    result = {
        **{f"{name} s per crop": round(value, 3) for name, value in seconds.items()},
        "ratio": round(seconds["torch"] / seconds["onnxruntime"], 2),
        "relative difference": float(f"{np.linalg.norm(difference) / np.linalg.norm(features['torch']):.2g}"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
