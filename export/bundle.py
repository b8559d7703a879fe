"""Export a bundle: four ONNX graphs (or three and a GGUF decoder), the tokenizer, and the manifest."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge.checkpoints.bundle import is_bundle, open_bundle
from molmo_edge.checkpoints.manifest import (
    GRAPHS,
    MANIFEST,
    POINT_HEAD,
    TOKENIZER,
    TOLERANCE,
    Check,
    Component,
    Manifest,
    ScaleTraining,
    Source,
    Target,
    graph_names,
    write_manifest,
)
from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.export.activation_ranges import measure_ranges, overflows
from molmo_edge.export.component_errors import measure_errors
from molmo_edge.export.component_graphs import build_component, count_weights, fits_float32
from molmo_edge.export.errors import ExportError
from molmo_edge.export.graph_builder import Graph
from molmo_edge.export.int4_graph import Int4
from molmo_edge.export.options import ExportOptions, ExportPlan, check_options
from molmo_edge.export.source import open_source
from molmo_edge.export.staging import publish, staged
from molmo_edge.export.trial_run import check_runs
from molmo_edge.frontend.image_files import load_image
from molmo_edge.frontend.prompts import build_prompt
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.quantize import QuantizeError
from molmo_edge.quantize.calibration_prompts import DecoderInput, embed_prompts
from molmo_edge.quantize.rotation import rotated, rotated_parts
from molmo_edge.quantize.rounding import Blocks
from molmo_edge.runtimes.onnx import OnnxRuntime
from molmo_edge.system.files import sha256_of
from molmo_edge.system.lazy import cached_property
from molmo_edge.system.memory import check_room
from molmo_edge.system.version import __version__


@dataclass(frozen=True)
class CheckPhoto:
    """A photo and a question. Their answer (`Molmo.ask(image, question)`) is recorded in the bundle.

    `molmo-edge verify` compares a copy's answer with it, and checksums of the stages between photo and answer
    (molmo_edge/sdk/stage_checksums.py).
    """

    image: Path
    question: str
    max_new_tokens: int = 64
    tolerance: float = TOLERANCE  # percent of a side that a point may move


def export_bundle(
    checkpoint: str | Path,
    out: str | Path,
    precision: str | Mapping[str, str] | None = None,
    *,
    engine: str = "onnx",
    target: str | None = None,
    plain: bool = False,
    block: int | None = None,
    asymmetric: bool = False,
    calibrate: str | Path | None = None,
    mmproj: bool = False,
    rotate: bool = False,
    drafting: bool = False,
    train_scales: int = 0,
    cache: str | None = None,
    name: str | None = None,
    check: CheckPhoto | None = None,
    measure: bool = True,
    on_pass: Callable[[int, float], None] = lambda _n, _kl: None,
) -> dict[str, Any]:
    """Convert `checkpoint` to a bundle directory `out`, which must not exist yet. Returns the manifest.

    Args:
        checkpoint: a directory in hub layout or in the reference's own layout, or a bundle, whose weights are restored.
        precision: a name for the whole bundle, or a mapping of components ("vision_encoder", "connector",
            "embed_tokens", "decoder"; "point_head" of a MolmoPoint) and of parts of an ONNX decoder ("attention",
            "experts", "router", "head") to names; molmo_edge.export.precisions lists them. Default: the target's, or
            fp32 (of a GGUF decoder f16). The point head is fp32 unless it is named.
        engine: of the decoder, "onnx" or "gguf" (llama.cpp). The other components are ONNX with either.
        target: a kind of machine whose precisions are the defaults, one of molmo_edge.export.targets.TARGETS.
        plain: use standard ONNX operators only, for engines without ONNX Runtime's; fp32, fp16 or int8.
        block: number of four-bit weights that share a scale: 32, 64 or 128.
        asymmetric: store a zero point for each of these blocks.
        calibrate: a folder of photos (molmo_edge.quantize.calibration.find_prompts) to calibrate the decoder with: GPTQ
            for four-bit weights, smoothing for int8, an importance matrix for a GGUF. Slower, but closer to fp32.
        mmproj: with "gguf", also write the vision tower and the connector as a GGUF (molmo_edge.export.mmproj).
        rotate: rotate the hidden channels before rounding (molmo_edge.quantize.rotation): closer to fp32 at the same
            speed and size. Not for decoders with norms after their branches (OLMo).
        drafting: with "onnx", let the decoder verify several tokens in one run, as `Molmo(draft=...)` uses it. A run of
            a single token takes a few percent longer.
        train_scales: passes over the photos of `calibrate` in which the scales of four-bit weights are trained against
            the float32 decoder (molmo_edge.quantize.scale_training). 0: none.
        cache: "int8" stores keys and values in eight bits with "onnx" (molmo_edge.export.int8_cache): a quarter of
            their memory, faster tokens, slower prompts. Needs `calibrate`, and ONNX Runtime 1.32 or later.
        name: in the manifest; default: that of `out`.
        check: a photo and a question to record in the bundle. Default: those of `checkpoint`, if it is a
            bundle with a check; they are answered again.
        measure: compare quantised components with their fp32 form and write the errors into the manifest. Decoders of
            more than 4 GB in fp32 are left out. Errors of rounded weights are always written.
        on_pass: of `train_scales`, called with the number of a pass, from 0 for the untrained scales, and its KL
            divergence on the held-out prompts in nats per token. The manifest records them and the pass that was kept.

    `out` is created atomically. Memory holds one component while its graph is written; of components over
    100 MB one matrix and a few copies, the whole table of embeddings, and all experts of a layer (537 MB in MolmoE-1B).
    A calibration holds one layer in float32, `train_scales` four times the decoder. `measure` and `check` hold the
    finished bundle.

    Raises ExportError, CheckpointError, ConfigError or TokenizerError, and ImageError or PromptError for a `check`
    that cannot be answered, before anything is converted.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    options = ExportOptions(
        precision, engine, target, plain, block, asymmetric, calibrate, mmproj, rotate, drafting, train_scales, cache
    )
    plan = check_bundle_options(out, check, options)
    config, tensors = open_source(checkpoint)
    if mmproj:
        _check_mmproj(config)
    if config.point_head is None and plan.point_head != "fp32":
        raise ExportError(f"this model has no {POINT_HEAD}: leave its precision out")
    if config.point_head is not None and drafting:
        raise ExportError("this model points by grounding tokens, which cannot be drafted: leave drafting out")
    parts = open_bundle(checkpoint).manifest.rotated if is_bundle(checkpoint) else ()
    if rotate:
        if parts:
            raise ExportError(f"{checkpoint} was exported with rotate: its channels stay rotated, leave rotate out")
        parts = rotated_parts(config)
        try:
            config, tensors = rotated(config, tensors)
        except QuantizeError as error:
            raise ExportError(str(error)) from None
    check = check or _check_of(checkpoint)
    tokenizer = Tokenizer.from_file(checkpoint / TOKENIZER)
    with staged(out, _disk_needed(config, tensors, plan, measure=measure)) as scratch:
        export = _BundleExport(plan, config, tensors, tokenizer, scratch, name or out.name, on_pass, parts)
        try:
            export.write_components()
        except QuantizeError as error:
            raise ExportError(str(error)) from error
        if cache is not None:
            export.round_cache()
        check_runs(config, export.files)
        if measure and any(map(plan.is_quantized, GRAPHS)):
            export.measure_errors()
        manifest = export.write_manifest(checkpoint, check)
        publish(export.directory, out)
    return manifest


