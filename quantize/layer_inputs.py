"""Run sequences through a decoder layer by layer, and collect the inputs of each matrix.

Memory holds one layer in float32 and the sequences' hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.modeling.decoder import Block, rotary_tables
from molmo_edge.modeling.weights import load_part

SHARED = 0.1  # weight of all tokens in the statistics of an expert, which few tokens choose


class LayerRunner:
    """Starts before layer 0. `block` is the next layer, whose weights a caller may change before advancing."""

    def __init__(self, config: MolmoConfig, tensors: TensorSource, embeddings: Sequence[np.ndarray]) -> None:
        """`embeddings`: the decoder's inputs, float32 [n, d_model] each."""
        self.layer = 0
        self._config, self._tensors = config, tensors
        self._states = [torch.from_numpy(np.ascontiguousarray(row, np.float32))[None] for row in embeddings]
        self._tables = [rotary_tables(torch.arange(s.shape[1])[None], config.decoder) for s in self._states]
        self.block = self._load(0)

    def advance_to(self, layer: int) -> bool:
        """Run the layers before `layer`. Returns whether there were any to run."""
        start = self.layer
        while self.layer < layer:
            for i, (state, tables) in enumerate(zip(self._states, self._tables, strict=True)):
                self._states[i] = self.block(state, *tables, None, None)
            self.layer += 1
            del self.block  # before the next is loaded: a layer of MolmoE is 1.6 GB
            self.block = self._load(self.layer)
        return self.layer > start

    def inputs(self, module: nn.Module) -> Iterator[Tensor]:
        """The inputs of `module`, a submodule of `block`, for each sequence: [n, in]."""
        captured: list[Tensor] = []

        def stop(_: nn.Module, inputs: tuple[Tensor]) -> None:
            captured.append(inputs[0][0])
            raise _StopForwardError

        for state, tables in zip(self._states, self._tables, strict=True):
            hook = module.register_forward_pre_hook(stop)
            try:
                self.block(state, *tables, None, None)
            except _StopForwardError:
                yield captured.pop()
            finally:
                hook.remove()

    def scaled_inputs(self, module: nn.Module) -> Iterator[Tensor]:
        """As `inputs`, with each position scaled by how much its errors count.

        With norms after the branches all positions count the same. The norms of OLMo's positions differ a
        thousandfold, and unscaled the few largest would dominate.
        """
        for x in self.inputs(module):
            yield F.normalize(x, dim=-1) if self._config.decoder.norm_after else x

    def _load(self, layer: int) -> Block:
        return cast(Block, load_part(self._config, self._tensors, f"decoder.blocks.{layer}"))


class _StopForwardError(Exception):
    """The inputs are captured; the rest of the layer need not run."""
