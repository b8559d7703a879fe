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

from molmo_edge.config import MolmoConfig
from molmo_edge.evaluation.ablation import PARTS, Ablated, Bench, component_of
from molmo_edge.evaluation.loss import LossError, check_comparable
from molmo_edge.export.source import open_source
from molmo_edge.modeling.checkpoint import TensorSource
from molmo_edge.modeling.layout import hub_shapes
from molmo_edge.quantize.parts import part_of

OTHERWISE = 5.0  # times its kind's median: a matrix that differs by more stands out
_TINY = 0.02  # relative error below which nothing stands out
_ENOUGH = 3  # others, for a median
_BEHIND_NORM = re.compile(r"\.(?:(att_proj)|ff_proj|gate|experts\.\d+\.(?:gate|up)_proj)\.weight$")


def blame_parts(
    bench: Bench,
    candidate: Path,
    parts: Sequence[str] = PARTS,
    on_part: Callable[[str], Callable[[], None]] = lambda what: lambda: None,
) -> Iterator[Ablated]:
    """The reference with one part's weights from `candidate`, each in turn. Raises LossError for other sizes."""
    theirs = _open(bench, candidate)
    # A calibration moves gains of norms into matrices of two parts: those must not be exchanged apart.
    ours = Folded(bench.config, bench.tensors)
    apart = any(
        not np.array_equal(bench.tensors.get(name), theirs.get(name)) for name in ours.names() if ours.is_gain(name)
    )
    a, b = (ours, Folded(bench.config, theirs)) if apart else (bench.tensors, theirs)
    for part in parts:
        if part == "router" and not bench.config.decoder.n_experts:
            continue
        component = component_of(part)
        path = bench.build(component, {component: "fp32"}, _Mixed(a, b, part))
        yield Ablated(part, candidate.name, 0, bench.measure({component: path}, on_part(f"{part} of {candidate.name}")))
        bench.forget(path)


@dataclass(frozen=True)
class Matrix:
    """How far a candidate's tensor lies from the reference's."""

    name: str  # as on the hub
    part: str
    error: float  # norm of the difference over norm of the reference's; infinite for what is no number
    stands_out: bool  # by far the most of its kind


def matrices(bench: Bench, candidate: Path) -> list[Matrix]:
    """All tensors that differ, the most different first: names a single damaged expert without running anything."""
    theirs, config = _open(bench, candidate), bench.config
    ours, others = Folded(config, bench.tensors), Folded(config, theirs)
    errors: dict[str, float] = {}
    for name in hub_shapes(config):
        if not ours.is_gain(name) and _runs(name, config):
            errors[name] = _error(*(np.asarray(source.folded(name), np.float32) for source in (ours, others)))
    found = [
        Matrix(name, tensor_part(name), error, error > max(_TINY, OTHERWISE * _usual(name, errors)))
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


class Folded:
    """A TensorSource with all scales that an export may move in one place: LayerScale in the rows of what it scales, a
    norm's gain in the columns of the matrices behind it. The same function."""

    def __init__(self, config: MolmoConfig, tensors: TensorSource) -> None:
        self._config, self._tensors, self._names = config, tensors, frozenset(tensors.names())

    def names(self) -> list[str]:
        return self._tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(name)

    def dtype(self, name: str) -> str:
        return "F32"

    def file(self, name: str) -> Path:
        return self._tensors.file(name)

    def raw(self, name: str) -> np.ndarray:
        return self.get(name)

    def get(self, name: str) -> np.ndarray:
        return np.ones(self.shape(name), np.float32) if self.is_gain(name) else self.folded(name)

    def is_gain(self, name: str) -> bool:
        """Whether it is folded into others."""
        if name.endswith((".lambda1", ".lambda2")):
            return True
        return name.endswith((".attn_norm.weight", ".ff_norm.weight")) and not self._config.decoder.norm_after

    def folded(self, name: str) -> np.ndarray:
        """The tensor with the scales that belong to it."""
        array = np.asarray(self._tensors.get(name), np.float32)
        for matrix, scale in ((".attention.wo.", "lambda1"), (".feed_forward.w2.", "lambda2")):
            block, found, _ = name.partition(matrix)
            if found and f"{block}.{scale}" in self._names:
                scales = self._tensors.get(f"{block}.{scale}")
                return array * (scales[:, None] if array.ndim == 2 else scales)
        if (behind := _BEHIND_NORM.search(name)) and not self._config.decoder.norm_after:
            gain = f"{name[: behind.start()]}.{'attn_norm' if behind[1] else 'ff_norm'}.weight"
            return array * self._tensors.get(gain)
        return array


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
    return part_of(name.removesuffix(".weight"))


class _Mixed:
    """A TensorSource: one part's tensors from `theirs`, the others from `ours`."""

    def __init__(self, ours: TensorSource, theirs: TensorSource, part: str) -> None:
        self._ours, self._theirs, self._part = ours, theirs, part

    def _of(self, name: str) -> TensorSource:
        return self._theirs if tensor_part(name) == self._part else self._ours

    def names(self) -> list[str]:
        return self._ours.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of(name).shape(name)

    def dtype(self, name: str) -> str:
        return self._of(name).dtype(name)

    def file(self, name: str) -> Path:
        return self._of(name).file(name)

    def raw(self, name: str) -> np.ndarray:
        return self._of(name).raw(name)

    def get(self, name: str) -> np.ndarray:
        return self._of(name).get(name)
