"""A step of distillation from Molmo-7B-D to MolmoE-1B at their full widths and a reduced depth, on a CPU.

    python benchmarks/distillation.py --folder /data/distillation

Weights are random, and vocabularies and the number of experts are smaller. Teacher and student have different
tokenizers. The run is that of `molmo-edge distill` with all losses that the two have in common; the figures are from
its log.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from make_random_checkpoint import make_checkpoint
from PIL import Image

from molmo_edge.config import MolmoConfig
from molmo_edge.presets import PRESETS


def shallow(config: MolmoConfig, depth: int, vocabulary: int, experts: int) -> MolmoConfig:
    decoder = replace(config.decoder, n_layers=depth, vocab_size=vocabulary, embedding_size=vocabulary + 128)
    if decoder.n_experts:
        decoder = replace(decoder, n_experts=experts)
    vision = replace(config.vision, n_layers=max(2, depth), layers=(-1, -2))
    return replace(config, decoder=decoder, vision=vision, image=replace(config.image, max_crops=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints, data and the run")
    parser.add_argument("--depth", type=int, default=1, help="layers of both decoders")
    parser.add_argument("--experts", type=int, default=16, help="of MolmoE's 64")
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    folder: Path = args.folder
    models = {"teacher": ("molmo-7b-d", 8000), "student": ("molmoe-1b", 6000)}
    for name, (preset, vocabulary) in models.items():
        if not (folder / name).exists():
            make_checkpoint(shallow(PRESETS[preset], args.depth, vocabulary, args.experts), folder / name)
    data = folder / "data" / "pixmo_cap_with_transcripts"
    data.mkdir(parents=True, exist_ok=True)
    picture = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    Image.fromarray(picture).save(data / "photo.png")
    row = {"image": "photo.png", "caption": "Noise, as on a screen.", "transcripts": ["um, it is noise"]}
    (data / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    command = [sys.executable, "-m", "molmo_edge.cli", "distill", "--data", str(folder / "data")]
    for name in models:
        command += [f"--{name}", str(folder / name)]
    command += ["--out", str(folder / "run"), "--sets", data.name, "--steps", str(args.steps), "--batch", "1"]
    command += ["--workers", "0", "--device", "cpu", "--log-every", "1", "--save-every", "1000000"]
    command += ["--hidden", "0.1", "--image", "0.1", "--max-crops", "1", "--keep-activations"]
    began = time.perf_counter()
    subprocess.run(command, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    for line in map(json.loads, (folder / "run" / "log.jsonl").read_text().splitlines()):
        names = ("step", "seconds_per_step", "loss", "divergence", "hidden_loss", "image_loss")
        print({name: round(line[name], 3) for name in names if name in line})
    print(f"{time.perf_counter() - began:.0f} s in all, peak {peak / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
