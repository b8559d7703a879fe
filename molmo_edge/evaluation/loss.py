"""What smaller models lose against a reference, and how much of the difference is noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
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
from molmo_edge.runtimes import LlamaOptions, check_model_room, open_runtime
from molmo_edge.runtimes.prompt_embeddings import with_features
from molmo_edge.system.extras import pip_command
from molmo_edge.system.memory import available_memory
from molmo_edge.system.scratch import temporary_folder

ROUTING_QUESTIONS = 16  # whose expert choices are compared
BREAKDOWN_IMAGES = 16  # asked again with the reference's image features, to measure only the decoder
NOISES = ("threads", "bf16", "none")


class LossError(MolmoEdgeError):
    """Models that do not take the same prompts, or a noise that cannot be measured."""


@dataclass(frozen=True)
class ModelSpec:
    """A bundle or a checkpoint, and how to run it."""

    directory: Path
    precision: str = "auto"  # of a checkpoint
    device: str = "auto"
    threads: int | None = None
    engine_options: LlamaOptions | None = None
    name: str = ""  # in reports; "": the directory's name

    @property
    def info(self) -> ModelInfo:
        """Name, precision and size. Raises BundleError for a damaged bundle."""
        info = model_info(self.directory, self.precision)
        return replace(info, name=self.name or info.name)

    @contextmanager
    def opened(self, max_crops: int | None = None, *, perturbed: bool = False) -> Iterator[ModelUnderTest]:
        """Load the model, and close it at the end of the block. `perturbed`: see `ModelUnderTest`."""
        runtime = open_runtime(
            self.directory,
            device=self.device,
            precision=self.precision,
            threads=self.threads,
            engine_options=self.engine_options,
            max_crops=max_crops,
        )
        try:
            yield ModelUnderTest(runtime, load_tokenizer(self.directory), max_crops, perturbed)
        finally:
            runtime.close()

    def router_choices(self, prompts: Sequence[np.ndarray]) -> list[np.ndarray] | None:
        """See `molmo_edge.evaluation.routing.router_choices`."""
        return router_choices(
            self.directory,
            prompts,
            threads=self.threads,
            precision=self.precision,
            engine_options=self.engine_options,
        )


@dataclass(frozen=True)
class LossBreakdown:
    """Metrics on one question per image, with the candidate's own image features and with the reference's."""

    questions: int
    whole: dict[str, Estimate]
    decoder: dict[str, Estimate] | None  # with the reference's features; None where the candidate's are identical

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ModelLoss:
    """What a candidate loses, or the noise."""

    info: ModelInfo
    engine: str
    comparison: Comparison
    metrics: dict[str, Estimate]
    scores: dict[str, dict[str, ScoreComparison]]  # {group: {score: ...}}
    breakdown: LossBreakdown | None = None  # of a candidate
    rotation_differs: tuple[str, ...] = ()  # components that are rotated in the candidate or the reference alone

    def to_dict(self) -> dict[str, Any]:
        """For JSON: metrics as "figures", the breakdown as "parts"; without the compared answers."""
        return {
            **asdict(self.info),
            "engine": self.engine,
            **({"rotation_differs": list(self.rotation_differs)} if self.rotation_differs else {}),
            **({} if self.breakdown is None else {"parts": self.breakdown.to_dict()}),
            "figures": {name: estimate.to_dict() for name, estimate in self.metrics.items()},
            "scores": {
                group: {name: asdict(score) for name, score in by_name.items()}
                for group, by_name in self.scores.items()
            },
        }


@dataclass(frozen=True)
class Loss:
    """The losses of all candidates against one reference, and the noise to compare them with."""

    reference: ModelInfo
    engine: str
    suites: tuple[str, ...]
    images: int
    questions: int
    tokens: int  # of the reference's answers, with their end tokens
    noise_kind: str  # one of NOISES
    noise: ModelLoss | None
    candidates: tuple[ModelLoss, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "reference": {**asdict(self.reference), "engine": self.engine},
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
    on_model: Callable[[str, int], Callable[[], None]] = lambda _name, _questions: lambda: None,
    on_measured: Callable[[Loss], None] = lambda _: None,
    on_skipped: Callable[[str], None] | None = None,
) -> Loss:
    """Ask the reference, then ask each candidate the same. One model is in memory at a time.

    The temporary folder holds the reference's logits: 4 bytes per vocabulary entry and token.

    Args:
        suites: Names for the report.
        noise: How the reference is varied to measure noise: "threads" (one thread, pixels changed by a millionth),
            "bf16" (weights in bf16 on PyTorch) or "none".
        on_model: Called as (name, number of questions) for each model; the result is called after each answer.
        on_measured: Called with the results so far after each model.
        on_skipped: Called with the reason for each image that cannot be read, whose questions are then left out. None:
            such an image raises ImageError.

    Raises:
        LossError: The models do not take the same prompts, or `noise` cannot be measured.
        NoQuestionsError: No question is about an image that can be read.
    """
    if noise not in NOISES:
        raise LossError(f'noise "{noise}" is not known (known: {", ".join(NOISES)})')
    for candidate in candidates:
        check_comparable(reference.directory, candidate.directory)
    for spec in (reference, *candidates):  # now rather than after hours
        check_model_room(spec.directory, device=spec.device, precision=spec.precision)
    if noise == "bf16":
        _check_bf16(reference.directory)
    with temporary_folder("loss") as scratch:
        with reference.opened(max_crops) as model:
            engine = model.runtime.engine
            on_answer = on_model(reference.info.name, len(questions))
            outputs = record_reference(model, questions, scratch / "reference", on_answer, on_skipped)
            routing = _Routing(outputs, model)
        routing.record(reference)
        loss = Loss(
            reference=reference.info,
            engine=engine,
            suites=tuple(suites),
            images=len({answer.image for answer in outputs.answers}),
            questions=len(outputs.answers),
            tokens=sum(len(answer.targets) for answer in outputs.answers),
            noise_kind=noise,
            noise=None,
            candidates=(),
        )
        if noise != "none":
            varied = replace(reference, name=f"noise ({noise})", threads=1 if noise == "threads" else reference.threads)
            on_answer = on_model(varied.name, len(outputs.answers))
            if noise == "threads":
                opened = varied.opened(max_crops, perturbed=True)
                measured = _measure_model(varied, opened, outputs, on_answer, routing)
            else:
                measured = _measure_model(varied, _opened_in_bf16(varied.directory, max_crops), outputs, on_answer)
            loss = replace(loss, noise=measured)
            on_measured(loss)
        for candidate in candidates:
            differs = rotation_differs(reference.directory, candidate.directory)
            again = 0 if differs else len(_one_per_image(outputs).answers)
            on_answer = on_model(candidate.info.name, len(outputs.answers) + again)
            opened = candidate.opened(max_crops)
            measured = _measure_model(
                candidate, opened, outputs, on_answer, routing, break_down=not differs, differs=differs
            )
            loss = replace(loss, candidates=(*loss.candidates, measured))
            on_measured(loss)
    return loss


def _measure_model(
    spec: ModelSpec,
    opened: AbstractContextManager[ModelUnderTest],
    outputs: ReferenceOutputs,
    on_answer: Callable[[], None],
    routing: _Routing | None = None,
    *,
    break_down: bool = False,
    differs: tuple[str, ...] = (),
) -> ModelLoss:
    """Compare one model with the reference's recorded outputs."""
    with opened as model:
        comparison, engine = compare(outputs, model, rotated=differs, on_answer=on_answer), model.runtime.engine
        breakdown = _break_down(outputs, model, comparison, on_answer) if break_down else None
        prompts = routing.prompts(model) if routing else []
    metrics = compute_metrics(comparison, routing.agreement(spec, prompts) if routing else None)
    return ModelLoss(spec.info, engine, comparison, metrics, compare_scores(comparison.answers), breakdown, differs)


