"""The importance matrix of a GGUF: mean squares of each matrix's inputs, for llama.cpp's quantiser.

llama.cpp computes the same from texts (tools/imatrix); here the prompts have photos, as in a calibration of ONNX
graphs. The inputs of an expert are weighted by their routing weights, which also multiply its errors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.modeling.decoder import DenseFFN, SparseFFN
from molmo_edge.quantize.calibration_prompts import DecoderInput
from molmo_edge.quantize.layer_inputs import SHARED, LayerRunner


@torch.inference_mode()
def importance(config: MolmoConfig, tensors: TensorSource, inputs: Sequence[DecoderInput]) -> dict[str, np.ndarray]:
    """For each tensor of the GGUF (molmo_edge.checkpoints.gguf_layout): float32 [in], of experts [n_experts, in].

    `inputs`: of calibration_prompts.embed_prompts. The head, for which llama.cpp uses more bits, and the
    embedding, which is not read from the GGUF, are left out.
    """
    runner = LayerRunner(config, tensors, inputs)
    result: dict[str, np.ndarray] = {}
    for layer in range(config.decoder.n_layers):
        runner.advance_to(layer)
        block, name = runner.block, f"blk.{layer}"
        parts = {"attn_q": _mean_squares(runner, block.attn.att_proj)}
        parts["attn_k"] = parts["attn_v"] = parts["attn_q"]
        parts["attn_output"] = _mean_squares(runner, block.attn.attn_out)
        if isinstance(block.ffn, SparseFFN):
            parts["ffn_gate_exps"], parts["ffn_down_exps"] = _experts(
                block.ffn, torch.cat(list(runner.inputs(block.ffn)))
            )
            parts["ffn_up_exps"] = parts["ffn_gate_exps"]
        else:
            assert isinstance(block.ffn, DenseFFN)
            parts["ffn_gate"] = parts["ffn_up"] = _mean_squares(runner, block.ffn.ff_proj)
            parts["ffn_down"] = _mean_squares(runner, block.ffn.ff_out)
        result |= {f"{name}.{part}.weight": values.numpy() for part, values in parts.items()}
    return result


def _mean_squares(runner: LayerRunner, module: nn.Module) -> Tensor:
    total, count = torch.zeros(()), 0
    for x in runner.scaled_inputs(module):  # one sequence at a time: together they are many times a layer
        total, count = total + x.square().sum(0), count + len(x)
    return total / count


def _experts(ffn: SparseFFN, x: Tensor) -> tuple[Tensor, Tensor]:
    """For x [tokens, d_model]: of the inputs of gate and up [n_experts, d_model], and of down [n_experts, ffn_dim]."""
    weights, chosen = ffn.route(x)
    all_tokens = x.square().mean(0)
    into, out = [], []
    for e in range(len(ffn.gate)):
        token, k = torch.nonzero(chosen == e, as_tuple=True)
        weight, inputs = weights[token, k, None], x[token]
        squares = (inputs * weight).square().sum(0)
        share = squares.sum() / all_tokens.sum() if len(token) else 1.0
        into.append(squares + all_tokens * (share * SHARED))
        if not len(token):  # as if all tokens had chosen it
            weight, inputs = torch.ones(len(x), 1), x
        h = F.silu(F.linear(inputs, ffn.gate[e])) * F.linear(inputs, ffn.up[e]) * weight
        squares = h.square().sum(0)
        out.append(squares + squares.mean() * SHARED)
    return torch.stack(into), torch.stack(out)
