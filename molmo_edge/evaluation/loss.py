"""What a smaller model lost: a reference, its candidates, and how much of the difference is noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge.checkpoints.bundle import is_bundle, load_tokenizer, open_bundle
from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.config import MolmoConfig
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.evaluation.comparison import Comparison, compare
from molmo_edge.evaluation.metrics import ScoreComparison, compare_scores, compute_metrics
from molmo_edge.evaluation.model_info import ModelInfo, model_info
from molmo_edge.evaluation.questions import Question
from molmo_edge.evaluation.reference_outputs import ModelUnderTest, ReferenceAnswer, ReferenceOutputs, record_reference
from molmo_edge.evaluation.routing import agreement, router_choices
from molmo_edge.evaluation.stats import Estimate
from molmo_edge.evaluation.suites import evenly
from molmo_edge.frontend.prompts import text_ids
from molmo_edge.runtimes import LlamaOptions, PartedRuntime, check_model_room, open_runtime
from molmo_edge.runtimes.prompt_embeddings import with_features
from molmo_edge.system.extras import pip_command
from molmo_edge.system.memory import available_memory
from molmo_edge.system.scratch import temporary_folder

ROUTED = 16  # questions whose experts are compared; the image's positions are most of each
PARTED = 16  # images whose features the decoder is given exactly, to tell its loss from the vision tower's
NOISES = ("threads", "bf16", "none")


class LossError(MolmoEdgeError):
    """Two models that are not asked the same thing, or nothing to compare."""


@dataclass(frozen=True)
class ModelSpec:
    """A bundle or a checkpoint, and how it is run."""

    directory: Path
    precision: str = "auto"  # of a checkpoint
    device: str = "auto"
    threads: int | None = None
    engine_options: LlamaOptions | None = None
    name: str = ""  # in reports; without it the directory's

    @property
    def info(self) -> ModelInfo:
        found = model_info(self.directory, self.precision)
        return replace(found, name=self.name or found.name)

    @contextmanager
    def opened(self, max_crops: int | None = None, *, perturbed: bool = False) -> Iterator[ModelUnderTest]:
        runtime = open_runtime(
            self.directory,
            device=self.device,
            precision=self.precision,
            threads=self.threads,
            engine_options=self.engine_options,
        )
        try:
            yield ModelUnderTest(runtime, load_tokenizer(self.directory), max_crops, perturbed)
        finally:
            runtime.close()


@dataclass(frozen=True)
class LossBreakdown:
    """Where a loss comes from, measured on `questions` of all, one an image. Figures are as of `figures`."""

    questions: int
    whole: dict[str, Estimate]
    # Given the reference's image features, so that what differs is the decoder's doing; None where the candidate's own
    # image features are the reference's.
    decoder: dict[str, Estimate] | None

    def to_dict(self) -> dict[str, Any]:
        def plain(figures: dict[str, Estimate]) -> dict[str, Any]:
            return {name: figure.to_dict() for name, figure in figures.items()}

        decoder = None if self.decoder is None else plain(self.decoder)
        return {"questions": self.questions, "whole": plain(self.whole), "decoder": decoder}


@dataclass(frozen=True)
class ModelLoss:
    """A candidate, or the noise."""

    info: ModelInfo
    engine: str
    comparison: Comparison
    metrics: dict[str, Estimate]
    scores: dict[str, dict[str, ScoreComparison]]
    parts: LossBreakdown | None = None  # of a candidate

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.info.to_dict(),
            "engine": self.engine,
            **({} if self.parts is None else {"parts": self.parts.to_dict()}),
            "figures": {name: figure.to_dict() for name, figure in self.metrics.items()},
            "scores": {
                group: {
                    name: {
                        "reference": s.reference.to_dict(),
                        "candidate": s.candidate.to_dict(),
                        "difference": s.difference.to_dict(),
                    }
                    for name, s in by_name.items()
                }
                for group, by_name in self.scores.items()
            },
        }


@dataclass(frozen=True)
class Loss:
    reference: ModelInfo
    engine: str
    suites: tuple[str, ...]
    images: int
    questions: int
    tokens: int  # of the reference's answers, their ends counted
    noise_kind: str  # of NOISES
    noise: ModelLoss | None
    candidates: tuple[ModelLoss, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "reference": {**self.reference.to_dict(), "engine": self.engine},
            "suites": list(self.suites),
            "images": self.images,
            "questions": self.questions,
            "tokens": self.tokens,
            "noise": None if self.noise is None else {"kind": self.noise_kind, **self.noise.to_dict()},
            "candidates": [candidate.to_dict() for candidate in self.candidates],
        }


def measure_loss(
    reference: ModelSpec,
    candidates: Sequence[ModelSpec],
    questions: Sequence[Question],
    *,
    suites: Sequence[str] = (),
    noise: str = "threads",
    max_crops: int | None = None,
    on_model: Callable[[str, int], Callable[[], None]] = lambda name, questions: lambda: None,
    on_measured: Callable[[Loss], None] = lambda loss: None,
) -> Loss:
    """Ask the reference, then each candidate the same. One model is in memory at a time.

    `noise`: what the reference differs from itself by, with one thread and pixels moved by a millionth ("threads"), or
    with its weights in bf16 on PyTorch ("bf16"). `on_model(name, questions)` is called for each model, and what it
    returns for each of its answers; `on_measured` with what there is after each of them. The temporary folder takes
    the reference's logits: 4 bytes for each entry of the vocabulary and each token.
    Raises LossError for models that do not take the same prompts, NoQuestionsError where no question is about an image.
    """
    if noise not in NOISES:
        raise LossError(f'noise "{noise}" is not known; known are {", ".join(NOISES)}')
    for candidate in candidates:
        check_comparable(reference.directory, candidate.directory)
    for model in (reference, *candidates):  # one that does not fit would end the run after hours
        check_model_room(model.directory, device=model.device, precision=model.precision)
    if noise == "bf16":
        _check_bf16(reference.directory)
    with temporary_folder("loss") as scratch:
        with reference.opened(max_crops) as subject:
            engine = subject.runtime.engine
            on_answer = on_model(reference.info.name, len(questions))
            trace = record_reference(subject, questions, scratch / "trace", on_answer)
            routed = _Routed(trace, subject)
        routed.choose(reference)
        loss = Loss(
            reference=reference.info,
            engine=engine,
            suites=tuple(suites),
            images=len({answered.image for answered in trace.answers}),
            questions=len(trace.answers),
            tokens=sum(len(answered.targets) for answered in trace.answers),
            noise_kind=noise,
            noise=None,
            candidates=(),
        )
        if noise != "none":
            on_answer = on_model(f"noise ({noise})", len(trace.answers))
            loss = replace(loss, noise=_noise(noise, reference, trace, routed, max_crops, on_answer))
            on_measured(loss)
        for candidate in candidates:
            on_answer = on_model(candidate.info.name, len(trace.answers) + len(_parted(trace).answers))
            measured = _measure(candidate, trace, routed, max_crops, on_answer)
            loss = replace(loss, candidates=(*loss.candidates, measured))
            on_measured(loss)
    return loss


def _measure(
    model: ModelSpec,
    trace: ReferenceOutputs,
    routed: _Routed,
    max_crops: int | None,
    on_answer: Callable[[], None],
    *,
    perturbed: bool = False,
) -> ModelLoss:
    with model.opened(max_crops, perturbed=perturbed) as subject:
        comparison, engine = compare(trace, subject, on_answer=on_answer), subject.runtime.engine
        parts = None if perturbed else _parts(trace, subject, comparison, on_answer)
        rows = routed.rows(subject)
    kept = routed.kept(model, rows)
    return ModelLoss(
        model.info, engine, comparison, compute_metrics(comparison, kept), compare_scores(comparison.answers), parts
    )


def _parted(trace: ReferenceOutputs) -> ReferenceOutputs:
    """A question of each of some images, evenly from all: one that asks for points where there is one."""
    groups = evenly(list(trace.by_image()), PARTED)
    chosen = (next((a for a in group if a.question.kind == "point"), group[0]) for group in groups)
    return replace(trace, answers=tuple(chosen))


def _parts(
    trace: ReferenceOutputs, subject: ModelUnderTest, comparison: Comparison, on_answer: Callable[[], None]
) -> LossBreakdown:
    some = _parted(trace)
    asked = {id(answered.question) for answered in some.answers}
    whole = Comparison(answers=[a for a in comparison.answers if id(a.question) in asked])
    alone = None
    if any(image.cells is None or image.cells.worst > 0 for image in comparison.images):
        alone = compute_metrics(compare(some, subject, encode_images=False, on_answer=on_answer))
    return LossBreakdown(len(some.answers), compute_metrics(whole), alone)


def check_comparable(reference: Path, candidate: Path) -> None:
    """Raises LossError for another tokenizer or other crops: their prompts would not be the same."""
    a, b = load_tokenizer(reference), load_tokenizer(candidate)
    if a.definition != b.definition:
        raise LossError(f"{candidate} has another tokenizer than {reference}: its answers cannot be compared")
    one, other = _config(reference), _config(candidate)
    if one.image != other.image:
        raise LossError(f"{candidate} crops images otherwise than {reference}: its answers cannot be compared")
    if one.decoder.n_experts != other.decoder.n_experts or one.decoder.n_layers != other.decoder.n_layers:
        raise LossError(f"{candidate} is not a smaller form of {reference}: its decoder has another shape")


def _config(directory: Path) -> MolmoConfig:
    return open_bundle(directory).config if is_bundle(directory) else read_config(directory)


def _noise(
    kind: str,
    reference: ModelSpec,
    trace: ReferenceOutputs,
    routed: _Routed,
    max_crops: int | None,
    on_answer: Callable[[], None],
) -> ModelLoss:
    name = f"noise ({kind})"
    if kind == "threads":
        return _measure(replace(reference, threads=1, name=name), trace, routed, max_crops, on_answer, perturbed=True)
    runtime = _bf16(reference.directory)
    try:
        subject = ModelUnderTest(runtime, load_tokenizer(reference.directory), max_crops)
        comparison, engine = compare(trace, subject, on_answer=on_answer), runtime.engine
    finally:
        runtime.close()
    info = replace(reference.info, name=name)
    return ModelLoss(info, engine, comparison, compute_metrics(comparison), compare_scores(comparison.answers))


def _check_bf16(directory: Path) -> None:
    """Raises LossError where the weights cannot be had on PyTorch."""
    try:
        import onnx  # noqa: F401
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise LossError(f"noise in bf16 needs {error.name}: {pip_command('torch,export')}") from None
    if is_bundle(directory) and open_bundle(directory).components["decoder"].engine == "gguf":
        raise LossError(f"{directory} has a GGUF, which PyTorch does not read: choose another noise than bf16")
    _choose_bf16(_config(directory), reading=model_info(directory).bytes if is_bundle(directory) else 0)


def _choose_bf16(config: MolmoConfig, reading: int = 0) -> str:
    """Raises PrecisionError where the weights do not fit into memory beside `reading` bytes."""
    from molmo_edge.modeling.precision import choose_precision

    free = available_memory()
    return choose_precision(config, "bf16", "cpu", None if free is None else free - reading)


def _bf16(directory: Path) -> PartedRuntime:
    """The model's weights on PyTorch, in bfloat16; a bundle's are read back."""
    from molmo_edge.export.source import open_source
    from molmo_edge.modeling.weights import build_model
    from molmo_edge.runtimes.torch import TorchRuntime

    config, tensors = open_source(directory)
    precision = _choose_bf16(config)
    return TorchRuntime.from_model(build_model(config, tensors, where=str(directory), precision=precision))


class _Routed:
    """Which experts the reference chose for some questions, evenly from all of them."""

    def __init__(self, trace: ReferenceOutputs, subject: ModelUnderTest) -> None:
        groups = list(trace.by_image()) if subject.runtime.config.decoder.n_experts else []
        self._asked = [group[0] for group in evenly(groups, ROUTED)]
        self._rows = self.rows(subject)
        self._choices: list[np.ndarray] | None = None

    def choose(self, reference: ModelSpec) -> None:
        """With its runtime closed: the decoder is loaded again, with its routers shown."""
        if self._asked:
            self._choices = router_choices(reference.directory, self._rows, **_how(reference))
        self._rows = []

    def rows(self, subject: ModelUnderTest) -> list[np.ndarray]:
        """What the decoder is fed with for each question and the reference's answer to it."""
        return [_rows(subject, answered) for answered in self._asked]

    def kept(self, model: ModelSpec, rows: list[np.ndarray]) -> list[float] | None:
        """The share of the reference's choices that `model` makes, by question; None for a dense decoder."""
        if self._choices is None:
            return None
        choices = router_choices(model.directory, rows, **_how(model))
        assert choices is not None
        return [agreement(a, b) for a, b in zip(self._choices, choices, strict=True)]


def _how(model: ModelSpec) -> dict[str, Any]:
    return {"threads": model.threads, "precision": model.precision, "engine_options": model.engine_options}


def _rows(subject: ModelUnderTest, answered: ReferenceAnswer) -> np.ndarray:
    runtime, seen = subject.runtime, subject.prepare(answered.question)
    image = with_features(runtime, seen.prompt, runtime.encode_image(seen.crops, seen.masks, seen.overview))
    ids = np.concatenate([text_ids(subject.tokenizer, [answered.question.text]), answered.targets[:-1]])
    return np.concatenate([image, runtime.embed(ids)])
