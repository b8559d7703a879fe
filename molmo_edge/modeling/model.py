"""The whole model: vision towers, connector and decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from molmo_edge.config import MolmoConfig
from molmo_edge.modeling.connector import Connector
from molmo_edge.modeling.conv_tower import ConvTower
from molmo_edge.modeling.decoder import Decoder
from molmo_edge.modeling.linear import Module
from molmo_edge.modeling.point_head import PointHead
from molmo_edge.modeling.vision import VisionTransformer


class Molmo(Module):
    """Reference: olmo/model.py, Molmo. `SparseFFN` leaves weights uninitialised: load or `init_weights`."""

    def __init__(self, config: MolmoConfig):
        super().__init__()
        self.config = config
        self.precision = "fp32"  # of the weights, see modeling/precision.py
        self.vision = VisionTransformer(config.vision)
        self.extra_vision = nn.ModuleList(VisionTransformer(vit) for vit in config.extra_vision)
        self.conv_tower = ConvTower(config.conv_tower) if config.conv_tower else None
        self.connector = Connector(config)
        self.decoder = Decoder(config.decoder)
        self.point_head = PointHead(config, config.point_head) if config.point_head else None

    def init_weights(self, std: float = 0.02, generator: torch.Generator | None = None) -> Molmo:
        """Normal(0, std) for matrices, ones for norms and LayerScale, zeros for biases."""
        for name, parameter in self.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=std, generator=generator)
            else:
                nn.init.constant_(parameter, 1.0 if leaf in ("weight", "lambda1", "lambda2") else 0.0)
        return self

    def vit_features(self, crops: Tensor) -> Tensor:
        """crops float32 [n, patches^2, 588] -> the features of all ViTs, [n, patches^2, sum of their feature_dim]."""
        features = [self.vision(crops), *(vit(crops) for vit in self.extra_vision)]
        return features[0] if len(features) == 1 else torch.cat(features, dim=-1)

    def encode_image(
        self,
        crops: Tensor,
        masks: Tensor,
        pixels: Tensor | None = None,
        positions: Sequence[Tensor] = (),
        pooling: Tensor | None = None,
    ) -> Tensor:
        """crops float32 [n, patches^2, 588], masks float32 [n, patches^2] -> [n, cells^2, d_model].

        pixels, positions: the overviews that a convolutional tower needs, as in `ConvTower.forward`.
        pooling: the patches of each cell, for a model that pools across crops, as in `Connector.forward`.
        """
        features = self.vit_features(crops)
        if self.conv_tower is not None:
            if pixels is None:
                raise ValueError("this model has a convolutional tower: encode_image needs the overview's pixels")
            features = torch.cat([features, self.conv_tower(pixels, positions).to(features.dtype)], dim=-1)
        return self.connector(features, masks, pooling)

    def embed(self, ids: Tensor, cells: Tensor | None = None, token_index: Tensor | None = None) -> Tensor:
        """Token embeddings with image features ADDED at the <im_patch> positions (reference: Molmo.forward).

        ids: int [batch, n]; cells: [batch, n_crops, cells^2, d_model]; token_index: int
        [batch, n_crops, cells^2], the position of each cell in ids, negative if another crop keeps it.
        A model that pools across crops has [batch, n_cells, ...] for [batch, n_crops, cells^2, ...].
        Returns [batch, n, d_model].
        """
        x = self.decoder.embed(ids)
        if cells is None or token_index is None:
            return x
        index = token_index.flatten(1)  # [batch, n_crops * cells^2]
        kept = index >= 0
        rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(index)[kept]
        return x.index_put((rows, index[kept]), cells.flatten(1, -2)[kept].to(x.dtype), accumulate=True)

    def forward(
        self,
        ids: Tensor,
        crops: Tensor | None = None,
        masks: Tensor | None = None,
        token_index: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [batch, n, d_model]; `decoder.logits` turns them into logits.

        ids int [batch, n]; crops float32 [batch, n_crops, patches^2, 588]; the rest as in `embed` and
        `Decoder.forward`.
        """
        cells = None
        if crops is not None and masks is not None:
            cells = self.encode_image(crops.flatten(0, 1), masks.flatten(0, 1))
            cells = cells.view(*crops.shape[:2], *cells.shape[1:])
        return self.decoder(self.embed(ids, cells, token_index), positions, mask)
