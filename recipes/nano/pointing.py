"""The two heads of nano that find objects: that of the heat maps, which is only trained, and the grounding head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from molmo_edge.config import MolmoConfig, PointHeadConfig
from molmo_edge.data.annotated_photos import Photo
from molmo_edge.frontend.crops import ImageProcessor
from molmo_edge.modeling import Molmo, load_checkpoint, save_checkpoint
from molmo_edge.system.files import atomic_write, replaced_directory
from molmo_edge.training.features import encode_pictures
from molmo_edge.training.forward import Trainable
from molmo_edge.training.regions import HeatMapHead

HEAT_MAPS = "heat_maps.safetensors"  # the heat maps' head, in the directory of a finished stage


def save_heat_maps(model: Trainable, directory: Path) -> None:
    """Write the heat maps' head, with which a run of "answers" can begin."""
    assert model.heat_maps is not None
    with atomic_write(directory / HEAT_MAPS) as part:
        save_file(model.heat_maps.state_dict(), part)


def load_heat_maps(model: Trainable, file: Path) -> None:
    """Read the heat maps' head of the stage before."""
    assert model.heat_maps is not None
    model.heat_maps.load_state_dict(load_file(file))


def with_point_head(config: MolmoConfig) -> MolmoConfig:
    """The configuration with three marker tokens after the special ones, and three tokens for a point."""
    first = config.decoder.embedding_size + 5
    head = PointHeadConfig(first, first + 1, first + 2, dim=256, numbered=False)
    return replace(config, decoder=replace(config.decoder, additional_head=True), point_head=head)


@torch.no_grad()
def add_point_head(start: Path, heat_maps: Path, photos: list[Photo], out: Path, seed: int = 0) -> None:
    """Write the checkpoint `start` with a grounding head to `out`.

    The keys of patches begin as those of the heat maps' cells, from the file `heat_maps`: the residual stream of an
    image token contains its cell. The matrices that take features are random, for the standardised features of
    `photos`.
    """
    before, _, config = load_checkpoint(start)
    config = with_point_head(config)
    model = Molmo(config).init_weights(generator=torch.Generator().manual_seed(seed))
    left = model.load_state_dict(before.state_dict(), strict=False)
    assert not left.unexpected_keys
    head, generator = model.point_head, torch.Generator().manual_seed(seed)
    assert head is not None
    std, new_head = float(model.decoder.embedding.std()), model.decoder.new_head
    new_head.weight.copy_(torch.randn(new_head.weight.shape, generator=generator) * std)
    sight = HeatMapHead(config)
    sight.load_state_dict(load_file(heat_maps))
    norm, linear = sight.cell
    _fill(head.patch_k, *_centred(norm, linear))
    mean, scale = feature_scale(before, photos)
    for matrix, size in ((head.subpatch_k, 1.0), (head.patch_embedding, std)):
        weight = size * torch.randn(matrix.weight.shape, generator=generator) / len(mean) ** 0.5 / scale
        _fill(matrix, weight, -(weight @ mean))
    for matrix in (head.patch_q, head.subpatch_q):
        weight = torch.randn(matrix.weight.shape, generator=generator) / matrix.weight.shape[1] ** 0.5
        _fill(matrix, weight, torch.zeros(len(weight)))
    with replaced_directory(out) as part:
        save_checkpoint(model, start / "tokenizer.json", part)


def _centred(norm: nn.Module, linear: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of `linear` after the LayerNorm `norm`, for inputs that have been divided by their own size."""
    weight, gain, shift = linear.weight, norm.weight, norm.bias
    assert isinstance(weight, Tensor)
    assert isinstance(gain, Tensor)
    assert isinstance(shift, Tensor)
    scaled = weight * gain
    return scaled - scaled.mean(1, keepdim=True), weight @ shift + linear.bias


def _fill(linear: nn.Module, weight: Tensor, bias: Tensor) -> None:
    for parameter, values in ((linear.weight, weight), (linear.bias, bias)):
        assert isinstance(parameter, Tensor)
        parameter.copy_(values)


def feature_scale(model: Molmo, photos: list[Photo]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the towers' features, [feature_dim] each, on global views."""
    processor = ImageProcessor(replace(model.config.image, max_crops=0))
    prepared = [processor(photo.rgb()) for photo in photos]
    features = torch.cat([encode_pictures(model, [one], torch.device("cpu")) for one in prepared]).flatten(0, 1)
    return features.mean(0), features.std(0).clamp(min=1e-3)
