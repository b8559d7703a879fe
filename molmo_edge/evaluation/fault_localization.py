"""Which part of a candidate is to blame: the reference with one part's weights from it, and matrix by matrix.

Weights are what is exchanged and compared, widened to float32. That a rounded model also rounds its inputs is not in
it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from molmo_edge.checkpoints.tensor_names import hub_shapes
from molmo_edge.checkpoints.tensor_sources import Changed, TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.evaluation.ablation import PARTS, AblationResult, Bench, component_of
from molmo_edge.evaluation.loss import LossError, check_comparable
from molmo_edge.export.precisions import decoder_part
from molmo_edge.export.source import open_source

OTHERWISE = 5.0  # times its kind's median: a matrix that differs by more stands out
_TINY = 0.02  # relative error below which nothing stands out
_ENOUGH = 3  # others, for a median
_BEHIND_NORM = re.compile(r"\.(?:(att_proj)|ff_proj|gate|experts\.\d+\.(?:gate|up)_proj)\.weight$")


def swap_parts(
    bench: Bench,
    candidate: Path,
    parts: Sequence[str] = PARTS,
    on_part: Callable[[str], Callable[[], None]] = lambda what: lambda: None,
) -> Iterator[AblationResult]:
    """The reference with one part's weights from `candidate`, each in turn. Raises LossError for other sizes."""
    theirs = _open(bench, candidate)
    # A calibration moves gains of norms into matrices of two parts: those must not be exchanged apart.
    gains = [name for name in bench.tensors.names() if _is_gain(name, bench.config)]
    if all(np.array_equal(bench.tensors.get(name), theirs.get(name)) for name in gains):
        ours = bench.tensors
    else:
        ours, theirs = (_folded(bench.config, source) for source in (bench.tensors, theirs))
    for part in parts:
        if part == "router" and not bench.config.decoder.n_experts:
            continue
        component = component_of(part)
        path = bench.build(component, {component: "fp32"}, _exchanged(ours, theirs, part))
        yield AblationResult(
            part, candidate.name, 0, bench.measure({component: path}, on_part(f"{part} of {candidate.name}"))
        )
        bench.delete(path)


def _exchanged(ours: TensorSource, theirs: TensorSource, part: str) -> Changed:
    """One part's tensors from `theirs`, the others from `ours`."""
    return Changed(ours, lambda name: (theirs if tensor_part(name) == part else ours).get(name))


@dataclass(frozen=True)
class WeightDifference:
    """How far a candidate's tensor lies from the reference's."""

    name: str  # as on the hub
    part: str
    error: float  # norm of the difference over norm of the reference's; infinite for what is no number
    is_outlier: bool  # by far the most of its kind


def weight_differences(bench: Bench, candidate: Path) -> list[WeightDifference]:
    """All tensors that differ, the most different first: names a single damaged expert without running anything."""
    config = bench.config
    ours, theirs = (_folded(config, source) for source in (bench.tensors, _open(bench, candidate)))
    names = [name for name in hub_shapes(config) if _runs(name, config) and not _is_gain(name, config)]
    errors = {name: _error(ours.get(name), theirs.get(name)) for name in names}
    found = [
        WeightDifference(name, tensor_part(name), error, error > max(_TINY, OTHERWISE * _usual(name, errors)))
        for name, error in errors.items()
        if error
    ]
    return sorted(found, key=lambda matrix: -matrix.error)


def check_candidate(reference: Path, candidate: Path) -> None:
    """Raises LossError for a model of another shape, ExportError for one whose weights cannot be read back."""
    check_comparable(reference, candidate)
    if open_source(candidate)[0] != open_source(reference)[0]:
        raise LossError(f"{candidate} has other sizes than {reference}: their parts cannot be exchanged")


def _open(bench: Bench, candidate: Path) -> TensorSource:
    check_candidate(bench.reference, candidate)
    return open_source(candidate)[1]


def _error(a: np.ndarray, b: np.ndarray) -> float:
    size, difference = float(np.linalg.norm(a)), float(np.linalg.norm(a - b))
    error = difference / size if size else float(difference > 0)
    return error if math.isfinite(error) else math.inf


def _usual(name: str, errors: dict[str, float]) -> float:
    """The median error of a matrix's like: of its kind, or where there are few of that, of its part, or of all."""
    for alike in (_kind, tensor_part, lambda _: ""):
        others = [error for other, error in errors.items() if other != name and alike(other) == alike(name)]
        if len(others) >= _ENOUGH:
            return float(np.median(others))
    return 0.0


def _kind(name: str) -> str:
    return re.sub(r"\d+", "", name)


def _runs(name: str, config: MolmoConfig) -> bool:
    """Blocks behind the last layer that is looked at do not."""
    block = re.search(r"\.image_vit\.transformer\.resblocks\.(\d+)\.", name)
    return not (block and int(block[1]) > config.vision.last_layer)


def _is_gain(name: str, config: MolmoConfig) -> bool:
    """Whether it is folded into others: LayerScale, and the norms that stand in front of matrices."""
    if name.endswith((".lambda1", ".lambda2")):
        return True
    return name.endswith((".attn_norm.weight", ".ff_norm.weight")) and not config.decoder.norm_after


def _folded(config: MolmoConfig, tensors: TensorSource) -> Changed:
    """The same function with all scales that an export may move in one place.

    LayerScale in the rows of what it scales, a norm's gain in the columns of the matrices behind it.
    """
    names = frozenset(tensors.names())

    def change(name: str) -> np.ndarray:
        if _is_gain(name, config):
            return np.ones(tensors.shape(name), np.float32)
        array = tensors.get(name)
        for matrix, scale in ((".attention.wo.", "lambda1"), (".feed_forward.w2.", "lambda2")):
            block, found, _ = name.partition(matrix)
            if found and f"{block}.{scale}" in names:
                scales = tensors.get(f"{block}.{scale}")
                return array * (scales[:, None] if array.ndim == 2 else scales)
        if (behind := _BEHIND_NORM.search(name)) and not config.decoder.norm_after:
            gain = f"{name[: behind.start()]}.{'attn_norm' if behind[1] else 'ff_norm'}.weight"
            return array * tensors.get(gain)
        return array

    return Changed(tensors, change)


def tensor_part(name: str) -> str:
    """Which of PARTS a hub tensor belongs to. Norms belong to what they stand in front of, the last one to the head."""
    if ".image_vit." in name:
        return "vision_encoder"
    if ".vision_backbone." in name:
        return "connector"
    if ".wte." in name:
        return "embed_tokens"
    if any(word in name for word in (".attn.", "attn_norm", "att_proj", "attn_out", "q_norm", "k_norm")):
        return "attention"
    if name.endswith("ln_f.weight"):
        return "head"
    return decoder_part(name.removesuffix(".weight"))
