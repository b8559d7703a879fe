"""What quantizing each part of a model costs: one part is quantized, and the others stay in float32.

A part is a component of a bundle (the point head of a MolmoPoint included), or the attention, experts, router or head
of its decoder. Variants of the decoder get the reference's image features, so that no image is encoded twice.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo_edge.checkpoints.bundle import is_bundle, open_bundle
from molmo_edge.checkpoints.manifest import POINT_HEAD, TOKENIZER, graph_names
from molmo_edge.checkpoints.tensor_names import hub_shapes
from molmo_edge.evaluation.comparison import compare
from molmo_edge.evaluation.metrics import compute_metrics
from molmo_edge.evaluation.questions import Question
from molmo_edge.evaluation.reference_outputs import ModelUnderTest, record_reference
from molmo_edge.evaluation.stats import Estimate
from molmo_edge.export.precisions import PARTS as DECODER_PARTS
from molmo_edge.export.precisions import POINT_HEAD_PRECISIONS, QUANTIZED
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.runtimes import open_files
from molmo_edge.sdk.readable_text import counted
from molmo_edge.system.memory import available_memory, check_room
from molmo_edge.system.scratch import temporary_folder

if TYPE_CHECKING:
    from molmo_edge.checkpoints.tensor_sources import TensorSource
    from molmo_edge.config import MolmoConfig

_SEED = 6
_ACTIVATIONS = 1_000_000_000  # bytes
PARTS = ("vision_encoder", "connector", "embed_tokens", *DECODER_PARTS)


@dataclass(frozen=True)
class AblationResult:
    """The reference with one part changed."""

    part: str
    precision: str  # or the name of the model whose weights it has (molmo_edge.evaluation.fault_localization)
    saved: int  # bytes
    metrics: dict[str, Estimate]

    @property
    def kl(self) -> float:
        """Mean KL divergence from the reference, nats per token."""
        return self.metrics["kl_mean"].value

    @property
    def kl_per_megabyte(self) -> float:
        """Nats per token and megabyte saved; infinite if nothing is saved."""
        return self.kl / (self.saved / 1e6) if self.saved > 0 else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """For JSON. `kl_per_megabyte` is None if nothing is saved."""
        return {
            "part": self.part,
            "precision": self.precision,
            "saved": self.saved,
            "kl_per_megabyte": self.kl_per_megabyte if self.saved > 0 else None,
            "figures": {name: figure.to_dict() for name, figure in self.metrics.items()},
        }


class Bench:
    """A float32 reference, its recorded outputs, and a temporary folder for its variants. A context manager."""

    def __init__(
        self,
        reference: Path,
        questions: Sequence[Question],
        *,
        max_crops: int | None = None,
        dither: bool = True,
        rotate: bool = False,
        on_answer: Callable[[], None] = lambda: None,
        on_skipped: Callable[[str], None] | None = None,
    ) -> None:
        """`dither`: move a bundle's quantized weights off their grid; otherwise quantizing them again shows no error
        (molmo_edge.export.bundle_weights.BundleTensors). `rotate`: rotate the hidden channels of all variants
        (molmo_edge.quantize.rotation). `on_skipped`: see `record_reference`."""
        from molmo_edge.export.source import open_source

        if is_bundle(reference):
            check_room(sum(part.bytes for part in open_bundle(reference).components.values()), f"reading {reference}")
        self.config, self.tensors = open_source(reference, dither=_SEED if dither else None)
        if rotate:
            from molmo_edge.quantize.rotation import rotated

            self.config, self.tensors = rotated(self.config, self.tensors)
        self.mapped = _too_large(self.config)  # weights are read from their files, which is slower
        self.tokenizer = Tokenizer.from_file(reference / TOKENIZER)
        self.reference = reference
        self._max_crops = max_crops
        self._open = ExitStack()
        self._scratch = self._open.enter_context(temporary_folder("ablation"))
        self._built = 0
        self.files = {name: self.build(name, {name: "fp32"}) for name in graph_names(self.config)}
        with self._opened(self.files) as model:
            self.outputs = record_reference(model, questions, self._folder() / "reference", on_answer, on_skipped)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def build(self, component: str, precision: Mapping[str, str], tensors: TensorSource | None = None) -> Path:
        """Export a component into a folder of its own. `precision`: see `molmo_edge.export.ExportOptions`."""
        from molmo_edge.export.component_graphs import build_component
        from molmo_edge.export.options import ExportOptions, check_options

        options = check_options(ExportOptions(dict(precision)))
        path = self._folder() / f"{component}.onnx"
        build_component(component, path, self.config, tensors or self.tensors, options.graph_precision(component))
        return path

    def measure(self, files: Mapping[str, Path], on_answer: Callable[[], None] = lambda: None) -> dict[str, Estimate]:
        """The metrics of the reference with some of its components replaced."""
        changed = {**self.files, **files}
        encode_images = any(changed[name] != self.files[name] for name in ("vision_encoder", "connector"))
        with self._opened(changed) as model:
            return compute_metrics(compare(self.outputs, model, encode_images=encode_images, on_answer=on_answer))

    @property
    def description(self) -> str:
        """What the metrics are computed over, for people to read."""
        answers = self.outputs.answers
        tokens, images = sum(len(a.targets) for a in answers), len({a.image for a in answers})
        return f"{counted(tokens, 'token')} of {counted(len(answers), 'answer')} about {counted(images, 'image')}"

    @property
    def points(self) -> bool:
        """Whether an answer of the reference has grounding tokens."""
        first = self.config.decoder.n_logits
        return any(token >= first for answer in self.outputs.answers for token in answer.targets)

    def noise(self, on_answer: Callable[[], None] = lambda: None) -> AblationResult:
        """The reference itself, with pixels changed by a millionth."""
        with self._opened(self.files) as model:
            metrics = compute_metrics(compare(self.outputs, replace(model, perturbed=True), on_answer=on_answer))
        return AblationResult("noise", "", 0, metrics)

    def delete(self, path: Path) -> None:
        """Delete a variant: each is as large as the model."""
        shutil.rmtree(path.parent)

    def _folder(self) -> Path:
        self._built += 1
        folder = self._scratch / str(self._built)
        folder.mkdir()
        return folder

    @contextmanager
    def _opened(self, files: dict[str, Path]) -> Iterator[ModelUnderTest]:
        runtime = open_files(self.config, files, mapped=self.mapped)
        try:
            yield ModelUnderTest(runtime, self.tokenizer, self._max_crops)
        finally:
            runtime.close()


def _too_large(config: MolmoConfig) -> bool:
    """Whether the float32 model and its activations do not fit into free memory."""
    free = available_memory()
    needed = 4 * sum(math.prod(shape) for shape in hub_shapes(config).values()) + _ACTIVATIONS
    return free is not None and needed > free


def ablate(
    bench: Bench,
    precisions: Sequence[str],
    parts: Sequence[str] | None = None,
    on_part: Callable[[str], Callable[[], None]] = lambda _: lambda: None,
) -> Iterator[AblationResult]:
    """Measure each part in each precision, skipping those that a part does not support (embeddings in 4 bits).

    `parts`: None: all of the model. A point head that no answer uses is left out: its loss would be 0.
    """
    for part in parts_of(bench.config) if parts is None else parts:
        if part == POINT_HEAD and not bench.points:
            continue
        for word in precisions:
            if word in precisions_of(part, bench.config):
                component = component_of(part)
                path = bench.build(component, variant(part, word))
                metrics = bench.measure({component: path}, on_part(f"{part} {word}"))
                saved = size_of(bench.files[component]) - size_of(path)
                bench.delete(path)
                yield AblationResult(part, word, saved, metrics)


def parts_of(config: MolmoConfig) -> tuple[str, ...]:
    """The parts of a model: PARTS, and a MolmoPoint's point head."""
    return (*PARTS, POINT_HEAD) if config.point_head else PARTS


def component_of(part: str) -> str:
    """The component that contains a part: the decoder for DECODER_PARTS, otherwise the part itself."""
    return "decoder" if part in DECODER_PARTS else part


def variant(part: str, word: str) -> dict[str, str]:
    """The `precision` argument of `export_bundle`."""
    return {"decoder": "fp32", part: word} if part in DECODER_PARTS else {part: word}


def precisions_of(part: str, config: MolmoConfig) -> tuple[str, ...]:
    """The smaller precisions that a part supports, the largest first."""
    if part == "router" and not config.decoder.n_experts:
        return ()
    if part == POINT_HEAD:
        return POINT_HEAD_PRECISIONS[1:] if config.point_head else ()
    return ("int8",) if part == "embed_tokens" else QUANTIZED


def size_of(path: Path) -> int:
    """Bytes of a graph and of its external weights."""
    sidecar = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (sidecar.stat().st_size if sidecar.exists() else 0)
