"""Prompts with photos to round a decoder with, and GPTQ on what its matrices make of them.

A Molmo prompt is mostly image, and image positions look nothing like text: matrices that are calibrated on text alone
are rounded for the wrong inputs. So each sequence here is a photo, a question, and the answer where one is given.

Layers come one after the other (molmo_edge.quantize.layer_inputs), each with the rounded ones before it, as in use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.frontend.crops import ImageProcessor, load_image
from molmo_edge.frontend.prompts import image_ids, text_ids
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.modeling.decoder import SparseFFN
from molmo_edge.quantize import QuantizeError
from molmo_edge.quantize.calibration_prompts import PROMPTS, QUESTIONS, Prompt, photos_in, read_prompts
from molmo_edge.quantize.gptq import gptq
from molmo_edge.quantize.layer_inputs import SHARED, Walk
from molmo_edge.quantize.rounding import Blocks, nearest
from molmo_edge.runtimes import Runtime
from molmo_edge.runtimes.prompt_embeddings import image_embeddings

__all__ = ["MOST", "PROMPTS", "Calibration", "Prompt", "find_prompts", "sequences"]

_Thing = TypeVar("_Thing")

MOST = 32  # prompts; each is some hundred positions
_NARROW = 4096  # inputs; below, GPTQ is many small steps, which one thread takes faster than several
_NAME = re.compile(r"\.blocks\.(\d+)\.(?:attn\.|mlp\.)?(?:experts\.(\d+)\.(gate|up|down)_proj|(\w+))$")


def find_prompts(folder: str | Path) -> list[Prompt]:
    """The prompts of a folder, at most MOST, evenly over what it has.

    From its prompts.jsonl, a line {"image": path in the folder, "question": ..., "answer": ...} each, the answer
    optional; without that file every photo in it gets one of a few common questions. Raises QuantizeError,
    ImageError or PromptError for what cannot be used.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise QuantizeError(f"{folder} is not a folder of photos to calibrate with")
    listed = folder / PROMPTS
    if listed.is_file():
        prompts = _some(read_prompts(listed))
    else:
        prompts = [Prompt(path, QUESTIONS[i % len(QUESTIONS)]) for i, path in enumerate(_some(photos_in(folder)))]
    if not prompts:
        raise QuantizeError(f"{folder} holds no photos to calibrate with, and no {PROMPTS}")
    for prompt in prompts:  # now, not after an hour
        load_image(prompt.image)
    return prompts


