"""Time per stage and peak memory of a full-size Molmo2 in Hugging Face transformers, in its own process.

    python benchmarks/transformers_molmo2.py /data/random-molmo2-4b

Needs transformers 5.24 or later and molmo-edge, which prepares the same crops and prompt as benchmarks/full_size.py.
Prints the same figures as that script.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Molmo2ForConditionalGeneration

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.frontend.crops import ImageProcessor, load_image
from molmo_edge.frontend.prompts import image_ids, text_ids
from molmo_edge.frontend.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint in hub layout")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--image", type=Path, help="photo; default: a synthetic one of 640x480")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    model = Molmo2ForConditionalGeneration.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    loaded = time.perf_counter() - began
    peak_loading = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    y, x = np.mgrid[:480, :640]
    synthetic = np.stack([x * 255 // 640, y * 255 // 480, (x // 16 + y // 16) % 2 * 200], axis=-1).astype(np.uint8)
    began = time.perf_counter()
    inputs = _inputs(args.model, synthetic if args.image is None else load_image(args.image))
    preprocess = time.perf_counter() - began
    for _ in range(2):  # the first run selects kernels and allocates buffers
        figures = _run(model, inputs, args.tokens)
    figures = {"load_s": loaded, "preprocess_s": preprocess, **figures}
    figures |= {"peak_loading_gb": peak_loading / 1e9}
    figures |= {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


def _inputs(checkpoint: Path, rgb: np.ndarray) -> dict[str, torch.Tensor]:
    """The arguments of the model for one image and a question, batch 1."""
    config, tokenizer = read_config(checkpoint), Tokenizer.from_file(checkpoint / "tokenizer.json")
    prepared = ImageProcessor(config.image, tokenizer.special)(rgb)
    assert prepared.pooling is not None
    start = image_ids(tokenizer, prepared).ids
    ids = np.concatenate([start, text_ids(tokenizer, ["Describe this image."])])
    in_image = np.isin(ids, tokenizer.special.image_block) & (np.arange(len(ids)) < len(start))
    (low_rows, low_cols), (rows, cols) = config.image.cell_grids(prepared.tiling)
    return {
        "input_ids": torch.from_numpy(ids.astype(np.int64))[None],
        "mm_token_type_ids": torch.from_numpy(in_image.astype(np.int64))[None],
        "pixel_values": torch.from_numpy(prepared.crops),
        "image_token_pooling": torch.from_numpy(prepared.pooling),
        "image_grids": torch.tensor([[low_rows, low_cols, rows, cols]]),
    }


@torch.inference_mode()
def _run(model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> dict[str, float]:
    """Greedy decoding: seconds of vision and prefill, tokens per second after the first."""
    began = time.perf_counter()
    pixels = inputs["pixel_values"].to(model.dtype)
    features = model.get_image_features(pixels, inputs["image_token_pooling"], inputs["image_grids"])
    vision = time.perf_counter() - began
    text = {name: inputs[name] for name in ("input_ids", "mm_token_type_ids")}
    out = model(**text, mm_encoder_outputs={"image": features}, use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter() - began - vision
    began = time.perf_counter()
    for _ in range(tokens - 1):
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        out = model(input_ids=token, cache=out.cache, use_cache=True)
    decode = time.perf_counter() - began
    positions = inputs["input_ids"].shape[1]
    crops = len(inputs["pixel_values"])
    return {
        "vision_s": vision,
        "prefill_s": prefill,
        "decode_tokens_per_s": (tokens - 1) / decode,
        "crops": crops,
        "positions": positions,
    }


if __name__ == "__main__":
    main()