def _one_per_image(outputs: ReferenceOutputs) -> ReferenceOutputs:
    """One question for each of up to BREAKDOWN_IMAGES images: one that asks for points if there is one."""
    groups = evenly(list(outputs.by_image()), BREAKDOWN_IMAGES)
    chosen = (next((a for a in group if a.question.kind == "point"), group[0]) for group in groups)
    return replace(outputs, answers=tuple(chosen))


def _break_down(
    outputs: ReferenceOutputs, model: ModelUnderTest, comparison: Comparison, on_answer: Callable[[], None]
) -> LossBreakdown:
    some = _one_per_image(outputs)
    asked = {id(answer.question) for answer in some.answers}
    whole = Comparison(answers=[a for a in comparison.answers if id(a.question) in asked])
    decoder = None
    if any(image.cells is None or image.cells.worst > 0 for image in comparison.images):
        decoder = compute_metrics(compare(some, model, encode_images=False, on_answer=on_answer))
    return LossBreakdown(len(some.answers), compute_metrics(whole), decoder)


def check_comparable(reference: Path, candidate: Path) -> None:
    """Raise LossError if the models differ in tokenizer, crops or decoder size, so that prompts would differ."""
    if load_tokenizer(reference).definition != load_tokenizer(candidate).definition:
        raise LossError(f"{candidate} and {reference} have different tokenizers: their answers cannot be compared")
    a, b = _config(reference), _config(candidate)
    if a.image != b.image:
        raise LossError(f"{candidate} and {reference} crop images differently: their answers cannot be compared")
    if (a.decoder.n_experts, a.decoder.n_layers) != (b.decoder.n_experts, b.decoder.n_layers):
        raise LossError(f"{candidate} is not a smaller form of {reference}: their decoders differ in layers or experts")


