"""FLOPs of a batch and of a device: model FLOPs utilisation (PaLM, arXiv 2204.02311).

The count covers the matrix products of the forward pass, the gradients of activations and the gradients of trained
weights; only the experts that a token uses, and the head only at answers. Recomputation and padding are not counted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from molmo_edge.config import MolmoConfig, VisionConfig
from molmo_edge.training.encoding import Batch


@dataclass(frozen=True)
class Cost:
    """FLOPs of the forward pass."""

    token: int  # of the decoder, without head and attention scores
    answer: int  # of the head, per position that predicts a token of an answer
    pair: int  # of attention, per query and key that it attends to
    crop: int  # of the ViTs
    cells: int  # of the connector, per crop

    def forward(self, batch: Batch) -> float:
        """FLOPs of the forward pass of a batch, without padding and, with cached features, without the ViTs."""
        real = batch.segments >= 0
        tokens, answers = float(real.sum()), float((batch.weights > 0).sum())
        pairs = 0.0
        for row, (segments, n) in enumerate(zip(batch.segments, batch.lengths, strict=True)):
            counts = segments[:n].unique(return_counts=True)[1].tolist()
            *texts, block = counts  # the image's segment is the largest; of a text alone it is BOS
            pairs += block * (block + 1) / 2 if batch.block is None else int(batch.block[row].sum()) ** 2
            pairs += sum(m * block + m * (m + 1) / 2 for m in texts)
        crop = self.cells + (self.crop if batch.features is None else 0)
        return self.token * tokens + self.answer * answers + self.pair * pairs + crop * len(batch.crops)


def cost(config: MolmoConfig) -> Cost:
    """The costs of a model with this configuration."""
    d, v, image = config.decoder, config.vision, config.image
    attention = d.d_model * (d.q_dim + 2 * d.kv_dim) + d.q_dim * d.d_model
    ffn = 3 * d.d_model * d.ffn_dim * max(1, d.top_k) + d.d_model * d.n_experts
    patches, cells = image.patches**2, image.cells**2
    vits = sum(_vit(vit) for vit in config.vits)
    pooling = cells * (config.feature_dim * v.d_model + v.d_model**2) + 2 * patches * config.feature_dim * v.d_model
    projector = cells * (2 * v.d_model * config.projector_dim + config.projector_dim * d.d_model)
    return Cost(
        token=2 * d.n_layers * (attention + ffn),
        answer=2 * d.d_model * d.n_logits,
        pair=4 * d.n_layers * d.q_dim,
        crop=2 * vits,
        cells=2 * (pooling + projector),
    )


def _vit(v: VisionConfig) -> int:
    """Multiplications for one crop."""
    block = 4 * v.d_model**2 + 2 * v.d_model * v.mlp_dim
    patches = v.n_patches * 3 * v.patch_size**2 * v.d_model
    return patches + (v.last_layer + 1) * v.n_pos * (block + 2 * v.n_pos * v.d_model)


def passes(model: nn.Module) -> float:
    """The cost of a step in forward passes: 3, or little more than 2 if most weights are frozen."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return 2 + sum(n for n, trained in sizes if trained) / sum(n for n, _ in sizes)


def device_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Measured FLOPs per second of large matrix products of `dtype`."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until or not best:
        _wait(device)
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        _wait(device)
        best = max(best, 4 * 2 * n**3 / (time.perf_counter() - start))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
