"""Train the scales of four-bit weights against the float32 model, as DWQ and AutoRound (arXiv 2309.05516) do.

The codes stay as they were rounded, and so do the graph, its size and its speed: the scale of each block is multiplied
by a factor. The factors are learned from the KL divergence of the float32 decoder's next-token distributions at all
positions of calibration prompts. The distributions at image tokens name no words that anybody reads, but there are ten
times as many of them: learned from the answers alone, the factors of nano fit the few answers, and others get worse.

A fourth of the prompts is held out. Of all passes over the others, the factors of the pass with the least divergence on
the held-out answers (or questions, of prompts without an answer) are kept. If none is better, the scales do not change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from molmo_edge.checkpoints.tensor_names import hub_layout
from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.modeling.decoder import Decoder, image_attention_mask
from molmo_edge.modeling.linear import Module
from molmo_edge.modeling.weights import load_part
from molmo_edge.quantize import QuantizeError
from molmo_edge.quantize.calibration_prompts import DecoderInput
from molmo_edge.quantize.rounding import Blocks

_COPIES = 4  # of the decoder in float32 that are in memory
RATE = 2e-3  # of Adam, for the logarithm of a factor; it falls to 0 along a cosine
_BATCH = 4  # prompts
_HELD_OUT = 4  # one prompt in this many
_LOGITS = 4  # float32 copies of a prompt's logits while its gradients are computed, at least
_LEAST = -6e4  # float16's least finite number is -65504
_EXPERT = re.compile(r"\.experts\.\d+\.")


def memory_needed(config: MolmoConfig, weights: int, lengths: Iterable[int]) -> int:
    """The bytes that `train_scales` takes at least, for a decoder of `weights` and prompts of `lengths` positions."""
    rows = [max(0, length - 1) for length in lengths]
    logits = config.decoder.n_logits * (2 * sum(rows) + 4 * _LOGITS * max(rows, default=0))
    return 4 * _COPIES * weights + logits


def train_scales(
    config: MolmoConfig,
    tensors: TensorSource,
    inputs: Sequence[DecoderInput],
    rounded: Mapping[str, Blocks],
    passes: int,
    *,
    seed: int = 0,
    on_pass: Callable[[int, float], None] = lambda _n, _kl: None,
) -> dict[str, Blocks]:
    """The matrices of `rounded` (hub names without ".weight", of the decoder's `tensors`) with trained scales.

    Memory holds the decoder in float32 four times and the distributions at all positions of `inputs` in float16, see
    `memory_needed`. The result is the same for the same seed and number of threads; without a matrix of the decoder
    among `rounded`, it is `rounded`.

    Args:
        inputs: Of calibration_prompts.embed_prompts; at least two.
        passes: Over the prompts that are not held out.
        on_pass: Called with the number of a pass, from 0 for the untrained scales, and its divergence on the held-out
            answers.

    Raises QuantizeError if there are fewer than two prompts.
    """
    if len(inputs) < 2:
        raise QuantizeError(
            f"training scales takes at least two prompts, one of which is held out, but got {len(inputs)}: add photos "
            "to the folder of calibrate"
        )
    decoder = cast(Decoder, load_part(config, tensors, "decoder")).requires_grad_(False)
    exact = _TextLogits(decoder)
    shapes = {name: parameter.shape for name, parameter in exact.named_parameters()}
    weights = _Weights(config, rounded, shapes)
    if not weights.names:
        return dict(rounded)
    with torch.no_grad():
        prompts = [_Prompt.of(config, one, exact) for one in inputs]
    held_out = prompts[::_HELD_OUT]
    taught = [prompt for i, prompt in enumerate(prompts) if i % _HELD_OUT]
    optimizer = torch.optim.Adam(weights.parameters(), lr=RATE)
    steps = passes * -(-len(taught) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    generator = torch.Generator().manual_seed(seed)

    def divergence(parameters: dict[str, Tensor], prompt: _Prompt) -> Tensor:
        """Of each position."""
        found = functional_call(exact, parameters, (prompt.x, prompt.mask, prompt.at))
        exact_ = prompt.exact.float()
        return F.kl_div(F.log_softmax(found, -1), exact_, log_target=True, reduction="none").sum(-1)

    def measure() -> float:
        with torch.no_grad():
            parameters = weights.restored()
            return float(
                np.mean([float(divergence(parameters, prompt)[-prompt.words :].mean()) for prompt in held_out])
            )

    least, best = measure(), weights.copied()
    on_pass(0, least)
    for number in range(1, passes + 1):
        order = torch.randperm(len(taught), generator=generator).tolist()
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            optimizer.zero_grad()
            restored = weights.restored()
            parameters = {name: matrix.detach().requires_grad_() for name, matrix in restored.items()}
            for i in batch:  # the gradients of the matrices add up, and go on to the factors once
                (divergence(parameters, taught[i]).mean() / len(batch)).backward()
            torch.autograd.backward(list(restored.values()), [_gradient(matrix) for matrix in parameters.values()])
            optimizer.step()
            schedule.step()
        found = measure()
        on_pass(number, found)
        if found < least:
            least, best = found, weights.copied()
    return weights.blocks(best)


def _gradient(matrix: Tensor) -> Tensor:
    """Zeros for a matrix that no prompt of a batch uses."""
    return torch.zeros_like(matrix) if matrix.grad is None else matrix.grad


class _TextLogits(Module):
    """The logits at some positions of a prompt."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor, mask: Tensor | None, at: Tensor) -> Tensor:
        """x [1, n, d_model], at int [m] -> [m, n_logits]."""
        return self.decoder.logits(self.decoder(x, mask=mask)[0, at])


@dataclass(frozen=True)
class _Prompt:
    x: Tensor  # [1, n, d_model]
    mask: Tensor | None  # of the attention; None: causal
    at: Tensor  # int [m], the positions that are compared
    words: int  # the last ones, this many, measure a pass: those that predict the answer
    exact: Tensor  # float16 [m, n_logits], the logarithms of the float32 model's probabilities

    @classmethod
    def of(cls, config: MolmoConfig, one: DecoderInput, exact: _TextLogits) -> _Prompt:
        x, image = torch.from_numpy(np.ascontiguousarray(one.embeddings, np.float32))[None], torch.from_numpy(one.image)
        mask = image_attention_mask(image[None]) if config.decoder.bidirectional_images else None
        at = torch.arange(1, len(image))  # without BOS, whose next token is always the image
        words = one.answer + 1 if one.answer else int((~image).sum()) - 1  # from the token that predicts its first one
        return cls(x, mask, at, words, F.log_softmax(exact(x, mask, at), -1).clamp(min=_LEAST).half())


class _Weights(nn.Module):
    """The rounded matrices as parameters of `_TextLogits`, with the logarithm of a factor for each block."""

    def __init__(self, config: MolmoConfig, rounded: Mapping[str, Blocks], shapes: Mapping[str, torch.Size]) -> None:
        super().__init__()
        self._rounded, self._shapes = rounded, shapes
        self._slots: dict[str, list[str]] = {}  # parameter -> the matrices that fill it
        for parameter, hubs in hub_layout(config).items():
            names = [hub.removesuffix(".weight") for hub in hubs]
            wide = _EXPERT.sub(".experts.", names[0])  # the experts of a layer as one matrix
            if parameter in shapes and (names[0] in rounded or wide in rounded):
                self._slots[parameter] = names if names[0] in rounded else [wide]
        self.names = [name for names in self._slots.values() for name in names]
        self._base = {name: torch.from_numpy(rounded[name].restored()) for name in self.names}
        self.factors = nn.ParameterList(torch.zeros(rounded[name].scale.shape) for name in self.names)

    def restored(self) -> dict[str, Tensor]:
        """The parameters that were rounded, in the shapes of the decoder's own."""
        factors = dict(zip(self.names, self.factors, strict=True))
        found = {}
        for parameter, names in self._slots.items():
            shape = self._shapes[parameter]
            matrices = []
            for name in names:
                factor = factors[name].exp()[..., None]
                matrices.append((self._base[name].view(*factor.shape[:-1], -1) * factor).flatten(-2))
            if len(shape) == 3 and len(names) == 1 and parameter.endswith(".down"):  # [d, experts * ffn]
                rows = matrices[0][:, : shape[0] * shape[2]]
                found[parameter] = rows.reshape(shape[1], shape[0], shape[2]).transpose(0, 1)
                continue
            width = shape[-1]  # without the columns that fill the last block
            stacked = matrices[0] if len(names) == 1 else torch.stack(matrices)
            found[parameter] = stacked[..., :width].reshape(shape)
        return found

    def copied(self) -> list[np.ndarray]:
        """The factors of all matrices."""
        return [factor.detach().exp().numpy() for factor in self.factors]

    def blocks(self, factors: Sequence[np.ndarray]) -> dict[str, Blocks]:
        """All matrices that were rounded, with these factors."""
        changed = {
            name: replace(self._rounded[name], scale=self._rounded[name].scale * factor)
            for name, factor in zip(self.names, factors, strict=True)
        }
        return {**self._rounded, **changed}
