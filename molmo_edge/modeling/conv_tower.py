"""A convolutional tower besides the ViT: it sees the whole image once, and every patch of every crop samples it.

Prismatic (arXiv 2402.07865) and Eagle (arXiv 2408.15998) concatenate the patch features of two towers in this way.
This one is the backbone and feature pyramid of a detector, shaped like NanoDet-g (github.com/RangiLyu/nanodet,
CustomCspNet and PAN; batch norms folded into the convolutions).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo_edge.config import ConvTowerConfig
from molmo_edge.modeling.linear import Module

SLOPE = 0.1  # of the leaky ReLUs


class Stage(Module):
    """A cross-stage partial block: [n, width, h, w] -> [n, 2 * width, h / stride, w / stride]."""

    def __init__(self, width: int, steps: int, stride: int):
        super().__init__()
        half = width // 2
        self.first = nn.Conv2d(width, width, 3, stride, 1)
        self.steps = nn.ModuleList(
            nn.ModuleList([nn.Conv2d(width, half, 3, 1, 1), nn.Conv2d(half, half, 3, 1, 1)]) for _ in range(steps)
        )
        self.last = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, width, h, w] -> [n, 2 * width, h / stride, w / stride]."""
        x = y = _act(self.first(x))
        for narrowing, refining in cast("Iterable[nn.ModuleList]", self.steps):
            narrow = _act(narrowing(y))
            y = torch.cat([_act(refining(narrow)), narrow], dim=1)
        return torch.cat([_act(self.last(y)), x], dim=1)


class ConvTower(Module):
    """A convolutional network with a feature pyramid, sampled at the patches of the crops."""

    def __init__(self, config: ConvTowerConfig):
        super().__init__()
        self.config = config
        widths = [config.stem_dim << n for n in range(len(config.steps))]
        self.stem = nn.Conv2d(3, config.stem_dim, 3, 2, 1)
        self.stages = nn.ModuleList(
            Stage(width, steps, 2 if n else 1)
            for n, (width, steps) in enumerate(zip(widths, config.steps, strict=True))
        )
        dim = config.pyramid_dim
        self.lateral = nn.ModuleList(nn.Conv2d(2 * width, dim, 1) for width in widths[-3:])
        self.output = nn.ModuleList(nn.Conv2d(dim, dim, 3, 1, 1) for _ in range(3))

    def pyramid(self, pixels: Tensor) -> list[Tensor]:
        """pixels float32 [n, 3, h, w] -> maps [n, pyramid_dim, h / s, w / s] at strides s of 8, 16 and 32."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU, as on a GPU
        x = F.max_pool2d(_act(self.stem(pixels)), 3, 2, 1)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        fine, middle, coarse = (conv(x) for conv, x in zip(self.lateral, maps[-3:], strict=True))
        middle = middle + _resized(coarse, middle)  # top down
        fine = fine + _resized(middle, fine)
        middle = middle + _resized(fine, middle)  # bottom up
        coarse = coarse + _resized(middle, coarse)
        return [_act(conv(x)) for conv, x in zip(self.output, (fine, middle, coarse), strict=True)]

    def forward(self, pixels: Tensor, positions: Sequence[Tensor]) -> Tensor:
        """Features of every patch of every crop of n images, one image after the other.

        pixels: float32 [n, 3, h, w], overviews (see `crops.Overview`), padded with 0 to a common size.
        positions: per image, float32 [n_crops, patches^2, 4, 2], pixels. The level at stride 8 is sampled at the
        centres of the four quarters of a patch, the other two at its centre, bilinearly.
        Returns [crops of all images, patches^2, 6 * pyramid_dim].
        """
        levels = self.pyramid(pixels)
        size = torch.tensor(pixels.shape[:1:-1], device=pixels.device)  # width, height
        out = []
        for n, quarters in enumerate(positions):
            at = quarters / size * 2 - 1  # grid_sample's -1..1, from edge to edge
            fine, middle, coarse = (level[n : n + 1] for level in levels)
            parts = [_sample(fine, at).flatten(2), _sample(middle, at.mean(2)), _sample(coarse, at.mean(2))]
            out.append(torch.cat(parts, dim=-1))
        return torch.cat(out)


def _act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE)


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def _sample(level: Tensor, at: Tensor) -> Tensor:
    """level [1, dim, h, w], at [..., 2] in -1..1 -> [..., dim]; zeros outside of the image."""
    grid = at.reshape(1, -1, 1, 2).to(level.dtype)
    return F.grid_sample(level, grid, align_corners=False)[0, :, :, 0].T.reshape(*at.shape[:-1], -1)
