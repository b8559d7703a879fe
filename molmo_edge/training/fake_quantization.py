"""Quantization-aware training: the forward pass sees the weights as an ONNX bundle will store them.

Before a step every matrix is replaced by its rounded values, and after the backward pass by its own values again, to
which the gradients are applied (straight-through estimator, arXiv 1308.3432). Formats, blocks and scales are those of
the exporter (molmo_edge.export), and the rounded values equal those of a bundle exactly that is exported without
calibration and rotation. The rounding of inputs at run time is not simulated, and cached features of the towers
(features.py) come from unrounded weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo_edge.checkpoints.tensor_names import hub_layout
from molmo_edge.config import MolmoConfig
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.modeling.model import Molmo
from molmo_edge.quantize.rounding import CLIPS, HIGHEST, MIDDLE
from molmo_edge.training.parallel import is_sharded, local_part

QAT_PRECISIONS = ("int8", "q8", "q4", "mixed")
Rounding = Callable[[Tensor], Tensor]


class QatError(MolmoEdgeError):
    """A model whose rounding cannot be simulated."""


@dataclass(frozen=True)
class Qat:
    """The precision of the bundle that a run trains for."""

    precision: str  # one of QAT_PRECISIONS
    share: float = 1.0  # of the steps, at the end of the run

    def __post_init__(self) -> None:
        if self.precision not in QAT_PRECISIONS:
            known = ", ".join(QAT_PRECISIONS)
            raise QatError(f'training for the precision "{self.precision}" is not supported (supported: {known})')
        if not 0 < self.share <= 1:
            raise QatError(f"the share of steps with rounded weights must be above 0 and at most 1, not {self.share}")

    def active(self, step: int, steps: int) -> bool:
        """Whether weights are rounded in step 0, 1, ..., `steps` - 1."""
        return step >= round((1 - self.share) * steps)


# --- rounding, as molmo_edge.export does it in numpy -----------------------------------------------------------------


def round_rows(rows: Tensor) -> Tensor:
    """[..., d] with one scale per row in eight bits: `int8_graph.quantize_rows`."""
    return _eight_bits(rows, rows.abs().amax(-1))


def round_channels(weight: Tensor) -> Tensor:
    """[..., out, in] with one scale per output channel in eight bits: `int8_graph.quantize_channels`."""
    pairs = F.pad(weight, (0, weight.shape[-1] % 2)).unflatten(-1, (-1, 2))
    positive, negative = ((sign * pairs).clamp(min=0).sum(-1).amax(-1) for sign in (1, -1))
    return _eight_bits(weight, torch.maximum(positive, negative))


def _eight_bits(rows: Tensor, largest: Tensor) -> Tensor:
    from molmo_edge.export.int8_graph import LEVELS

    scale = (largest.clamp(min=1e-30) / LEVELS)[..., None]
    return (rows / scale).round().clamp(-LEVELS, LEVELS) * scale


def round_q8(weight: Tensor) -> Tensor:
    """[..., in] with one scale per 32 weights in eight bits: `int8_graph.q8_linear`."""
    from molmo_edge.export.int8_graph import BLOCK

    width = weight.shape[-1]
    blocks = F.pad(weight, (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    return round_rows(blocks).flatten(-2)[..., :width]


def round_q4(weight: Tensor, block: int, scales: torch.dtype = torch.float32) -> Tensor:
    """[..., in] with one scale per `block` weights in four bits: `quantize.rounding.nearest`, symmetric.

    scales: the dtype that scales are stored in.
    """
    width = weight.shape[-1]
    blocks = F.pad(weight, (0, -width % block)).unflatten(-1, (-1, block))
    size = blocks.abs()
    # The first of several largest, as numpy's argmax.
    number = torch.arange(block, device=weight.device)
    at = torch.where(size == size.amax(-1, keepdim=True), number, block).amin(-1, keepdim=True)
    largest = blocks.gather(-1, at)
    best = least = None
    for clip in CLIPS if block > 32 else CLIPS[:1]:
        scale = largest * float(np.float32(clip / -MIDDLE))
        codes = (blocks / torch.where(scale == 0, 1.0, scale)).round().add(MIDDLE).clamp(0, HIGHEST) - MIDDLE
        exact = codes * scale
        cost = (exact - blocks).square().sum(-1, keepdim=True, dtype=torch.float64)
        stored = codes * scale.to(scales).float()
        if best is None or least is None:
            best, least = stored, cost
        else:
            better = cost < least
            best, least = torch.where(better, stored, best), torch.where(better, cost, least)
    assert best is not None
    rows: Tensor = best.flatten(-2)
    return rows[..., :width]


# --- which parameter is rounded in which way -------------------------------------------------------------------------


def roundings(config: MolmoConfig, precision: str) -> dict[str, Rounding]:
    """Parameter of `modeling.Molmo` -> how a bundle in `precision` rounds it; the others stay as they are.

    A ViT's LayerScale is not considered here, see `rounded`. Raises QatError.
    """
    from molmo_edge.export.int4_graph import BLOCK, expert_block
    from molmo_edge.export.precisions import ONNX_PRECISIONS, decoder_part, onnx_bundle

    d = config.decoder
    if d.weight_tying:
        raise QatError("the embedding of this model is also its head, which a bundle rounds in two ways: not supported")
    bundle = onnx_bundle(precision)
    linears: dict[str, Rounding] = {"int8": round_channels, "q8": round_q8, "q4": partial(round_q4, block=BLOCK)}
    found: dict[str, Rounding] = {}
    for name, slot in hub_layout(config).items():
        component = _component(name, config)
        if component is None:
            continue
        chosen = ONNX_PRECISIONS[bundle[component]]
        if component == "embed_tokens":
            if chosen.table == "int8":
                found[name] = round_rows
            continue
        form = chosen.formats[decoder_part(slot[0].removesuffix(".weight"))]
        if form == "fp32":
            continue
        found[name] = linears[form]
        if ".ffn." not in name or name.endswith(".weight") or component != "decoder":
            continue
        block = expert_block(d) if d.top_k < d.n_experts else None  # else exported without QMoE
        if form == "q4" and block is not None:
            found[name] = partial(round_q4, block=block, scales=torch.float16)
        elif name.endswith(".ffn.down") and is_wide(config):
            found[name] = partial(_side_by_side, linears[form])
    return found


def is_wide(config: MolmoConfig) -> bool:
    """Whether an export without QMoE stores all experts of a layer as one matrix."""
    from molmo_edge.export.experts_graph import WIDE_BELOW

    d = config.decoder
    return 3 * d.n_experts * d.ffn_dim * d.d_model <= WIDE_BELOW


def _side_by_side(rounding: Rounding, down: Tensor) -> Tensor:
    """down [e, d, ffn] rounded as one matrix [d, e * ffn]."""
    wide = rounding(down.transpose(0, 1).flatten(1))
    split: Tensor = wide.unflatten(1, (down.shape[0], -1))
    return split.transpose(0, 1)


def _component(name: str, config: MolmoConfig) -> str | None:
    """The component of a bundle in which a parameter is a matrix that is rounded; None for all others."""
    part, _, rest = name.partition(".")
    if part == "decoder":
        if rest in ("embedding", "new_embedding"):
            return "embed_tokens"
        matrices = ("att_proj.weight", "attn_out.weight", "ff_proj.weight", "ff_out.weight", "head.weight")
        experts = ("ffn.gate", "ffn.up", "ffn.down", "router.weight")
        return "decoder" if rest.endswith((*matrices, *experts)) else None
    if part == "connector":
        return "connector" if rest.endswith(".weight") else None
    if part != "vision" or not rest.endswith(".weight"):
        return None
    if rest.startswith("blocks.") and int(rest.split(".")[1]) > config.vision.last_layer:
        return None
    is_matrix = rest == "patch_embedding.weight" or ".attention." in rest or ".feed_forward." in rest
    return "vision_encoder" if is_matrix else None


def _scale_of(molmo: Molmo, name: str) -> Tensor | None:
    """The LayerScale that an export folds into a matrix [out], or None."""
    if not molmo.config.vision.parts.layer_scale or not name.startswith("vision.blocks."):
        return None
    block = ".".join(name.split(".")[:3])
    which = {"attention.wo.weight": "lambda1", "feed_forward.w2.weight": "lambda2"}.get(name.removeprefix(f"{block}."))
    return None if which is None else molmo.get_parameter(f"{block}.{which}")


class Rounded:
    """Replaces the weights of a model by their rounded values and back."""

    def __init__(self, molmo: Molmo, precision: str):
        """Raises QatError for a model that cannot be rounded, or whose experts are on several ranks and one matrix."""
        self._molmo, self._roundings = molmo, roundings(molmo.config, precision)
        for name, rounding in self._roundings.items():
            if is_sharded(molmo.get_parameter(name)) and getattr(rounding, "func", None) is _side_by_side:
                raise QatError("the experts of this model are rounded as one matrix, which several ranks cannot do")

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Within the block, the model has rounded weights."""
        own = self._round()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, values in own:
                    parameter.copy_(values)

    @torch.no_grad()
    def _round(self) -> list[tuple[Tensor, Tensor]]:
        """Round in place; returns this rank's parts of parameters with their own values. Shards are whole rows."""
        own = []
        for name, rounding in self._roundings.items():
            parameter = local_part(self._molmo.get_parameter(name))
            if not parameter.numel():  # an empty shard
                continue
            own.append((parameter, parameter.clone()))
            scale = _scale_of(self._molmo, name)
            parameter.copy_(rounding(parameter) if scale is None else _scaled(rounding, parameter, local_part(scale)))
        return own


def _scaled(rounding: Rounding, weight: Tensor, scale: Tensor) -> Tensor:
    """Round weight [out, in] * scale [out], and undo the scale; rows with the scale 0 stay."""
    factor = torch.where(scale == 0, 1.0, scale)[:, None]
    return rounding(weight * factor) / factor


def rounded_parameters(molmo: Molmo, precision: str) -> Mapping[str, Tensor]:
    """The rounded parameters as a bundle stores them, LayerScale included."""
    found = {}
    for name, rounding in roundings(molmo.config, precision).items():
        weight: nn.Parameter = molmo.get_parameter(name)
        scale = _scale_of(molmo, name)
        found[name] = rounding(weight.detach() if scale is None else weight.detach() * scale.detach()[:, None])
    return found
