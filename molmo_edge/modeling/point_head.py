"""MolmoPoint's grounding head: projections that choose a patch, a subpatch and a location by dot products.

Reference: PointPredictor of hf_model/modeling_molmo_point.py in allenai/molmo2. The computation after the projections
does not depend on the engine: see runtimes/grounding.py. Votes are not in the reference: see runtimes/peaks.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from molmo_edge.config import MolmoConfig, PointHeadConfig
from molmo_edge.modeling.decoder import RMSNorm
from molmo_edge.modeling.linear import Linear, Module


class PointHead(Module):
    """The projections of the grounding head, and the key `no_more` that ends an answer's points."""

    def __init__(self, config: MolmoConfig, point: PointHeadConfig):
        super().__init__()
        d, features = config.decoder.d_model, config.feature_dim
        self.x_norm = RMSNorm(d, config.decoder.norm_eps)
        self.patch_q = Linear(d, point.dim)
        self.patch_k = Linear(d, point.dim)
        self.subpatch_q = Linear(d, point.dim)
        self.subpatch_k = Linear(features, point.dim)
        self.location = Linear(d, point.n_locations)
        self.no_more = nn.Parameter(torch.zeros(point.dim))
        self.patch_embedding = Linear(features, d)
        if point.votes:
            self.vote_q = Linear(d, point.votes * point.vote_dim + 1)
            self.vote_k = Linear(features, point.votes * point.vote_dim)

    def project(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States before the decoder's final norm [n, d_model] -> queries and keys.

        Returns the query of a patch, the key as a patch and the query of a subpatch, [n, dim] each, and the logits of
        the locations [n, n_locations].
        """
        normed = self.x_norm(state)
        return self.patch_q(normed), self.patch_k(normed), self.subpatch_q(normed), self.location(state)

    def project_features(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """ViT features of single patches [n, feature_dim] -> keys [n, dim], and token embeddings [n, d_model]."""
        return self.subpatch_k(features), self.patch_embedding(features)

    def vote_queries(self, state: Tensor) -> Tensor:
        """States before the decoder's final norm [n, d_model] -> [n, votes * vote_dim + 1].

        Those are the queries of the votes, and an offset of the patches' own scores.
        """
        return self.vote_q(self.x_norm(state))

    def vote_keys(self, features: Tensor) -> Tensor:
        """ViT features of single patches [n, feature_dim] -> keys of votes [n, votes * vote_dim]."""
        return self.vote_k(features)
