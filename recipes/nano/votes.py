"""Votes of subpatches for the detector's classes, which are linear in its pyramid.

The connector pools patches and mixes the levels of the pyramid, in which an object is visible at one level only. A vote
for each level keeps them apart. The queries are a linear map of the decoder's states, fitted by least squares: training
on a few thousand photographs loses what the detector learned from 118,000.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from molmo_edge.config import MolmoConfig
from recipes.nano.detector import COCO_NAMES

LEVELS = 3  # of the pyramid, one vote each
DIM = 96  # of a vote: the rank of the detector's classes, a constant, and zeros up to a multiple of 32
DISTANCE, DROP = 3.0, 0.75  # `peak_distance` and `peak_drop`, chosen on photographs of `val`
RIDGE = 1e-2  # of the variance of the states


def with_votes(config: MolmoConfig) -> MolmoConfig:
    """The configuration with votes."""
    assert config.point_head is not None
    head = replace(config.point_head, votes=LEVELS, vote_dim=DIM, peak_distance=DISTANCE, peak_drop=DROP)
    return replace(config, point_head=head)


def detector_votes(config: MolmoConfig, classes: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias of the keys, and the queries of COCO_NAMES [80, votes * dim].

    classes: weight [80, pyramid_dim] and bias [80] of the detector's classes at each level, finest first. The finest
    level has four samples in a patch, whose mean is used.
    """
    tower = config.conv_tower
    assert tower is not None
    width = tower.pyramid_dim
    weight, bias = torch.zeros(LEVELS, DIM, config.feature_dim), torch.zeros(LEVELS, DIM)
    queries = torch.zeros(len(COCO_NAMES), LEVELS, DIM)
    samples = torch.eye(6)
    shares = (samples[:4].mean(0), samples[4], samples[5])
    for level, ((matrix, offsets), share) in enumerate(zip(classes, shares, strict=True)):
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)  # [80, r], [r], [r, pyramid_dim]
        rank, root = len(sizes), sizes.sqrt()
        weight[level, :rank, -6 * width :] = torch.einsum("rw,s->rsw", root[:, None] * right, share).flatten(1)
        queries[:, level, :rank] = left * root
        bias[level, constant(config)] = 1.0  # a key that is always 1: its query is the offset
        queries[:, level, constant(config)] = offsets
    return weight.flatten(0, 1), bias.flatten(), queries.flatten(1)


def constant(config: MolmoConfig) -> int:
    """The dimension of a vote whose key is always 1."""
    assert config.conv_tower is not None
    return min(len(COCO_NAMES), config.conv_tower.pyramid_dim)


def fitted(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the linear map from inputs [n, d] to outputs [n, m] with the least squared error."""
    x, y = inputs.double(), outputs.double()
    mean, centre = x.mean(0), y.mean(0)
    x, y = x - mean, y - centre
    penalty = RIDGE * x.square().mean() * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(x.T @ x + penalty, x.T @ y).T
    left = (y - x @ weight.T).square().sum() / y.square().sum()
    print(f"queries of votes: {len(x)} states, {1 - float(left):.3f} of the variance explained")
    return weight.float(), (centre - weight @ mean).float()
