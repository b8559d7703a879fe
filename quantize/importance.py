"""Which inputs of a GGUF's matrices matter: their mean squares on prompts with photos, for llama.cpp's roundings.

llama.cpp collects the same from texts (tools/imatrix). A Molmo prompt is mostly image, whose positions look nothing
like text, so the sequences here are photos with questions, as a calibration of ONNX graphs has them. An expert's inputs
count by the weight that the router gave them, which is what its errors are multiplied with.
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
from molmo_edge.quantize.layer_inputs import SHARED, Walk


@torch.inference_mode()
def importance(config: MolmoConfig, tensors: TensorSource, rows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """By tensor of the GGUF (molmo_edge.checkpoints.gguf_layout): float32 [in], of experts [n_experts, in].

    `rows`: what `molmo_edge.quantize.calibration.sequences` gave. The head and the embedding are not among them:
    llama.cpp keeps more bits of the one, and nothing reads the other.
    """
    walk = Walk(config, tensors, rows)
    found: dict[str, np.ndarray] = {}
    for layer in range(config.decoder.n_layers):
        walk.go_to(layer)
        block, name = walk.block, f"blk.{layer}"
        seen = {"attn_q": _mean_squares(walk, block.attn.att_proj)}
        seen["attn_k"] = seen["attn_v"] = seen["attn_q"]
        seen["attn_output"] = _mean_squares(walk, block.attn.attn_out)
        if isinstance(block.ffn, SparseFFN):
            seen["ffn_gate_exps"], seen["ffn_down_exps"] = _experts(block.ffn, torch.cat(list(walk.inputs(block.ffn))))
            seen["ffn_up_exps"] = seen["ffn_gate_exps"]
        else:
            assert isinstance(block.ffn, DenseFFN)
            seen["ffn_gate"] = seen["ffn_up"] = _mean_squares(walk, block.ffn.ff_proj)
            seen["ffn_down"] = _mean_squares(walk, block.ffn.ff_out)
        found |= {f"{name}.{part}.weight": values.numpy() for part, values in seen.items()}
    return found


def _mean_squares(walk: Walk, module: nn.Module) -> Tensor:
    total, count = torch.zeros(()), 0
    for x in walk.scaled_inputs(module):  # one sequence at a time: all of them are many times a layer
        total, count = total + x.square().sum(0), count + len(x)
    return total / count


def _experts(ffn: SparseFFN, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of x [tokens, d_model]: what gate and up see, [n_experts, d_model], and what down sees, [n_experts, ffn_dim]."""
    weights, chosen = ffn.route(x)
    shared = x.square().mean(0)
    into, out = [], []
    for e in range(len(ffn.gate)):
        token, k = torch.nonzero(chosen == e, as_tuple=True)
        weight, mine = weights[token, k, None], x[token]
        squares = (mine * weight).square().sum(0)
        share = squares.sum() / shared.sum() if len(token) else 1.0
        into.append(squares + shared * (share * SHARED))
        if not len(token):  # as if all had chosen it: nothing is known of what it would be asked
            weight, mine = torch.ones(len(x), 1), x
        h = F.silu(F.linear(mine, ffn.gate[e])) * F.linear(mine, ffn.up[e]) * weight
        squares = h.square().sum(0)
        out.append(squares + squares.mean() * SHARED)
    return torch.stack(into), torch.stack(out)
