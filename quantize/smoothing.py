"""The same function with weights that are easier to round in int8: loud inputs made quieter, their columns louder.

An input row has one scale in int8, so a channel that is always loud takes the precision of all others. Every matrix
behind a norm can share the load: the norm's gain is divided by s, the matrix's columns are multiplied by it, and what
comes out is equal. s is the square root of the channel's root mean square on real prompts, which served
nano a little better than the largest values of SmoothQuant (arXiv 2211.10438).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import nn

from molmo_edge.checkpoints.tensor_sources import Changed, TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.quantize.layer_inputs import Walk

_QUIET = 1e-3  # of the mean channel: a quieter one counts as this loud
_BEHIND = re.compile(
    r"\.blocks\.(\d+)\.(?:attn\.|mlp\.)?"
    r"(?:(attn_norm|att_proj)|(ff_norm|ff_proj|gate|experts\.\d+\.(?:gate|up)_proj))\.(weight)$"
)


def smoothed(
    config: MolmoConfig, tensors: TensorSource, rows: Sequence[np.ndarray], parts: Collection[str]
) -> TensorSource:
    """The weights of the same function; biases and what stands behind no norm are as they were.

    `rows`: what `molmo_edge.quantize.calibration.sequences` gave. `parts`: "attention", "experts", or both. A decoder
    whose norms stand behind its branches (OLMo) is left as it is.
    """
    if config.decoder.norm_after:
        return tensors
    scales: dict[tuple[int, str], np.ndarray] = {}
    with torch.inference_mode():
        walk = Walk(config, tensors, rows)
        for layer in range(config.decoder.n_layers):
            walk.go_to(layer)
            for part, module in (("attention", walk.block.attn), ("experts", walk.block.ffn)):
                if part in parts:
                    scales[layer, part] = _scale(walk, module)

    def change(name: str) -> np.ndarray:
        array, found = tensors.get(name), _BEHIND.search(name)
        scale = found and scales.get((int(found[1]), "attention" if found[2] else "experts"))
        if scale is None:
            return array
        return array / scale if array.ndim == 1 else array * scale

    return Changed(tensors, change)


def _scale(walk: Walk, module: nn.Module) -> np.ndarray:
    """float32 [d_model], its geometric mean 1."""
    squares, n = np.zeros(0), 0
    for x in walk.inputs(module):  # [n, d_model]
        here = x.double().square().sum(0).numpy()
        squares, n = (here if n == 0 else squares + here), n + len(x)
    loudness = np.sqrt(squares / n)
    scale = np.sqrt(np.maximum(loudness, _QUIET * loudness.mean()))
    return (scale / np.exp(np.log(scale).mean())).astype(np.float32)
