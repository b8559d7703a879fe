"""Patch features -> image features: padding embedding, attention pooling, SwiGLU projector.

Reference: olmo/model.py, MolmoVisionBackbone.forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo_edge.config import MolmoConfig
from molmo_edge.modeling.linear import Linear, Module
from molmo_edge.modeling.vision import VisionAttention


class Projector(Module):
    """SwiGLU without biases: w2(silu(w1 x) * w3 x). The halves of the decoder's fused FFN are the other way round."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int):
        super().__init__()
        self.w1 = Linear(input_dim, hidden_dim, bias=False)
        self.w2 = Linear(hidden_dim, output_dim, bias=False)
        self.w3 = Linear(input_dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., input_dim] -> [..., output_dim]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Connector(Module):
    """Pools the features of each cell's patches by attention and projects them to the decoder's width."""

    def __init__(self, config: MolmoConfig):
        super().__init__()
        self.image, vision = config.image, config.vision
        self.pad_embed = nn.Parameter(torch.zeros(2, config.feature_dim)) if config.pad_embed else None
        self.pooling = VisionAttention(
            config.feature_dim, vision.d_model, config.pooling_heads or vision.n_heads, output=config.pooling_output
        )
        self.projector = Projector(vision.d_model, config.projector_dim, config.decoder.d_model)

    def forward(self, features: Tensor, masks: Tensor, pooling: Tensor | None = None) -> Tensor:
        """features [n, patches^2, feature_dim], masks [n, patches^2] -> image features [n, cells^2, d_model].

        A mask value is the share of a patch that is image, see `add_padding`.
        pooling: int [m, pool^2], for a model that pools across crops: the patches of each cell as indices into the
        patches of all n crops, -1 for none. The result is [m, d_model] then. Raises ValueError if they are missing.
        """
        if self.pad_embed is not None:
            features = self.add_padding(features, masks, self.pad_embed.to(features.dtype))
        if self.image.pools_across_crops:
            if pooling is None:
                raise ValueError("this model pools across crops: the connector needs the patches of each cell")
            there = pooling >= 0
            groups = features.flatten(0, 1)[pooling.clamp(min=0)] * there[..., None].to(features.dtype)
            query = groups.sum(1, keepdim=True) / there.sum(1)[:, None, None]
            return self.projector(self.pooling(query, groups, there))[:, 0]
        (n, _, width), side, p = features.shape, self.image.cells, self.image.pool
        groups = features.view(n, side, p, side, p, width).transpose(2, 3)  # [n, side, side, p, p, feature_dim]
        groups = groups.reshape(n * side * side, p * p, width)
        pooled = self.pooling(groups.mean(1, keepdim=True), groups)  # [n * side^2, 1, d_vision]
        projected = self.projector(pooled)
        return projected.view(n, side * side, projected.shape[-1])  # n is 0 in a batch of texts

    def add_padding(self, features: Tensor, masks: Tensor, pad_embed: Tensor) -> Tensor:
        """Add pad_embed[0] to patches without image (mask 0), pad_embed[1] to those that are partly padding.

        Every other value below 1 counts as partial, also the -1 of the shifted last row.
        """
        padded = (masks == 0)[..., None].to(features.dtype)
        partial = ((masks < 1) & (masks != 0))[..., None].to(features.dtype)
        return features + pad_embed[0] * padded + pad_embed[1] * partial