def check_bundle_options(out: Path, check: CheckPhoto | None, options: ExportOptions) -> ExportPlan:
    """Check the arguments of `export_bundle`, so that errors come before a checkpoint is downloaded.

    Raises ExportError, and ImageError or PromptError for a `check` that cannot be answered.
    """
    if out.exists():
        raise ExportError(f"{out} exists already: remove it, or choose another directory")
    if check is not None:
        load_image(check.image)
        build_prompt(check.question)
    return check_options(options)


@dataclass
class _BundleExport:
    """An export in progress. Files are written to `directory`, and listed in `components`."""

    plan: ExportPlan
    config: MolmoConfig
    tensors: TensorSource
    tokenizer: Tokenizer
    scratch: Path
    name: str
    on_pass: Callable[[int, float], None]
    rotated: tuple[str, ...] = ()  # components, see Manifest
    trained_scales: ScaleTraining | None = None  # of the decoder
    components: dict[str, Component] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        return self.scratch / "bundle"

    @property
    def files(self) -> dict[str, Path]:
        """The model files written so far, by component."""
        return {
            name: self.directory / self.components[name].file
            for name in graph_names(self.config)
            if name in self.components
        }

    def write_components(self) -> None:
        self.directory.mkdir()
        ranges = measure_ranges(self.scratch / "ranges", self.config, self.tensors, self.plan)
        graphs = [graph for graph in self.plan.graphs if graph != "decoder"]
        if self.config.point_head is not None:
            graphs.append(POINT_HEAD)
        if "decoder" in self.plan.graphs:
            graphs.append("decoder")  # last: a calibration runs all others
        for component in graphs:
            if component == "decoder" and self.plan.calibration is not None and self.plan.uses_calibration:
                tensors, int4 = self._calibrated()
            else:
                tensors, int4 = self.tensors, self.plan.int4
            self._write_graph(component, tensors, int4, ranges.get(component, {}))
            del tensors, int4  # a calibration holds a layer of the decoder
        if self.plan.engine == "gguf":
            self._write_gguf()

    def _write_graph(self, component: str, tensors: TensorSource, int4: Int4, ranges: dict[str, float]) -> None:
        keep_fp32 = overflows(ranges)
        precision = self.plan.graph_precision(component, int4, keep_fp32)
        path, plain = self.directory / f"{component}{precision.suffix}.onnx", component in self.plan.plain
        drafts = component == "decoder" and self.plan.drafting
        graph = build_component(component, path, self.config, tensors, precision, plain=plain, drafts=drafts)
        self.components[component] = Component.from_file(
            path,
            engine="onnx",
            precision=precision.name,
            onnxruntime=".".join(map(str, graph.needs)),
            operators="onnx" if plain else "",
            drafting=drafts,
            weight_errors=_weight_errors(graph),
            largest_value=max(ranges.values(), default=nan) if precision.half else None,
            kept_in_fp32=tuple(sorted(keep_fp32)) if precision.half else (),
            trained_scales=self.trained_scales if component == "decoder" else None,
        )
        if graph.sidecar is not None:
            self.components[f"{component}_data"] = Component.from_file(graph.sidecar)

    def _write_gguf(self) -> None:
        from molmo_edge.export.gguf import export_decoder

        importance = None
        if self.plan.calibration is not None:
            from molmo_edge.quantize.importance import importance as compute_importance

            importance = compute_importance(self.config, self.tensors, self._calibration_inputs)
        precision = self.plan.precision["decoder"]
        path = export_decoder(
            self.directory, self.scratch, self.tokenizer, self.config, self.tensors, precision, self.name, importance
        )
        note = "" if importance is None else "mean squares of its inputs on photos"
        self.components["decoder"] = Component.from_file(path, engine="gguf", precision=precision, importance=note)
        if self.plan.mmproj:
            from molmo_edge.export.mmproj import write_mmproj

            path = self.directory / "mmproj-f16.gguf"
            write_mmproj(path, self.config, self.tensors, self.tokenizer, self.name)
            self.components["mmproj"] = Component.from_file(path, engine="gguf", precision="f16")

    def round_cache(self) -> None:
        """Make the decoder's cache int8."""
        from molmo_edge.export.int8_cache import ONNXRUNTIME, round_cache

        round_cache(self.config, self.files, self._calibration_inputs)
        old = self.components["decoder"]
        file = Component.from_file(self.directory / old.file)
        self.components["decoder"] = replace(
            old, sha256=file.sha256, bytes=file.bytes, onnxruntime=ONNXRUNTIME, cache="int8"
        )

    @cached_property
    def _calibration_inputs(self) -> list[DecoderInput]:
        """The decoder's input for each prompt of the calibration."""
        assert self.plan.calibration is not None
        runtime = OnnxRuntime(self.config, self.files)
        try:
            return embed_prompts(self.plan.calibration, runtime, self.tokenizer)
        finally:
            runtime.close()

    def _calibrated(self) -> tuple[TensorSource, Int4]:
        """The decoder's weights, smoothed where int8 will round them, and the rounding of its four-bit ones."""
        from molmo_edge.quantize.calibration import Calibration
        from molmo_edge.quantize.smoothing import smoothed

        inputs, tensors = self._calibration_inputs, self.tensors
        if parts := self.plan.smoothed_parts:
            tensors = smoothed(self.config, tensors, inputs, parts)
        if "q4" not in self.plan.decoder_formats.values():
            return tensors, self.plan.int4
        int4 = replace(self.plan.int4, round=Calibration(self.config, tensors, inputs))
        return tensors, self._trained(tensors, inputs, int4) if self.plan.train_scales else int4

    def _trained(self, tensors: TensorSource, inputs: list[DecoderInput], int4: Int4) -> Int4:
        """The matrices that `int4` rounds, with trained scales."""
        from molmo_edge.quantize.scale_training import memory_needed, train_scales

        lengths = [len(one.embeddings) for one in inputs]
        check_room(memory_needed(self.config, count_weights("decoder", self.config, tensors), lengths), "train_scales")
        rounded: dict[str, Blocks] = {}

        def record(name: str, weight: np.ndarray, block: int, asymmetric: bool) -> Blocks:
            rounded[name] = int4.round(name, weight, block, asymmetric)
            return rounded[name]

        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:  # a graph whose scales are not trained
            precision = self.plan.graph_precision("decoder", replace(int4, round=record))
            build_component("decoder", Path(folder, "decoder.onnx"), self.config, tensors, precision)
        divergences: list[float] = []

        def on_pass(number: int, divergence: float) -> None:
            divergences.append(divergence)
            self.on_pass(number, divergence)

        trained = train_scales(self.config, tensors, inputs, rounded, self.plan.train_scales, on_pass=on_pass)
        if divergences:
            kept = min(range(len(divergences)), key=divergences.__getitem__)
            self.trained_scales = ScaleTraining(kept, tuple(float(f"{value:.4g}") for value in divergences))
        return replace(int4, round=lambda name, *_: trained[name])

    def measure_errors(self) -> None:
        errors = measure_errors(self.scratch / "fp32", self.config, self.tensors, self.plan, self.files)
        for component, error in errors.items():
            self.components[component] = replace(
                self.components[component], max_error=error.largest, relative_error=error.relative
            )

    def write_manifest(self, checkpoint: Path, check: CheckPhoto | None) -> dict[str, Any]:
        tokenizer = shutil.copyfile(checkpoint / TOKENIZER, self.directory / TOKENIZER)
        target = self.plan.target
        manifest = Manifest(
            name=self.name,
            config=self.config,
            special_ids=self.tokenizer.special,
            components={**self.components, "tokenizer": Component.from_file(tokenizer)},
            created_by=f"molmo-edge {__version__}",
            source=Source(checkpoint.resolve().name, _source_hashes(checkpoint)),
            target=None if target is None else Target(target.name, target.device, target.reason),
            rotated=self.rotated,
        )
        write_manifest(self.directory, manifest.to_dict())
        if check is not None:  # answered by the bundle itself, which therefore needs a manifest first
            manifest = replace(manifest, check=_record_check(self.directory, check))
            write_manifest(self.directory, manifest.to_dict())
        return manifest.to_dict()


