"""Smoothing for int8: divide large input channels by a scale, and multiply the weights' columns by it.

In int8 a row of inputs has one scale, so a channel that is always large costs the others their precision. For a matrix
after a norm the norm's gain is divided by s and the matrix's columns are multiplied by s, which leaves the output
unchanged. s is the square root of the channel's root mean square on calibration prompts; on nano that is slightly
better than the maxima of SmoothQuant (arXiv 2211.10438).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import nn

from molmo_edge.checkpoints.tensor_sources import Changed, TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.quantize.layer_inputs import LayerRunner

_FLOOR = 1e-3  # times the mean channel: smaller channels count as this large
_AFTER_NORM = re.compile(
    r"\.blocks\.(\d+)\.(?:attn\.|mlp\.)?"
    r"(?:(attn_norm|att_proj)|(ff_norm|ff_proj|gate|experts\.\d+\.(?:gate|up)_proj))\.(weight)$"
)


def smoothed(
    config: MolmoConfig, tensors: TensorSource, embeddings: Sequence[np.ndarray], parts: Collection[str]
) -> TensorSource:
    """Smoothed weights that compute the same function.

    `embeddings`: the decoder's inputs, float32 [n, d_model] each. `parts`: "attention", "experts", or both. A decoder
    with norms after its branches (OLMo) is returned unchanged.
    """
    if config.decoder.norm_after:
        return tensors
    scales: dict[tuple[int, str], np.ndarray] = {}
    with torch.inference_mode():
        runner = LayerRunner(config, tensors, embeddings)
        for layer in range(config.decoder.n_layers):
            runner.advance_to(layer)
            for part, module in (("attention", runner.block.attn), ("experts", runner.block.ffn)):
                if part in parts:
                    scales[layer, part] = _scale(runner, module)

    def change(name: str) -> np.ndarray:
        array, match = tensors.get(name), _AFTER_NORM.search(name)
        scale = match and scales.get((int(match[1]), "attention" if match[2] else "experts"))
        if scale is None:
            return array
        smooth: np.ndarray = array / scale if array.ndim == 1 else array * scale
        return smooth

    return Changed(tensors, change)


def _scale(runner: LayerRunner, module: nn.Module) -> np.ndarray:
    """float32 [d_model] with geometric mean 1."""
    squares, n = np.zeros(0), 0
    for x in runner.inputs(module):  # [n, d_model]
        part = x.double().square().sum(0).numpy()
        squares, n = (part if n == 0 else squares + part), n + len(x)
    rms = np.sqrt(squares / n)
    scale = np.sqrt(np.maximum(rms, _FLOOR * rms.mean()))
    normalised: np.ndarray = scale / np.exp(np.log(scale).mean())
    return normalised.astype(np.float32)
