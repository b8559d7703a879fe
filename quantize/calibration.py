"""GPTQ with calibration prompts: a `Round` (molmo_edge.quantize.rounding) for the matrices of a decoder.

Layers are rounded in order, each on the outputs of the rounded layers before it, as at inference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.modeling.decoder import SparseFFN
from molmo_edge.quantize.calibration_prompts import DecoderInput
from molmo_edge.quantize.gptq import gptq
from molmo_edge.quantize.layer_inputs import SHARED, LayerRunner
from molmo_edge.quantize.rounding import Blocks, nearest

_SINGLE_THREAD_BELOW = 4096  # inputs; there GPTQ is many small steps, in which one thread is faster than several
# The Hessian of an expert with fewer tokens than inputs fits these tokens alone. That of all tokens is added, weighted
# by inputs per token, between SHARED and _MOST_SHARED.
_MOST_SHARED = 1.0
_SAMPLE = 1024  # tokens that stand for all where each expert would have to run on them
_NAME = re.compile(r"\.blocks\.(\d+)\.(?:attn\.|self_attn\.|mlp\.)?(?:experts\.(\d+)\.(gate|up|down)_proj|(\w+))$")


class Calibration:
    """Rounds the matrices of a decoder, which must be passed in the decoder's own order."""

    def __init__(self, config: MolmoConfig, tensors: TensorSource, inputs: Sequence[DecoderInput]) -> None:
        """`inputs`: of calibration_prompts.embed_prompts."""
        self._config = config
        self._runner = LayerRunner(config, tensors, inputs)
        self._experts: dict[tuple[int, str], Blocks] = {}

    @torch.inference_mode()
    def __call__(self, name: str, weight: np.ndarray, block: int, asymmetric: bool) -> Blocks:
        """Implement `rounding.Round`: GPTQ where inputs of the matrix are available, otherwise round to nearest."""
        match = _NAME.search(name)
        if match is None:  # all experts as one matrix, or the head: their inputs are not available here
            return nearest(name, weight, block, asymmetric)
        layer, expert, which, leaf = match.groups()
        if self._runner.advance_to(int(layer)):
            self._experts = {}
        if expert is not None:
            d = self._config.decoder
            if weight.shape[1] != (d.ffn_dim if which == "down" else d.d_model):  # padded to whole blocks
                return nearest(name, weight, block, asymmetric)
            if not self._experts:
                self._experts = self._round_experts(block, asymmetric)
            return self._experts.pop((int(expert), which))
        parent = self._runner.block.attn if leaf.startswith("att") else self._runner.block.ffn
        module = getattr(parent, leaf)
        hessian = self._hessian(module)
        padding = weight.shape[1] - len(hessian)  # columns that fill the last block
        rounded = _round(torch.from_numpy(weight), F.pad(hessian, (0, padding, 0, padding)), block, asymmetric)
        module.weight.copy_(torch.from_numpy(rounded.restored())[:, : weight.shape[1] - padding])
        return rounded

    def _hessian(self, module: nn.Module) -> Tensor:
        total: Tensor | None = None
        for x in self._runner.scaled_inputs(module):
            total = x.T @ x if total is None else total.addmm_(x.T, x)
        assert total is not None
        return total

    def _round_experts(self, block: int, asymmetric: bool) -> dict[tuple[int, str], Blocks]:
        """Round all experts of the layer, each on the tokens that chose it, weighted by their routing weights."""
        ffn = self._runner.block.ffn
        assert isinstance(ffn, SparseFFN)
        x = torch.cat(list(self._runner.inputs(ffn)))  # [tokens, d_model]
        weights, chosen = ffn.route(x)
        all_tokens, sample = x.T @ x, x[:: -(-len(x) // _SAMPLE)]
        blocks: dict[tuple[int, str], Blocks] = {}

        @torch.inference_mode()
        def round_expert(e: int) -> None:
            token, k = torch.nonzero(chosen == e, as_tuple=True)
            weight = weights[token, k, None]
            inputs = x[token]
            hessian = _with_all((inputs * weight).T @ (inputs * weight), len(token), all_tokens)
            gate_up = _round_pair(ffn.gate[e], ffn.up[e], hessian, block, asymmetric)
            for which, rounded in zip(("gate", "up"), gate_up, strict=True):
                blocks[e, which] = rounded
                getattr(ffn, which)[e] = torch.from_numpy(rounded.restored())
            h = _hidden(ffn, e, inputs) * weight
            hessian = h.T @ h
            if _share(len(hessian), len(token)) > SHARED:
                others = _hidden(ffn, e, sample)
                hessian = _with_all(hessian, len(token), others.T @ others)
            blocks[e, "down"] = _round(ffn.down[e], hessian, block, asymmetric)
            ffn.down[e] = torch.from_numpy(blocks[e, "down"].restored())

        # Many small steps: one thread per expert is many times faster than all threads on one expert.
        with _single_threaded() as workers, ThreadPoolExecutor(workers) as pool:
            list(pool.map(round_expert, range(len(ffn.gate))))
        return blocks


def _hidden(ffn: SparseFFN, e: int, x: Tensor) -> Tensor:
    """The input of `down` of expert `e`: x [tokens, d_model] -> [tokens, ffn_dim]."""
    return F.silu(F.linear(x, ffn.gate[e])) * F.linear(x, ffn.up[e])


def _share(width: int, tokens: int) -> float:
    """The weight of all tokens beside an expert's own in its Hessian [width, width]."""
    return min(_MOST_SHARED, max(SHARED, width / max(tokens, 1)))


def _with_all(own: Tensor, tokens: int, everyone: Tensor) -> Tensor:
    """The Hessian of an expert's own `tokens`, and that of all tokens, scaled to the same trace and weighted."""
    if not tokens or not own.trace() or not everyone.trace():
        return own + everyone
    return own + everyone * (own.trace() / everyone.trace() * _share(len(own), tokens))


@contextmanager
def _single_threaded() -> Iterator[int]:
    """Let each of our threads run PyTorch with one thread; yields PyTorch's previous number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def _round_pair(gate: Tensor, up: Tensor, hessian: Tensor, block: int, asymmetric: bool) -> list[Blocks]:
    """Two matrices with the same inputs at once: rows are independent of each other."""
    codes, scale, zero_point = gptq(torch.cat([gate, up]), hessian, block, asymmetric=asymmetric)
    halves = ([None, None] if part is None else part.chunk(2) for part in (codes, scale, zero_point))
    return [_blocks(*half) for half in zip(*halves, strict=True)]


def _round(weight: Tensor, hessian: Tensor, block: int, asymmetric: bool) -> Blocks:
    with _single_threaded() if weight.shape[1] <= _SINGLE_THREAD_BELOW else nullcontext():
        return _blocks(*gptq(weight, hessian, block, asymmetric=asymmetric))


def _blocks(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Blocks:
    return Blocks(codes.numpy(), scale.numpy(), None if zero_point is None else zero_point.numpy())