def rotation_differs(reference: Path, candidate: Path) -> tuple[str, ...]:
    """The components whose hidden channels an export rotated in one of the two models only."""
    a, b = (
        frozenset(open_bundle(directory).manifest.rotated if is_bundle(directory) else ())
        for directory in (reference, candidate)
    )
    return tuple(sorted(a ^ b))


def _config(directory: Path) -> MolmoConfig:
    return open_bundle(directory).config if is_bundle(directory) else read_config(directory)


def _check_bf16(directory: Path) -> None:
    """Raise LossError if the weights cannot be run on PyTorch."""
    try:
        import onnx  # noqa: F401
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise LossError(f"noise in bf16 needs {error.name}: {pip_command('torch,export')}") from None
    if is_bundle(directory) and open_bundle(directory).components["decoder"].engine == "gguf":
        raise LossError(f"{directory} has a GGUF decoder, which PyTorch cannot read: use --noise threads or none")
    _choose_bf16(_config(directory), reading=model_info(directory).bytes if is_bundle(directory) else 0)


def _choose_bf16(config: MolmoConfig, reading: int = 0) -> str:
    """Raise PrecisionError if the weights do not fit into memory beside `reading` bytes."""
    from molmo_edge.modeling.precision import choose_precision

    free = available_memory()
    return choose_precision(config, "bf16", "cpu", None if free is None else free - reading)


@contextmanager
def _opened_in_bf16(directory: Path, max_crops: int | None) -> Iterator[ModelUnderTest]:
    """The weights in bfloat16 on PyTorch; a bundle's are read back from its graphs."""
    from molmo_edge.export.source import open_source
    from molmo_edge.modeling.weights import build_model
    from molmo_edge.runtimes.torch import TorchRuntime

    config, tensors = open_source(directory)
    precision = _choose_bf16(config)
    runtime = TorchRuntime.from_model(build_model(config, tensors, where=str(directory), precision=precision))
    try:
        yield ModelUnderTest(runtime, load_tokenizer(directory), max_crops)
    finally:
        runtime.close()


class _Routing:
    """The experts that the reference's routers choose for some questions, to compare others with."""

    def __init__(self, outputs: ReferenceOutputs, model: ModelUnderTest) -> None:
        groups = list(outputs.by_image()) if model.runtime.config.decoder.n_experts else []
        self._answers = [group[0] for group in evenly(groups, ROUTING_QUESTIONS)]
        self._prompts = self.prompts(model)
        self._choices: list[np.ndarray] | None = None

    def record(self, reference: ModelSpec) -> None:
        """Call this after closing the reference's runtime: the decoder is loaded again, with its routers as outputs."""
        if self._answers:
            self._choices = reference.router_choices(self._prompts)
        self._prompts = []

    def prompts(self, model: ModelUnderTest) -> list[np.ndarray]:
        """The decoder's inputs [n, d_model] for each question and the reference's answer."""
        return [_decoder_inputs(model, answer) for answer in self._answers]

    def agreement(self, spec: ModelSpec, prompts: list[np.ndarray]) -> list[float] | None:
        """The share of the reference's choices that a model makes too, by question; None for a dense decoder."""
        if self._choices is None:
            return None
        choices = spec.router_choices(prompts)
        assert choices is not None
        return [agreement(a, b) for a, b in zip(self._choices, choices, strict=True)]


def _decoder_inputs(model: ModelUnderTest, answer: ReferenceAnswer) -> np.ndarray:
    runtime, inputs = model.runtime, model.prepare(answer.question)
    patches, cells = inputs.part.features(runtime)
    image = with_features(runtime, inputs.prompt, cells)
    question = runtime.embed(text_ids(model.tokenizer, [answer.question.text]))
    grounding = inputs.grounding(runtime, model.tokenizer, patches, cells)
    embed = runtime.embed if grounding is None else grounding.embed
    return np.concatenate([image, question, embed(np.array(answer.targets[:-1], np.int64))])
