"""Which part of a model costs what: one part rounded, everything else as it was.

A part is a component of a bundle, or attention, experts, router or head of its decoder. Each is measured as
molmo_edge.evaluation.comparison measures a candidate. Parts of the decoder are given the reference's image features, so
that what they differ by is their own, and no image is encoded twice.
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
from molmo_edge.checkpoints.manifest import GRAPHS, TOKENIZER
from molmo_edge.checkpoints.tensor_names import hub_shapes
from molmo_edge.evaluation.comparison import compare
from molmo_edge.evaluation.metrics import compute_metrics
from molmo_edge.evaluation.questions import Question
from molmo_edge.evaluation.reference_outputs import ModelUnderTest, ReferenceOutputs, record_reference
from molmo_edge.evaluation.stats import Estimate
from molmo_edge.export.precisions import PARTS as OF_DECODER
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.runtimes import open_files
from molmo_edge.system.memory import available_memory, check_room
from molmo_edge.system.scratch import temporary_folder

if TYPE_CHECKING:
    from molmo_edge.checkpoints.tensor_sources import TensorSource
    from molmo_edge.config import MolmoConfig

_SEED = 6
_ACTIVATIONS = 1_000_000_000  # bytes
PARTS = ("vision_encoder", "connector", "embed_tokens", *OF_DECODER)


@dataclass(frozen=True)
class AblationResult:
    """One part, otherwise than the reference."""

    part: str
    precision: str  # or the name of the model that it was taken from (molmo_edge.evaluation.fault_localization)
    saved: int  # bytes
    metrics: dict[str, Estimate]

    @property
    def kl(self) -> float:
        return self.metrics["kl_mean"].value

    @property
    def kl_per_megabyte(self) -> float:
        """Nats a token for each megabyte saved; infinite where nothing is."""
        return self.kl / (self.saved / 1e6) if self.saved > 0 else float("inf")

    def to_dict(self) -> dict[str, Any]:
        return {
            "part": self.part,
            "precision": self.precision,
            "saved": self.saved,
            "kl_per_megabyte": self.kl_per_megabyte if self.saved > 0 else None,
            "figures": {name: figure.to_dict() for name, figure in self.metrics.items()},
        }


class Bench:
    """A reference in float32, what it answered, and a place to build its variants in. Use it with `with`."""

    def __init__(
        self,
        reference: Path,
        questions: Sequence[Question],
        *,
        max_crops: int | None = None,
        dither: bool = True,
        on_answer: Callable[[], None] = lambda: None,
    ) -> None:
        """`dither`: weights of a bundle, which lie on the grid of their rounding, are moved off it, or rounding them
        again would seem free (molmo_edge.export.bundle_weights.BundleTensors). Raises what opening the model raises."""
        from molmo_edge.export.source import open_source

        if is_bundle(reference):
            check_room(sum(part.bytes for part in open_bundle(reference).components.values()), f"reading {reference}")
        self.config, self.tensors = open_source(reference, dither=_SEED if dither else None)
        self.mapped = _too_large(self.config)  # weights stay in their files, slower
        self.tokenizer = Tokenizer.from_file(reference / TOKENIZER)
        self.reference = reference
        self._max_crops = max_crops
        self._open = ExitStack()
        self._scratch = self._open.enter_context(temporary_folder("ablation"))
        self._built = 0
        self.files = {name: self.build(name, {name: "fp32"}) for name in GRAPHS}
        with self._opened(self.files) as subject:
            self.trace: ReferenceOutputs = record_reference(subject, questions, self._folder() / "trace", on_answer)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def build(
        self, component: str, words: Mapping[str, str], tensors: TensorSource | None = None, **wishes: Any
    ) -> Path:
        """A component's graph, in a folder of its own. `words`, `wishes`: as of `molmo_edge.export.export_bundle`."""
        from molmo_edge.export.component_graphs import build_component
        from molmo_edge.export.options import ExportOptions, check_options

        precision = check_options(ExportOptions(dict(words), **wishes)).graph_precision(component)
        path = self._folder() / f"{component}.onnx"
        build_component(component, path, self.config, tensors or self.tensors, precision)
        return path

    def measure(self, files: Mapping[str, Path], on_answer: Callable[[], None] = lambda: None) -> dict[str, Estimate]:
        """The figures of the reference with some of its files exchanged."""
        changed = {**self.files, **files}
        see = any(changed[name] != self.files[name] for name in ("vision_encoder", "connector"))
        with self._opened(changed) as subject:
            return compute_metrics(compare(self.trace, subject, encode_images=see, on_answer=on_answer))

    @property
    def description(self) -> str:
        """What the figures are taken over, for people to read."""
        answers = self.trace.answers
        tokens, images = sum(len(a.targets) for a in answers), len({a.image for a in answers})
        return f"{tokens} tokens of {len(answers)} answers about {images} images"

    def noise(self, on_answer: Callable[[], None] = lambda: None) -> AblationResult:
        """The reference itself, with pixels moved by a millionth."""
        with self._opened(self.files) as subject:
            found = compute_metrics(compare(self.trace, replace(subject, perturbed=True), on_answer=on_answer))
        return AblationResult("noise", "", 0, found)

    def delete(self, path: Path) -> None:
        """A variant that is not needed any more: they are as large as the model."""
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
    """Whether the model in float32, and activations, do not fit into the memory that is free."""
    free = available_memory()
    needed = 4 * sum(math.prod(shape) for shape in hub_shapes(config).values()) + _ACTIVATIONS
    return free is not None and needed > free


def ablate(
    bench: Bench,
    precisions: Sequence[str],
    parts: Sequence[str] = PARTS,
    on_part: Callable[[str], Callable[[], None]] = lambda what: lambda: None,
) -> Iterator[AblationResult]:
    """Each part in each precision, alone; those that a part cannot have are left out (an embedding in four bits)."""
    for part in parts:
        for word in precisions:
            if word in precisions_of(part, bench.config):
                path = bench.build(component_of(part), variant(part, word))
                found = bench.measure({component_of(part): path}, on_part(f"{part} {word}"))
                saved = size_of(bench.files[component_of(part)]) - size_of(path)
                bench.delete(path)
                yield AblationResult(part, word, saved, found)


def component_of(part: str) -> str:
    return "decoder" if part in OF_DECODER else part


def variant(part: str, word: str) -> dict[str, str]:
    """What `export_bundle` is asked for."""
    return {"decoder": "fp32", part: word} if part in OF_DECODER else {part: word}


def precisions_of(part: str, config: MolmoConfig) -> tuple[str, ...]:
    """The smaller precisions that a part may have, the largest first."""
    if part == "router" and not config.decoder.n_experts:
        return ()
    return ("int8",) if part == "embed_tokens" else ("q8", "int8", "q4")


def size_of(path: Path) -> int:
    """Bytes of a graph and of the weights beside it."""
    sidecar = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (sidecar.stat().st_size if sidecar.exists() else 0)
