"""Sequences on their way through the decoder, layer by layer: what each matrix gets to see.

Memory holds one layer in float32 and the sequences' states.
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

SHARED = 0.1  # how much an expert's inputs are helped by those of all experts, which are many more


class Walk:
    """Begins in front of layer 0; `block` is the layer that the sequences stand in front of, and may be changed."""

    def __init__(self, config: MolmoConfig, tensors: TensorSource, rows: Sequence[np.ndarray]) -> None:
        """`rows`: what `molmo_edge.quantize.calibration.sequences` gave, float32 [n, d_model] each."""
        self.layer = 0
        self._config, self._tensors = config, tensors
        self._states = [torch.from_numpy(np.ascontiguousarray(row, np.float32))[None] for row in rows]
        self._tables = [rotary_tables(torch.arange(s.shape[1])[None], config.decoder) for s in self._states]
        self.block = self._load(0)

    def go_to(self, layer: int) -> bool:
        """Through the layers before `layer`, as `block` has become; whether that was any step."""
        started = self.layer
        while self.layer < layer:
            for i, (state, tables) in enumerate(zip(self._states, self._tables, strict=True)):
                self._states[i] = self.block(state, *tables, None, None)
            self.layer += 1
            del self.block  # before the next is there: a layer of MolmoE is 1.6 GB
            self.block = self._load(self.layer)
        return self.layer > started

    def inputs(self, module: nn.Module) -> Iterator[Tensor]:
        """What the module, one of `block`, is fed with in each sequence, [n, in]."""
        seen: list[Tensor] = []

        def stop(_: nn.Module, inputs: tuple[Tensor]) -> None:
            seen.append(inputs[0][0])
            raise _Enough

        for state, tables in zip(self._states, self._tables, strict=True):
            hook = module.register_forward_pre_hook(stop)
            try:
                self.block(state, *tables, None, None)
            except _Enough:
                yield seen.pop()
            finally:
                hook.remove()

    def scaled_inputs(self, module: nn.Module) -> Iterator[Tensor]:
        """As `inputs`, each position as large as its errors count.

        Where norms stand behind the branches that is one size for all: OLMo's positions lie a thousandfold apart, and
        as they are the largest few would be all that counts.
        """
        for x in self.inputs(module):
            yield F.normalize(x, dim=-1) if self._config.decoder.norm_after else x

    def _load(self, layer: int) -> Block:
        return cast(Block, load_part(self._config, self._tensors, f"decoder.blocks.{layer}"))


class _Enough(Exception):  # noqa: N818 (a signal, not an error)
    """What was to be seen has been seen."""
