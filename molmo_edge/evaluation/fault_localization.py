"""Find the faulty part of a candidate: put its weights into the reference part by part, and compare all weights.

Weights are compared and exchanged in float32. The quantization of activations is not part of this.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from molmo_edge.checkpoints.manifest import POINT_HEAD
from molmo_edge.checkpoints.tensor_names import block_names, hub_shapes, matrices_after_norms
from molmo_edge.checkpoints.tensor_sources import Changed, TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.evaluation.ablation import AblationResult, Bench, component_of, parts_of
from molmo_edge.evaluation.loss import LossError, check_comparable, rotation_differs
from molmo_edge.export.precisions import decoder_part
from molmo_edge.export.source import open_source

OUTLIER = 5.0  # times the median error of similar tensors: a larger error is an outlier
_TINY = 0.02  # relative error; a smaller one is never an outlier
_ENOUGH = 3  # similar tensors, for a median


def swap_parts(
    bench: Bench,
    candidate: Path,
    parts: Sequence[str] | None = None,
    on_part: Callable[[str], Callable[[], None]] = lambda _: lambda: None,
) -> Iterator[AblationResult]:
    """Measure the reference with the weights of `candidate` in one part, for each part in turn (None: all parts).

    Raises LossError if the models differ in shape.
    """
    theirs = open_candidate(bench.reference, candidate)
    # A calibration moves norm gains into matrices of two parts, which must not be exchanged separately.
    gains = [name for name in bench.tensors.names() if _is_gain(name, bench.config)]
    if all(np.array_equal(bench.tensors.get(name), theirs.get(name)) for name in gains):
        ours = bench.tensors
    else:
        ours, theirs = (_folded(bench.config, source) for source in (bench.tensors, theirs))
    for part in parts_of(bench.config) if parts is None else parts:
        if part == "router" and not bench.config.decoder.n_experts:
            continue
        component = component_of(part)
        path = bench.build(component, {component: "fp32"}, _exchanged(ours, theirs, part))
        metrics = bench.measure({component: path}, on_part(f"{part} of {candidate.name}"))
        bench.delete(path)
        yield AblationResult(part, candidate.name, 0, metrics)


def _exchanged(ours: TensorSource, theirs: TensorSource, part: str) -> Changed:
    """The tensors of one part from `theirs`, all others from `ours`."""
    return Changed(ours, lambda name: (theirs if tensor_part(name) == part else ours).get(name))


@dataclass(frozen=True)
class WeightDifference:
    """The relative error of a candidate's tensor."""

    name: str  # as on the hub
    part: str
    error: float  # |candidate - reference| / |reference|; infinite if it is not finite
    is_outlier: bool  # far more than similar tensors


def weight_differences(bench: Bench, candidate: TensorSource) -> list[WeightDifference]:
    """All tensors that differ, the largest error first. This finds a single damaged expert without running a model.

    `candidate`: as `open_candidate` returns it.
    """
    config = bench.config
    ours, theirs = (_folded(config, source) for source in (bench.tensors, candidate))
    names = [name for name in hub_shapes(config) if _runs(name, config) and not _is_gain(name, config)]
    errors = {name: _error(ours.get(name), theirs.get(name)) for name in names}
    differences = [
        WeightDifference(name, tensor_part(name), error, error > max(_TINY, OUTLIER * _typical_error(name, errors)))
        for name, error in errors.items()
        if error
    ]
    return sorted(differences, key=lambda difference: -difference.error)


def check_candidate(reference: Path, candidate: Path) -> None:
    """Raise LossError for a model of another shape or with rotated channels, ExportError for unreadable weights."""
    check_comparable(reference, candidate)
    if open_source(candidate)[0] != open_source(reference)[0]:
        raise LossError(f"{candidate} and {reference} differ in shape: their parts cannot be exchanged")
    if rotation_differs(reference, candidate):
        raise LossError(
            f"only one of {candidate} and {reference} was exported with --rotate: their channels differ, and their "
            "parts cannot be exchanged"
        )


def open_candidate(reference: Path, candidate: Path) -> TensorSource:
    """The candidate's weights. Raises what `check_candidate` raises."""
    check_candidate(reference, candidate)
    return open_source(candidate)[1]


def _error(a: np.ndarray, b: np.ndarray) -> float:
    size, difference = float(np.linalg.norm(a)), float(np.linalg.norm(a - b))
    error = difference / size if size else float(difference > 0)
    return error if math.isfinite(error) else math.inf