def _check_mmproj(config: MolmoConfig) -> None:
    if config.conv_tower is not None or config.extra_vision:
        raise ExportError("mmproj supports one vision tower, but this model has several: leave mmproj out")
    if config.vision.image_model_type == "siglip" or config.image.pools_across_crops or not config.pad_embed:
        raise ExportError("mmproj supports only the vision tower and the connector of Molmo v1: leave mmproj out")


def _weight_errors(graph: Graph) -> dict[str, tuple[float, float]]:
    """For each rounded matrix the norm of the error over that of the weights, and the largest error."""
    return {name: (float(f"{e.relative:.3g}"), float(f"{e.largest:.3g}")) for name, e in graph.errors.items()}


def _disk_needed(config: MolmoConfig, tensors: TensorSource, plan: ExportPlan, *, measure: bool) -> int:
    """An upper estimate in bytes, with graphs in float32 for measurements and without scales of rounded weights."""
    weights = {component: count_weights(component, config, tensors) for component in graph_names(config)}
    graphs = [*plan.graphs, *([POINT_HEAD] if config.point_head else [])]
    written = sum(weights[component] * plan.graph_precision(component).bytes_per_weight for component in graphs)
    if plan.engine == "gguf":  # quantised types are made from a 16-bit file, see molmo_edge.export.gguf
        written += weights["decoder"] * {"f32": 4, "f16": 2, "bf16": 2}.get(plan.precision["decoder"], 3)
        written += 2 * (weights["vision_encoder"] + weights["connector"]) * plan.mmproj
    float32 = sum(4 * count for name, count in weights.items() if fits_float32(name, config, tensors))
    errors = float32 if measure and any(map(plan.is_quantized, GRAPHS)) else 0
    written += weights["decoder"] * (plan.graph_precision("decoder").bytes_per_weight if plan.train_scales else 0)
    ranges = float32 if any(plan.graph_precision(component).half for component in plan.graphs) else 0
    return max(int(written + errors), ranges)


