"""Smoothing for int8: divide large input channels by a scale, and multiply the weights' columns by it.

In int8 a row of inputs has one scale, so a channel that is always large costs the others their precision. The scale is
the square root of the channel's root mean square on calibration prompts; on nano that is slightly better than the
maxima of SmoothQuant (arXiv 2211.10438). Whatever computes the inputs takes the inverse scale, which leaves the outputs
unchanged:

- The inputs of the matrices after a norm: the norm's gain.
- With norms after the branches (OLMo), no norm precedes these matrices, and their inputs are the residual stream, which
  has to stay as it is. There the inputs of the other two matrices are scaled: those of `attn_out` by the rows of the
  values, which attention only averages, and those of `ff_out` by the rows of `up`, which multiplies the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from molmo_edge.checkpoints.tensor_names import block_names, matrices_after_norms
from molmo_edge.checkpoints.tensor_sources import Changed, TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.modeling.decoder import DenseFFN
from molmo_edge.quantize.calibration_prompts import DecoderInput
from molmo_edge.quantize.layer_inputs import LayerRunner

_FLOOR = 1e-3  # times the mean channel: smaller channels count as this large
_Change = Callable[[np.ndarray], np.ndarray]


def smoothed(
    config: MolmoConfig, tensors: TensorSource, inputs: Sequence[DecoderInput], parts: Collection[str]
) -> TensorSource:
    """Smoothed weights that compute the same function.

    `inputs`: of calibration_prompts.embed_prompts. `parts`: "attention", "experts", or both.
    """
    changes: dict[str, _Change] = {}
    smooth = _after_norms if not config.decoder.norm_after else _inside_branches
    with torch.inference_mode():
        runner = LayerRunner(config, tensors, inputs)
        for layer in range(config.decoder.n_layers):
            runner.advance_to(layer)
            changes |= smooth(config, runner, layer, parts)

    def change(name: str) -> np.ndarray:
        array = tensors.get(name)
        return changes[name](array) if name in changes else array

    return Changed(tensors, change)


def _after_norms(config: MolmoConfig, runner: LayerRunner, layer: int, parts: Collection[str]) -> dict[str, _Change]:
    changes: dict[str, _Change] = {}
    modules = (("attention", runner.block.attn), ("experts", runner.block.ffn))
    for (part, module), (gain, matrices) in zip(modules, matrices_after_norms(config, layer).items(), strict=True):
        if part in parts:
            scale = _scale(_mean_squares(runner.inputs(module)))
            changes[gain] = _divided(scale)
            changes |= dict.fromkeys(matrices, _multiplied(scale))
    return changes


def _inside_branches(
    config: MolmoConfig, runner: LayerRunner, layer: int, parts: Collection[str]
) -> dict[str, _Change]:
    d, names, block = config.decoder, block_names(config, layer), runner.block
    changes: dict[str, _Change] = {}
    if "attention" in parts:
        squares = _mean_squares(runner.scaled_inputs(block.attn.attn_out))  # [q_dim]
        groups = squares.reshape(d.n_kv_heads, -1, d.head_dim)  # the query heads that share the values of a head
        scale = _scale(groups.mean(axis=1).reshape(-1))  # [kv_dim]
        columns = np.repeat(scale.reshape(d.n_kv_heads, 1, d.head_dim), groups.shape[1], axis=1).reshape(-1)
        rows = np.concatenate([np.ones(d.q_dim + d.kv_dim, np.float32), scale])
        changes[f"{names.attention}.att_proj.weight"] = _divided(rows[:, None])
        if d.qkv_bias:
            changes[f"{names.attention}.att_proj.bias"] = _divided(rows)
        changes[f"{names.attention}.attn_out.weight"] = _multiplied(columns)
    if "experts" in parts and isinstance(block.ffn, DenseFFN):
        scale = _scale(_mean_squares(runner.scaled_inputs(block.ffn.ff_out)))
        rows = np.concatenate([scale, np.ones_like(scale)])  # up, gate
        changes[f"{names.ffn}.ff_proj.weight"] = _divided(rows[:, None])
        changes[f"{names.ffn}.ff_out.weight"] = _multiplied(scale)
    return changes


def _divided(scale: np.ndarray) -> _Change:
    return lambda array: np.asarray(array / scale)


def _multiplied(scale: np.ndarray) -> _Change:
    return lambda array: np.asarray(array * scale)


def _mean_squares(inputs: Iterable[Tensor]) -> np.ndarray:
    """Of each channel of the inputs [n, in] of all sequences."""
    squares, n = np.zeros(0), 0
    for x in inputs:
        part = x.double().square().sum(0).numpy()
        squares, n = (part if n == 0 else squares + part), n + len(x)
    return squares / n


def _scale(squares: np.ndarray) -> np.ndarray:
    """Mean squares of the channels -> float32 with geometric mean 1."""
    rms = np.sqrt(squares)
    if not rms.any():
        return np.ones(len(rms), np.float32)
    scale = np.sqrt(np.maximum(rms, _FLOOR * rms.mean()))
    normalised: np.ndarray = scale / np.exp(np.log(scale).mean())
    return normalised.astype(np.float32)
