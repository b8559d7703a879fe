"""Patch features -> decoder tokens: pad embedding, 2x2 attention pooling, SwiGLU projector.

Reference: olmo/model.py, MolmoVisionBackbone.forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo_edge.config import MolmoConfig
from molmo_edge.modeling.linear import Linear
from molmo_edge.modeling.vision import VisionAttention


class Projector(nn.Module):
    """SwiGLU without biases: w2(silu(w1 x) * w3 x). (The decoder's fused FFN has the halves the other way.)"""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int):
        super().__init__()
        self.w1 = Linear(input_dim, hidden_dim, bias=False)
        self.w2 = Linear(hidden_dim, output_dim, bias=False)
        self.w3 = Linear(input_dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Connector(nn.Module):
    def __init__(self, config: MolmoConfig):
        super().__init__()
        self.patches, self.pool = config.image.patches, config.image.pool
        vision = config.vision
        self.pad_embed = nn.Parameter(torch.zeros(2, config.feature_dim))
        self.pooling = VisionAttention(config.feature_dim, vision.d_model, vision.n_heads)
        self.projector = Projector(vision.d_model, config.projector_dim, config.decoder.d_model)

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        """features [n, patches^2, feature_dim], masks [n, patches^2] -> cells [n, cells^2, d_model].

        A mask value is the share of a patch that is image; 0 is all padding, and everything else
        below 1 counts as partial, the -1 of the shifted last row included.
        """
        padded = (masks == 0)[..., None].to(features.dtype)
        partial = ((masks < 1) & (masks != 0))[..., None].to(features.dtype)
        pad_embed = self.pad_embed.to(features.dtype)
        features = features + pad_embed[0] * padded + pad_embed[1] * partial

        (n, _, width), side, p = features.shape, self.patches // self.pool, self.pool
        groups = features.view(n, side, p, side, p, width).transpose(2, 3)  # [n, side, side, p, p, feature_dim]
        groups = groups.reshape(n * side * side, p * p, width)
        pooled = self.pooling(groups.mean(1, keepdim=True), groups)  # [n * side^2, 1, d_vision]
        cells = self.projector(pooled)
        return cells.view(n, side * side, cells.shape[-1])  # n is 0 in a batch of texts