def _source_hashes(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of the weights and the configuration of a checkpoint, or of the manifest of a bundle."""
    patterns = (MANIFEST, "config.json", "config.yaml", "model*.safetensors", "pytorch_model.bin", "model.pt")
    return {path.name: sha256_of(path) for pattern in patterns for path in sorted(checkpoint.glob(pattern))}


def _check_of(checkpoint: Path) -> CheckPhoto | None:
    """The photo and question of a bundle with a check."""
    if not is_bundle(checkpoint) or (check := open_bundle(checkpoint).check) is None:
        return None
    length = len(check.token_ids)
    max_new_tokens = max(64, 2 * length) if check.complete else max(1, length)
    return CheckPhoto(checkpoint / check.image.file, check.question, max_new_tokens, check.tolerance)


def _record_check(directory: Path, check: CheckPhoto) -> Check:
    from molmo_edge.selfcheck import record_check

    folder = directory / "check"
    folder.mkdir()
    image = folder / f"photo{check.image.suffix.lower()}"
    shutil.copyfile(check.image, image)
    file = f"{folder.name}/{image.name}"
    component = Component(file, image.stat().st_size, sha256_of(image))
    answer = record_check(directory, file, check.question, check.max_new_tokens)
    return Check(component, tolerance=check.tolerance, **answer)