def _typical_error(name: str, errors: dict[str, float]) -> float:
    """The median error of the same tensor in other layers and experts or, if these are few, of its part, or of all."""
    for alike in (_kind, tensor_part, lambda _: ""):
        others = [error for other, error in errors.items() if other != name and alike(other) == alike(name)]
        if len(others) >= _ENOUGH:
            return float(np.median(others))
    return 0.0


def _kind(name: str) -> str:
    return re.sub(r"\d+", "", name)


def _runs(name: str, config: MolmoConfig) -> bool:
    """False for vision blocks after the last layer that is used."""
    block = re.search(r"\.(?:image_vit|vit)\.transformer\.resblocks\.(\d+)\.", name)
    return not (block and int(block[1]) > config.vision.last_layer)


def _is_gain(name: str, config: MolmoConfig) -> bool:
    """Whether a tensor can be folded into others: LayerScale, and the gain of a norm before a matrix."""
    if name.endswith((".lambda1", ".lambda2")):
        return True
    return name.endswith((".attn_norm.weight", ".ff_norm.weight")) and not config.decoder.norm_after


def _folded(config: MolmoConfig, tensors: TensorSource) -> Changed:
    """An equivalent model in canonical form: an export may move these scales.

    LayerScale is folded into the rows of what it scales, and a norm's gain into the columns of the matrices after it.
    With norms after the branches, the rows of values and of `up` have norm 1, and the columns after them their norms.
    """
    names = frozenset(tensors.names())
    layers = range(config.decoder.n_layers)
    gains = {m: gain for n in layers for gain, ms in matrices_after_norms(config, n).items() for m in ms}
    branches = _branches(config) if config.decoder.norm_after else {}

    def change(name: str) -> np.ndarray:
        if _is_gain(name, config):
            return np.ones(tensors.shape(name), np.float32)
        array = tensors.get(name)
        for matrix, scale in ((".attention.wo.", "lambda1"), (".feed_forward.w2.", "lambda2")):
            block, found, _ = name.partition(matrix)
            if found and f"{block}.{scale}" in names:
                scales = tensors.get(f"{block}.{scale}")
                array = array * (scales[:, None] if array.ndim == 2 else scales)
        if name in gains:
            array = array * tensors.get(gains[name])
        if name in branches:
            first, repeats = branches[name]
            norms = np.linalg.norm(tensors.get(first.matrix)[first.start : first.stop], axis=1)
            norms[norms == 0] = 1
            if repeats:  # the columns of the second matrix
                return np.asarray(array * np.repeat(norms.reshape(-1, first.group), repeats, axis=0).reshape(-1))
            array = array.copy()
            array[first.start : first.stop] /= norms[:, None] if array.ndim == 2 else norms
        return array

    return Changed(tensors, change)


class _Rows(NamedTuple):
    """Rows of a matrix whose outputs another matrix takes: of the values in `att_proj`, of up in `ff_proj`."""

    matrix: str
    start: int
    stop: int
    group: int  # outputs that are repeated together: those of a head


def _branches(config: MolmoConfig) -> dict[str, tuple[_Rows, int]]:
    """Tensor -> the rows whose norms scale it, and how often its columns repeat them; 0 for the rows themselves."""
    d = config.decoder
    found: dict[str, tuple[_Rows, int]] = {}
    for layer in range(d.n_layers):
        names = block_names(config, layer)
        values = _Rows(f"{names.attention}.att_proj.weight", d.q_dim + d.kv_dim, d.q_dim + 2 * d.kv_dim, d.head_dim)
        found |= {values.matrix: (values, 0), f"{names.attention}.att_proj.bias": (values, 0)}
        found[f"{names.attention}.attn_out.weight"] = values, d.n_heads // d.n_kv_heads
        if not d.n_experts:
            up = _Rows(f"{names.ffn}.ff_proj.weight", 0, d.ffn_dim, d.ffn_dim)
            found |= {up.matrix: (up, 0), f"{names.ffn}.ff_out.weight": (up, 1)}
    return found


def tensor_part(name: str) -> str:
    """Which part (molmo_edge.evaluation.ablation.parts_of) a hub tensor belongs to.

    A norm belongs to what follows it, the last one to the head.
    """
    if ".image_vit." in name or ".conv_tower." in name or name.startswith("model.vit."):
        return "vision_encoder"
    if ".vision_backbone." in name or name.startswith("model.connector."):
        return "connector"
    if name.startswith(("model.point_predictor.", "model.build_vit_embedding.")):
        return POINT_HEAD
    if ".wte." in name:
        return "embed_tokens"
    if any(word in name for word in (".attn.", "attn_norm", "att_proj", "attn_out", "q_norm", "k_norm")):
        return "attention"
    if name.endswith("ln_f.weight"):
        return "head"
    return decoder_part(name.removesuffix(".weight"))
