"""How much each layer changes its input: the measure by which layers are left out.

ShortGPT (arXiv 2403.03853): the influence of a layer is 1 minus the cosine of its input and its output, a mean over
tokens. Layers that barely turn the residual stream can be left out with the least harm, and distillation repairs the
rest. A ViT's layers are measured in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo_edge.training.distillation import DistillError
from molmo_edge.training.encoding import Batch
from molmo_edge.training.forward import Trainable


@dataclass(frozen=True)
class Influence:
    """The influence of each layer, from 0 to 2."""

    decoder: tuple[float, ...]
    vision: tuple[float, ...]  # of the blocks up to the last one whose output is used


@torch.no_grad()
def measure_influence(model: Trainable, batches: Iterable[Batch]) -> Influence:
    """Over the real tokens of `batches`, which must have crops and be on the model's device."""
    molmo = model.molmo
    blocks: list[nn.Module] = [*molmo.decoder.blocks, *molmo.vision.running]
    sums, counts = [0.0] * len(blocks), [0] * len(blocks)
    real: list[Tensor] = []

    def watch(number: int) -> None:
        def hook(_block: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            turned = 1 - F.cosine_similarity(args[0].float(), output.float(), dim=-1)
            padded = number < len(molmo.decoder.blocks) and turned.shape == real[0].shape
            turned = turned[real[0]] if padded else turned.flatten()
            sums[number] += float(turned.sum())
            counts[number] += turned.numel()

        handles.append(blocks[number].register_forward_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for number in range(len(blocks)):
        watch(number)
    try:
        for batch in batches:
            real[:] = [batch.segments >= 0]
            model.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not all(counts):
        raise DistillError("the data have no pictures or no answers: the influence of layers cannot be measured")
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    n = len(molmo.decoder.blocks)
    return Influence(tuple(means[:n]), tuple(means[n:]))


def most_influential(influence: Sequence[float], count: int, always: Iterable[int] = ()) -> tuple[int, ...]:
    """The numbers of `count` layers, rising: those of `always`, and of the others the most influential."""
    fixed = sorted({layer for layer in always if layer < len(influence)})
    least, most = max(1, len(fixed)), len(influence)
    if not least <= count <= most:
        raise DistillError(f"of {most} layers, {least} to {most} can be kept, not {count}")
    rest = sorted(set(range(len(influence))) - set(fixed), key=lambda layer: -influence[layer])
    return tuple(sorted([*fixed, *rest[: count - len(fixed)]]))
