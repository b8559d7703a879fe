"""Which part of a candidate is to blame: the reference with one part's weights from it, and matrix by matrix.

Weights are what is exchanged and compared, widened to float32. That a rounded model also rounds its inputs is not in
it.
"""

from __future__ import annotations

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
_BEHIND_NORM = re.compile(r"\.(?:(att_proj)|ff_proj|gate|experts\.\d+\.(?:gate|up)_proj)\.weight$")


def blame_parts(
    bench: Bench,
    candidate: Path,
    parts: Sequence[str] = PARTS,
    on_part: Callable[[str], Callable[[], None]] = lambda what: lambda: None,
) -> Iterator[Ablated]:
    """The reference with one part's weights from `candidate`, each in turn. Raises LossError for other sizes."""
    check_comparable(bench.reference, candidate)
    config, theirs = open_source(candidate)
    if config != bench.config:
        raise LossError(f"{candidate} has other sizes than {bench.reference}: their parts cannot be exchanged")
    for part in parts:
        if part == "router" and not config.decoder.n_experts:
            continue
        component = component_of(part)
        path = bench.build(component, {component: "fp32"}, _Mixed(bench.tensors, theirs, part))
        yield Ablated(part, candidate.name, 0, bench.measure({component: path}, on_part(f"{part} of {candidate.name}")))
        bench.forget(path)


@dataclass(frozen=True)
class Matrix:
    """How far a candidate's tensor lies from the reference's."""

    name: str  # as on the hub
    part: str
    error: float  # norm of the difference over norm of the reference's
    stands_out: bool  # by far the most of its kind


def matrices(bench: Bench, candidate: Path) -> list[Matrix]:
    """All tensors that differ, the most different first: names a single damaged expert without running anything."""
    config, theirs = open_source(candidate)
    kinds: dict[tuple[str, str], dict[str, float]] = {}
    for name in hub_shapes(config):
        if not _runs(name, config):
            continue
        a, b = (_folded(source, name) for source in (bench.tensors, theirs))
        size, difference = float(np.linalg.norm(a)), float(np.linalg.norm(a - b))
        error = difference / size if size else float(difference > 0)
        kinds.setdefault((tensor_part(name), re.sub(r"\d+", "", name)), {})[name] = error
    found = []
    for (part, _), errors in kinds.items():
        limit = max(_TINY, OTHERWISE * float(np.median(list(errors.values()))))
        found += [Matrix(name, part, error, error > limit) for name, error in errors.items() if error]
    return sorted(found, key=lambda matrix: -matrix.error)


def _runs(name: str, config: MolmoConfig) -> bool:
    """Blocks behind the last layer that is looked at do not; LayerScale and gains are compared with what they scale."""
    if name.endswith((".attn_norm.weight", ".ff_norm.weight")) and not config.decoder.norm_after:
        return False
    block = re.search(r"\.image_vit\.transformer\.resblocks\.(\d+)\.", name)
    return not (block and int(block[1]) > config.vision.last_layer) and not name.endswith((".lambda1", ".lambda2"))


def _folded(tensors: TensorSource, name: str) -> np.ndarray:
    """The tensor with the scales that an export may move: LayerScale into its rows, a norm's gain into its columns."""
    array, names = np.asarray(tensors.get(name), np.float32), tensors.names()
    for matrix, scale in ((".attention.wo.", "lambda1"), (".feed_forward.w2.", "lambda2")):
        block, found, _ = name.partition(matrix)
        if found and f"{block}.{scale}" in names:
            scales = tensors.get(f"{block}.{scale}")
            return array * (scales[:, None] if array.ndim == 2 else scales)
    if behind := _BEHIND_NORM.search(name):
        gain = f"{name[: behind.start()]}.{'attn_norm' if behind[1] else 'ff_norm'}.weight"
        return array * tensors.get(gain) if gain in names else array
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
