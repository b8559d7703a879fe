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
from molmo_edge.modeling.decoder import Block, image_attention_mask, layer_tables
from molmo_edge.modeling.weights import load_part
from molmo_edge.quantize.calibration_prompts import DecoderInput

SHARED = 0.1  # weight of all tokens in the statistics of an expert, which few tokens choose


class LayerRunner:
    """Starts before layer 0. `block` is the next layer, whose weights a caller may change before advancing.

    Attention is that of the model: its mask over image tokens, and the rotary tables of each layer.
    """

    def __init__(self, config: MolmoConfig, tensors: TensorSource, inputs: Sequence[DecoderInput]) -> None:
        """`inputs`: of calibration_prompts.embed_prompts."""
        self.layer = 0
        self._config, self._tensors = config, tensors
        self._states = [torch.from_numpy(np.ascontiguousarray(one.embeddings, np.float32))[None] for one in inputs]
        self._tables = [layer_tables(torch.arange(s.shape[1])[None], config.decoder) for s in self._states]
        # Made anew for each run: the masks of all prompts together can be larger than a layer.
        self._images = [torch.from_numpy(one.image)[None] for one in inputs]
        self.block = self._load(0)

    def advance_to(self, layer: int) -> bool:
        """Run the layers before `layer`. Returns whether there were any to run."""
        start = self.layer
        while self.layer < layer:
            for i in range(len(self._states)):
                self._states[i] = self._run(i)
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

        for i in range(len(self._states)):
            hook = module.register_forward_pre_hook(stop)
            try:
                self._run(i)
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

    def _run(self, sequence: int) -> Tensor:
        """The output of `block` for a sequence, [1, n, d_model]."""
        bidirectional = self._config.decoder.bidirectional_images
        mask = image_attention_mask(self._images[sequence]) if bidirectional else None
        return self.block(self._states[sequence], *self._tables[sequence][self.layer], mask)

    def _load(self, layer: int) -> Block:
        return cast(Block, load_part(self._config, self._tensors, f"decoder.blocks.{layer}"))


class _StopForwardError(Exception):
    """The inputs are captured; the rest of the layer need not run."""