def _some(things: list[_Thing]) -> list[_Thing]:
    return [things[i * len(things) // MOST] for i in range(MOST)] if len(things) > MOST else things


def sequences(prompts: Sequence[Prompt], runtime: Runtime, tokenizer: Tokenizer) -> list[np.ndarray]:
    """What the decoder is fed with for each prompt, float32 [n, d_model]; `runtime` needs no decoder."""
    process = ImageProcessor(runtime.config.image, tokenizer.special)
    most = runtime.config.decoder.max_position_embeddings
    found = []
    for prompt in prompts:
        prepared = process(load_image(prompt.image))
        ids = text_ids(tokenizer, [prompt.question])
        if prompt.answer:
            ids = np.concatenate([ids, tokenizer.encode(f" {prompt.answer}")])
        image = image_embeddings(runtime, prepared, image_ids(tokenizer, prepared))
        found.append(np.concatenate([image, runtime.embed(ids)])[:most])
    return found


class Calibration:
    """A `Round` (molmo_edge.quantize.rounding) for a decoder whose matrices are asked for in its own order."""

    def __init__(self, config: MolmoConfig, tensors: TensorSource, rows: Sequence[np.ndarray]) -> None:
        """`rows`: what `sequences` gave."""
        self._config = config
        self._walk = Walk(config, tensors, rows)
        self._experts: dict[tuple[int, str], Blocks] = {}

    @torch.inference_mode()
    def __call__(self, name: str, weight: np.ndarray, block: int, asymmetric: bool) -> Blocks:
        found = _NAME.search(name)
        if found is None:  # the experts as one matrix: nothing here has its inputs
            return nearest(name, weight, block, asymmetric)
        layer, expert, which, leaf = found.groups()
        if self._walk.go_to(int(layer)):
            self._experts = {}
        if expert is not None:
            d = self._config.decoder
            if weight.shape[1] != (d.ffn_dim if which == "down" else d.d_model):  # filled up to whole blocks
                return nearest(name, weight, block, asymmetric)
            if not self._experts:
                self._experts = self._round_experts(block, asymmetric)
            return self._experts.pop((int(expert), which))
        home = self._walk.block.attn if leaf.startswith("att") else self._walk.block.ffn
        module = getattr(home, leaf)
        inputs = self._hessian(module)
        grown = weight.shape[1] - len(inputs)  # the columns that a block was filled up with
        rounded = _rounded(torch.from_numpy(weight), F.pad(inputs, (0, grown, 0, grown)), block, asymmetric)
        module.weight.copy_(torch.from_numpy(rounded.restored())[:, : weight.shape[1] - grown])
        return rounded

    def _hessian(self, module: nn.Module) -> Tensor:
        total: Tensor | None = None
        for x in self._walk.scaled_inputs(module):
            total = x.T @ x if total is None else total.addmm_(x.T, x)
        assert total is not None
        return total

    def _round_experts(self, block: int, asymmetric: bool) -> dict[tuple[int, str], Blocks]:
        """All of the layer: each on the positions that chose it, by the weight that they gave it."""
        ffn = self._walk.block.ffn
        assert isinstance(ffn, SparseFFN)
        x = torch.cat(list(self._walk.inputs(ffn)))  # [tokens, d_model]
        weights, chosen = ffn.route(x)
        shared = x.T @ x
        found: dict[tuple[int, str], Blocks] = {}

        @torch.inference_mode()
        def one(e: int) -> None:
            token, k = torch.nonzero(chosen == e, as_tuple=True)
            weight = weights[token, k, None]
            mine = x[token]
            inputs = (mine * weight).T @ (mine * weight)
            share = inputs.trace() / shared.trace() if len(token) else shared.new_ones(())
            inputs += shared * (share * SHARED)
            for which, rounded in zip(
                ("gate", "up"), _both(ffn.gate[e], ffn.up[e], inputs, block, asymmetric), strict=True
            ):
                found[e, which] = rounded
                getattr(ffn, which)[e] = torch.from_numpy(rounded.restored())
            h = F.silu(F.linear(mine, ffn.gate[e])) * F.linear(mine, ffn.up[e]) * weight
            found[e, "down"] = _rounded(ffn.down[e], h.T @ h, block, asymmetric)
            ffn.down[e] = torch.from_numpy(found[e, "down"].restored())

        # Many small steps: a thread for each expert is many times faster than all threads on one.
        with _single_threaded() as workers, ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, range(len(ffn.gate))))
        return found


@contextmanager
def _single_threaded() -> Iterator[int]:
    """PyTorch with one thread in each of our own; yields how many it had."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def _both(gate: Tensor, up: Tensor, inputs: Tensor, block: int, asymmetric: bool) -> list[Blocks]:
    """Two matrices with the same inputs: side by side, since a row minds no other row."""
    codes, scale, zero_point = gptq(torch.cat([gate, up]), inputs, block, asymmetric=asymmetric)
    parts = ([None, None] if part is None else part.chunk(2) for part in (codes, scale, zero_point))
    return [_blocks(*three) for three in zip(*parts, strict=True)]


def _rounded(weight: Tensor, inputs: Tensor, block: int, asymmetric: bool) -> Blocks:
    with _single_threaded() if weight.shape[1] <= _NARROW else nullcontext():
        return _blocks(*gptq(weight, inputs, block, asymmetric=asymmetric))


def _blocks(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Blocks:
    return Blocks(codes.numpy(), scale.numpy(), None if zero_point is None else zero_point.numpy())
