"""A training step at full size: time, tokens per second, memory and utilisation, by configuration.

    python benchmarks/training.py                     # MolmoE-1B on a CUDA device, as in RESULTS.md
    python benchmarks/training.py --model small       # a small model on a CPU

Weights are random. The data is a picture of 1024 x 768 pixels in 12 crops with several annotations: sequences of 2304
tokens. Utilisation is the rate of the matrix products of active parameters, without recomputation, relative to the rate
of large matrix products on the same device in the same run: bfloat16 on CUDA, float32 on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from molmo_edge.config import DecoderConfig, ImageConfig, MolmoConfig, VisionConfig
from molmo_edge.frontend.crops import ImageProcessor
from molmo_edge.frontend.tokenizer import SpecialIds
from molmo_edge.modeling import Molmo
from molmo_edge.presets import PRESETS
from molmo_edge.training.encoding import Batch, Sample, collate
from molmo_edge.training.flops import cost, device_flops
from molmo_edge.training.forward import ForwardConfig, Trainable
from molmo_edge.training.optimizer import Optimizer, OptimizerConfig
from molmo_edge.training.packing import IMAGE_SEGMENT, Packed
from molmo_edge.training.trainer import freeze

SMALL = MolmoConfig(
    ImageConfig(max_crops=2),
    VisionConfig("openai", 128, 4, 4, 512, layers=(-2, -3)),
    DecoderConfig(
        d_model=256,
        n_layers=4,
        n_heads=4,
        n_kv_heads=4,
        ffn_dim=128,
        n_experts=16,
        top_k=4,
        embedding_size=8192,
        vocab_size=8000,
        qk_norm=True,
    ),
    projector_dim=256,
)


@dataclass(frozen=True)
class Case:
    name: str
    forward: ForwardConfig
    states: str = "8bit"
    micro: int = 1
    packed: bool = True  # all annotations in one sequence, or each with its own image


def cases(device: torch.device, micro: int) -> Iterator[Case]:
    cuda = device.type == "cuda"
    kernel = "grouped" if cuda else "loop"
    best = ForwardConfig(residual_dropout=0.0, answer_dropout=0.1, attention="auto", experts=kernel)
    yield Case("as it is", best, micro=micro)
    yield Case("attention sdpa", replace(best, attention="sdpa"), micro=micro)
    yield Case("experts in a loop" if cuda else "experts all at once", _other_kernel(best, cuda), micro=micro)
    yield Case("fp32 AdamW", best, states="fp32", micro=micro)
    yield Case("compiled", replace(best, compile=True), micro=micro)
    yield Case("one annotation a sequence", best, micro=micro, packed=False)
    yield Case("activations kept", replace(best, recompute=False), micro=1)
    yield Case("without dropout", replace(best, answer_dropout=0.0), micro=micro)
    if cuda:
        for more in (2 * micro, 4 * micro):
            yield Case(f"{more} sequences at once", best, micro=more)


def _other_kernel(best: ForwardConfig, cuda: bool) -> ForwardConfig:
    return replace(best, experts="loop" if cuda else "wide")


def sequences(config: MolmoConfig, length: int, annotations: int, packed: bool) -> list[Sample]:
    """One picture's annotations, as one sequence of `length` tokens or one each; seven of ten tokens are answers'."""
    special = SpecialIds(bos=1, eos=1, im_start=5, im_end=6, im_patch=7, im_col=8, image=9)
    picture = np.random.default_rng(0).integers(0, 256, (768, 1024, 3), dtype=np.uint8)
    image = ImageProcessor(config.image, special)(picture)
    head = 1 + len(image.tokens)
    each = (length - head) // annotations
    rng = np.random.default_rng(1)
    texts = [rng.integers(10, config.decoder.vocab_size, each) for _ in range(annotations)]
    groups = [texts] if packed else [[text] for text in texts]
    samples = []
    for number, group in enumerate(groups):
        ids = np.concatenate([[1], image.tokens, *group]).astype(np.int32)
        segments = np.concatenate([[IMAGE_SEGMENT] * head, *([k + 1] * each for k in range(len(group)))])
        positions = np.concatenate([np.arange(head), *(head + np.arange(each) for _ in group)])
        asked = (3 * each) // 10
        weights = np.concatenate([np.zeros(head), *([0.0] * asked + [1.0] * (each - asked) for _ in group)])
        sequence = Packed(
            ids,
            np.roll(ids, -1),
            weights.astype(np.float32),
            segments.astype(np.int32),
            positions.astype(np.int32),
            (),
        )
        index = np.where(image.token_index >= 0, image.token_index + 1, -1)
        samples.append(Sample(sequence, image.crops, image.masks, index, number))
    return samples


def make(config: MolmoConfig, forward: ForwardConfig, device: torch.device) -> Trainable:
    with torch.device("meta"):
        molmo = Molmo(config)
    freeze(molmo, ())
    molmo.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    molmo.init_weights(generator=generator)
    return Trainable(molmo, forward).train()


def measure(config: MolmoConfig, case: Case, device: torch.device, length: int, annotations: int, steps: int) -> dict:
    """Measure a case: `steps` updates of all parameters, after a warm-up step."""
    model = make(config, case.forward, device)
    optimizer = Optimizer(model, OptimizerConfig(states=case.states))
    samples = sequences(config, length, annotations, case.packed)
    flow = samples * case.micro if case.packed else samples
    micro = [collate(flow[i : i + case.micro]) for i in range(0, len(flow), case.micro)]
    seconds = []
    for step in range(steps + 1):
        _wait(device)
        start = time.perf_counter()
        loss = _step(model, optimizer, micro, device)
        _wait(device)
        if step:
            seconds.append(time.perf_counter() - start)
    tokens = sum(sum(batch.lengths) for batch in micro)
    flops = 3 * sum(cost(config).forward(batch) for batch in micro)
    median = float(np.median(seconds))
    return {
        "case": case.name,
        "sequences": sum(len(batch.lengths) for batch in micro),
        "tokens": tokens,
        "seconds": median,
        "tokens_per_second": tokens / median,
        "tera_flops_per_second": flops / median / 1e12,
        "peak_memory_gb": _peak_memory(device),
        "loss": loss,
    }


def _step(model: Trainable, optimizer: Optimizer, micro: list[Batch], device: torch.device) -> float:
    optimizer.zero_grad()
    total = 0.0
    weight = float(sum(batch.weights.sum() for batch in micro))
    for batch in micro:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            sums = model(batch.to(device))
        ((sums.cross_entropy + sums.z_loss) / weight).backward()
        total += float(sums.cross_entropy.detach()) / weight
    optimizer.clip(optimizer.norms())
    optimizer.step(1, 10)
    return total


def _peak_memory(device: torch.device) -> float:
    """GB; on a CPU of the process so far, which the largest of the cases decides."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=None, help="small, or a preset; molmoe-1b on CUDA, else small")
    parser.add_argument(
        "--layers", type=int, default=None, help="of the decoder and one more of the ViT, at full width"
    )
    parser.add_argument("--length", type=int, default=None, help="tokens of a sequence; 2304, small: 1024")
    parser.add_argument("--annotations", type=int, default=6)
    parser.add_argument("--micro", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--cases", default="", help="names with commas between; without it all")
    parser.add_argument("--seconds", type=float, default=540.0, help="start no case after this time")
    parser.add_argument("--out", default=None, help="a JSON file")
    args = parser.parse_args()
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = args.model or ("molmoe-1b" if device.type == "cuda" else "small")
    config = SMALL if name == "small" else PRESETS[name]
    if args.layers:
        decoder = replace(config.decoder, n_layers=args.layers)
        vision = replace(config.vision, n_layers=args.layers + 1, layers=(-1, -2))
        config = replace(config, decoder=decoder, vision=vision)
    length = args.length or (1024 if name == "small" else 2304)
    # On many CPUs bfloat16 is a hundred times slower than float32: there it is float32.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = device_flops(device, dtype, 2.0)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name} on {card}, torch {torch.__version__}: {dtype} products reach {rate / 1e12:.2f} TFLOP/s", flush=True)
    results: list[dict[str, Any]] = []
    for case in cases(device, args.micro):
        if args.cases and case.name not in [c.strip() for c in args.cases.split(",")]:
            continue
        if time.perf_counter() - began > args.seconds:
            print(f"{case.name}: left out, the time is over")
            continue
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            row = measure(config, case, device, length, args.annotations, args.steps)
        except torch.OutOfMemoryError:
            row = {"case": case.name, "error": "does not fit into the memory"}
        gc.collect()
        results.append(row)
        if "error" in row:
            print(f"{case.name}: {row['error']}", flush=True)
            continue
        row["utilisation"] = row["tera_flops_per_second"] * 1e12 / rate
        print(
            f"{case.name}: {row['sequences']} sequences, {row['tokens']} tokens, {row['seconds']:.3f} s a step, "
            f"{row['tokens_per_second']:,.0f} tokens/s, utilisation {100 * row['utilisation']:.1f} %, "
            f"{row['peak_memory_gb']:.1f} GB",
            flush=True,
        )
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump({"card": card, "model": name, "measured_flops": rate, "cases": results}, file, indent=1)


if __name__ == "__main__":
    main()
