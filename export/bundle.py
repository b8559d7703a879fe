"""Write a bundle: four graphs, or three and a GGUF, the tokenizer, and the manifest that names them."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge.checkpoints.bundle import is_bundle, open_bundle
from molmo_edge.checkpoints.manifest import (
    FORMAT,
    FORMAT_VERSION,
    GRAPHS,
    MANIFEST,
    TOKENIZER,
    TOLERANCE,
    write_manifest,
)
from molmo_edge.checkpoints.tensor_names import head_name
from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.errors import first_line
from molmo_edge.export.activation_ranges import WATCHED, largest_values, too_large
from molmo_edge.export.component_errors import component_errors
from molmo_edge.export.connector_graph import connector
from molmo_edge.export.decoder_graph import decoder, embed_tokens
from molmo_edge.export.errors import ExportError
from molmo_edge.export.graph_builder import FP32, Graph, Precision
from molmo_edge.export.int4_graph import Int4
from molmo_edge.export.options import Wishes, check_wishes
from molmo_edge.export.source import open_source
from molmo_edge.export.staging import publish, staged
from molmo_edge.export.vision_graph import vision_encoder
from molmo_edge.frontend.crops import ImageProcessor
from molmo_edge.frontend.image_files import load_image
from molmo_edge.frontend.prompts import build_prompt
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.runtimes import EngineError, open_files
from molmo_edge.runtimes.onnx import OnnxRuntime
from molmo_edge.runtimes.prompt_embeddings import prefill
from molmo_edge.system.files import sha256_of
from molmo_edge.system.version import __version__

Builder = Callable[[Graph, MolmoConfig, TensorSource, Precision], None]
BUILDERS: dict[str, Builder] = {
    "vision_encoder": vision_encoder,
    "connector": connector,
    "embed_tokens": embed_tokens,
    "decoder": decoder,
}
# Which hub tensors a component is made of, to know its size before it is built.
_PREFIXES = {
    "vision_encoder": ("model.vision_backbone.image_vit.", "model.vision_backbone.conv_tower."),
    "connector": ("model.vision_backbone.image_p", "model.vision_backbone.pad_embed"),
    "embed_tokens": ("model.transformer.wte.",),
    "decoder": ("model.transformer.blocks.",),  # and its head, see build_component
}
_MEASURED_BELOW = 4_000_000_000  # bytes in float32; a larger decoder is not run beside its float32 form
# Bytes. An .onnx file cannot pass 2 GB, and what lies inside of one is held twice, as read and as packed.
_SIDECAR_ABOVE = 100_000_000


@dataclass(frozen=True)
class CheckPhoto:
    """What a sound copy of the bundle must be able to answer: `Molmo.ask(image, question)` is run and recorded.

    With it go sums of what lies between photo and answer (molmo_edge/sdk/stage_checksums.py), for `molmo-edge
    verify` to compare.
    """

    image: Path
    question: str
    max_new_tokens: int = 64
    tolerance: float = TOLERANCE  # percent of a side that a point may move elsewhere


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
    name: str | None = None,
    check: CheckPhoto | None = None,
    measure: bool = True,
) -> dict[str, Any]:
    """Convert `checkpoint` to a bundle directory `out`, which must not exist yet.

    `checkpoint`: a directory in hub layout or the reference's own, or a bundle, whose weights are read back.

    `engine`: of the decoder. "onnx", or "gguf": a file for llama.cpp, in one of the precisions of
    molmo_edge.quantize.llama_quantize ("f16", "q8_0", "q4_k_m", ...), the rest ONNX as before, its embeddings in
    float32;
    `mmproj` adds vision and connector as a GGUF (molmo_edge.export.mmproj).

    For ONNX `precision` is one of "fp32", "fp16" (molmo_edge.export.float16_graph), "int8", "q8"
    (molmo_edge.export.int8_graph
    says what they are) for everything; "q4", "mixed" and "q4f16", four bits for the decoder
    (molmo_edge.export.int4_graph says which) and eight or sixteen for the rest; or a mapping of components to
    them, and of
    parts of the decoder ("attention", "experts", "router", "head": molmo_edge.export.decoder_precisions). What it
    leaves out is as
    `target` wants it ("cpu-x86", "cpu-arm64", "cuda", "tensorrt", "coreml": molmo_edge.export.options), or fp32.

    `plain`: ONNX's own operators alone, for engines that lack ONNX Runtime's; fp32, fp16 or int8.
    `block`: 32, 64 or 128 four-bit weights share a scale; `asymmetric`: and a zero point. `calibrate`: a folder of
    photos to round four-bit weights with (molmo_edge.quantize.calibration) and to quieten the loud inputs of int8
    (molmo_edge.quantize.smoothing), slower, and closer to fp32; for a GGUF they tell llama.cpp which inputs matter
    (molmo_edge.quantize.importance).

    `measure`: run every component that is not fp32 or fp16 beside its fp32 form, a decoder of less than 4 GB, and write
    the errors into the manifest (molmo_edge.export.component_errors); the errors of rounded weights are there in
    any case.

    `check`: a photo and a question to record in the bundle. None: those of a `checkpoint` that is a bundle with a
    check, answered anew by the new bundle, and else none.

    Returns the manifest. `out` appears whole or not at all, whatever interrupts. While graphs are written, memory
    holds one component, and from 100 MB on one matrix of it and a few copies; for experts that is all of a layer's
    side by side (537 MB in MolmoE-1B), and for the embeddings the whole table. A calibration holds a layer in float32.
    The trial run reads larger weights from their file, but `measure` and `check` hold the finished bundle in memory,
    as any use of it does.

    Raises ExportError, CheckpointError, ConfigError or TokenizerError, and before anything is converted ImageError
    or PromptError for a `check` that could not be answered.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    wishes = check_bundle_wishes(
        out,
        check,
        precision,
        engine=engine,
        target=target,
        plain=plain,
        block=block,
        asymmetric=asymmetric,
        calibrate=calibrate,
        mmproj=mmproj,
    )
    config, tensors = open_source(checkpoint)
    if mmproj and (config.conv_tower is not None or config.extra_vision):
        raise ExportError("an mmproj holds one vision tower, and this model has two: leave mmproj out")
    if mmproj and (
        config.vision.image_model_type == "siglip" or config.image.pools_across_crops or not config.pad_embed
    ):
        raise ExportError("an mmproj holds the vision tower and the connector of Molmo v1: leave mmproj out")
    check = check or _own_check(checkpoint)
    tokenizer = Tokenizer.from_file(checkpoint / TOKENIZER)
    with staged(out, _disk_needed(config, tensors, wishes, measure=measure)) as scratch:
        staging = scratch / "bundle"
        staging.mkdir()
        components: dict[str, dict[str, Any]] = {}
        largest = _largest_values(scratch / "watched", config, tensors, wishes)
        for component in wishes.graphs:
            keep = too_large(largest.get(component, {}))
            how = wishes.int4
            weights = tensors
            if component == "decoder" and wishes.calibrate is not None:
                rows = _rows(wishes, config, tokenizer, staging, components)
                weights, how = _calibrated(wishes, config, tensors, rows)
            kind = wishes.make(component, how, keep)
            del how  # with a layer of the decoder in it
            components |= _component(component, staging, config, weights, kind, plain=component in wishes.plain)
            if kind.half:
                found = largest.get(component)
                components[component]["largest_value"] = max(found.values()) if found else None  # None: not tried
                components[component] |= {"kept_in_fp32": sorted(keep)} if keep else {}
            del kind
        if wishes.engine == "gguf":
            seen = None if wishes.calibrate is None else _rows(wishes, config, tokenizer, staging, components)
            components |= _ggufs(wishes, tokenizer, staging, scratch, config, tensors, seen, name or out.name)
        files = {component: staging / components[component]["file"] for component in BUILDERS}
        _try(config, files)
        if measure and any(map(wishes.rounds, GRAPHS)):
            _measure(components, files, scratch / "fp32", config, tensors, wishes)
        shutil.copyfile(checkpoint / TOKENIZER, staging / TOKENIZER)
        components["tokenizer"] = _entry(staging / TOKENIZER)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "name": name or out.name,
            "created_by": f"molmo-edge {__version__}",
            "model": config.to_dict(),
            "special_ids": dataclasses.asdict(tokenizer.special),
            "components": components,
            "source": {"checkpoint": checkpoint.resolve().name, "files": _sources(checkpoint)},
        }
        if wishes.target is not None:
            manifest["target"] = {
                "name": wishes.target.name,
                "device": wishes.target.device,
                "defaults": wishes.target.why,
            }
        write_manifest(staging, manifest)
        if check is not None:
            manifest["check"] = _answer(staging, check)
            write_manifest(staging, manifest)
        publish(staging, out)
    return manifest


def check_bundle_wishes(
    out: Path, check: CheckPhoto | None, precision: str | Mapping[str, str] | None = None, **wishes: Any
) -> Wishes:
    """What the export is to do. Raises for what cannot be asked for, before a checkpoint is fetched.

    `wishes`: see `export_bundle`.
    """
    if out.exists():
        raise ExportError(f"{out} exists already: remove it, or choose another directory")
    if check is not None:
        load_image(check.image)
        build_prompt(check.question)
    return check_wishes(precision, **wishes)


def _rows(
    wishes: Wishes, config: MolmoConfig, tokenizer: Tokenizer, staging: Path, components: dict[str, dict[str, Any]]
) -> list[np.ndarray]:
    """What the decoder will be fed with for the prompts of a calibration."""
    from molmo_edge.quantize.calibration import sequences

    assert wishes.calibrate is not None
    files = {name: staging / components[name]["file"] for name in BUILDERS if name != "decoder"}
    runtime = OnnxRuntime(config, files)
    try:
        return sequences(wishes.calibrate, runtime, tokenizer)
    finally:
        runtime.close()


def _calibrated(
    wishes: Wishes, config: MolmoConfig, tensors: TensorSource, rows: list[np.ndarray]
) -> tuple[TensorSource, Int4]:
    """The decoder's weights, smoothed where int8 will round them, and how its four-bit ones are rounded."""
    from molmo_edge.quantize.calibration import Calibration
    from molmo_edge.quantize.smoothing import smoothed

    if parts := wishes.smooth():
        tensors = smoothed(config, tensors, rows, parts)
    if not wishes.fours():
        return tensors, wishes.int4
    return tensors, dataclasses.replace(wishes.int4, round=Calibration(config, tensors, rows))


def _ggufs(
    wishes: Wishes,
    tokenizer: Tokenizer,
    staging: Path,
    scratch: Path,
    config: MolmoConfig,
    tensors: TensorSource,
    rows: list[np.ndarray] | None,
    name: str,
) -> dict[str, dict[str, Any]]:
    from molmo_edge.export.gguf import export_decoder

    weigh = None
    if rows is not None:
        from molmo_edge.quantize.importance import importance

        weigh = importance(config, tensors, rows)
    word = wishes.precision["decoder"]
    path = export_decoder(staging, scratch, tokenizer, config, tensors, word, name, weigh)
    made = {"decoder": _entry(path, engine="gguf", precision=word)}
    if weigh is not None:
        made["decoder"]["importance"] = "mean squares of its inputs on photos"
    if wishes.mmproj:
        from molmo_edge.export.mmproj import write_mmproj

        path = staging / "mmproj-f16.gguf"
        write_mmproj(path, config, tensors, tokenizer, name)
        made["mmproj"] = _entry(path, engine="gguf", precision="f16")
    return made


def _largest_values(
    scratch: Path, config: MolmoConfig, tensors: TensorSource, wishes: Wishes
) -> dict[str, dict[str, float]]:
    """By component that is to have float16 products: how large its numbers get, matrix by matrix."""
    half = [component for component in wishes.graphs if component != "embed_tokens" and wishes.make(component).half]
    too_heavy = 4 * _weights("decoder", config, tensors) > _MEASURED_BELOW
    if too_heavy and "decoder" in half and not config.decoder.norm_after:
        half.remove("decoder")
    if not half:
        return {}
    built = list(BUILDERS)[: list(BUILDERS).index(half[-1]) + 1]  # each needs what comes before it
    if too_heavy and "decoder" in half:
        raise ExportError(
            "this decoder has no norms in front of its matrices, so its numbers may pass what float16 holds, and it is "
            "too large to be tried here: choose decoder=q4, int8 or fp32"
        )
    scratch.mkdir()
    files = {component: scratch / f"{component}.onnx" for component in built}
    for component, path in files.items():
        build_component(component, path, config, tensors, WATCHED)
    try:
        found = largest_values(config, files)
    except Exception as error:  # onnxruntime raises its own classes, which share no base with a name
        raise _not_running(first_line(error)) from error
    shutil.rmtree(scratch)
    return {component: found[component] for component in half if found.get(component)}


def build_component(
    component: str,
    path: Path,
    config: MolmoConfig,
    tensors: TensorSource,
    precision: Precision,
    *,
    plain: bool = False,
) -> Graph:
    """Write one graph to `path`; its `sidecar` holds the large weights, if it needed one."""
    large = _weights(component, config, tensors) * precision.bytes_per_weight > _SIDECAR_ABOVE
    graph = Graph(component, path.with_name(f"{path.name}.data") if large else None, plain=plain)
    BUILDERS[component](graph, config, tensors, precision)
    graph.save(path)
    return graph


def _weights(component: str, config: MolmoConfig, tensors: TensorSource) -> int:
    """How many a component has."""
    prefixes = _PREFIXES[component]
    if component == "decoder":
        prefixes += (head_name(config.decoder),)  # with tied weights the head is a second copy of the embedding
    return sum(math.prod(tensors.shape(name)) for name in tensors.names() if name.startswith(prefixes))


def _disk_needed(config: MolmoConfig, tensors: TensorSource, wishes: Wishes, *, measure: bool) -> int:
    """Bytes that an export takes at most, its trials in float32 included and scales of rounded weights left out."""
    weights = {component: _weights(component, config, tensors) for component in GRAPHS}
    made = sum(weights[component] * wishes.make(component).bytes_per_weight for component in wishes.graphs)
    if wishes.engine == "gguf":  # rounded by way of 16 bits, see molmo_edge.export.gguf
        made += weights["decoder"] * {"f32": 4, "f16": 2, "bf16": 2}.get(wishes.precision["decoder"], 3)
        made += 2 * (weights["vision_encoder"] + weights["connector"]) * wishes.mmproj
    trials = {component: 4 * count for component, count in weights.items()}
    if trials["decoder"] > _MEASURED_BELOW:
        del trials["decoder"]
    beside = sum(trials.values()) if measure and any(map(wishes.rounds, GRAPHS)) else 0
    watched = sum(trials.values()) if any(wishes.make(component).half for component in wishes.graphs) else 0
    return max(int(made + beside), watched)


def _component(
    component: str,
    directory: Path,
    config: MolmoConfig,
    tensors: TensorSource,
    precision: Precision,
    *,
    plain: bool,
) -> dict[str, dict[str, Any]]:
    path = directory / f"{component}{precision.suffix}.onnx"
    graph = build_component(component, path, config, tensors, precision, plain=plain)
    needs = ".".join(map(str, graph.needs))
    made = {component: _entry(path, engine="onnx", precision=precision.name, onnxruntime=needs)}
    if plain:
        made[component]["operators"] = "onnx"  # its own alone
    if graph.errors:  # norm of the difference over norm of the weights, and the largest difference
        made[component]["weight_errors"] = {
            name: [float(f"{e.relative:.3g}"), float(f"{e.largest:.3g}")] for name, e in graph.errors.items()
        }
    if graph.sidecar is not None:
        made[f"{component}_data"] = _entry(graph.sidecar)
    return made


def _entry(path: Path, **more: Any) -> dict[str, Any]:
    return {"file": path.name, **more, "sha256": sha256_of(path), "bytes": path.stat().st_size}


def _sources(checkpoint: Path) -> dict[str, str]:
    """sha256 of every file of weights, and of the configuration that they were read with; of a bundle's manifest."""
    patterns = (MANIFEST, "config.json", "config.yaml", "model*.safetensors", "pytorch_model.bin", "model.pt")
    return {path.name: sha256_of(path) for pattern in patterns for path in sorted(checkpoint.glob(pattern))}


def _try(config: MolmoConfig, files: dict[str, Path]) -> None:
    """No bundle leaves without having run: weights that do not fit their config.json show here.

    Weights in sidecars and GGUFs stay in their files, so that a bundle larger than this machine's memory is tried as
    well.
    """
    runtime = open_files(config, files, mapped=True)
    try:
        i = config.image
        blank = ImageProcessor(dataclasses.replace(i, max_crops=0))(np.zeros((i.crop_size, i.crop_size, 3), np.uint8))
        features = runtime.encode_image(blank.crops, np.ones_like(blank.masks), blank.overview, blank.pooling)
        rows = features.reshape(i.cells**2, -1) + runtime.embed(np.zeros(1, np.int64))
        cache = runtime.new_cache(len(rows))
        logits = prefill(runtime, rows, np.ones(len(rows), bool), cache)
    except EngineError as error:
        raise _not_running(str(error)) from error
    finally:
        runtime.close()
    if not np.isfinite(logits).all():
        # llama.cpp narrows what a matrix of 16 bits is multiplied with to the same 16.
        advice = "; choose decoder=bf16 or f32" if files["decoder"].suffix == ".gguf" else ""
        raise ExportError(f"the bundle gives no numbers: these weights, or their precisions, are not sound{advice}")


def _not_running(why: str) -> ExportError:
    return ExportError(f"the graphs do not run: {why}. Does config.json belong to these weights?")


def _measure(
    components: dict[str, dict[str, Any]],
    files: dict[str, Path],
    scratch: Path,
    config: MolmoConfig,
    tensors: TensorSource,
    wishes: Wishes,
) -> None:
    scratch.mkdir()
    exact = {}
    for component, word in wishes.precision.items():
        if component == "decoder" and 4 * _weights(component, config, tensors) > _MEASURED_BELOW:
            continue
        exact[component] = files[component]
        if word != "fp32" or wishes.rounds(component):
            exact[component] = scratch / f"{component}.onnx"
            build_component(component, exact[component], config, tensors, FP32)
    for component, error in component_errors(config, exact, {name: files[name] for name in exact}).items():
        if wishes.rounds(component):
            components[component] |= {"max_error": error.largest, "relative_error": error.relative}


def _own_check(checkpoint: Path) -> CheckPhoto | None:
    """Of a bundle with a check: its photo and question, to be answered anew by what is made of it."""
    if not is_bundle(checkpoint) or (known := open_bundle(checkpoint).check) is None:
        return None
    most = len(known.token_ids)
    photo = checkpoint / known.image.file
    return CheckPhoto(photo, known.question, max(64, 2 * most) if known.complete else max(1, most), known.tolerance)


def _answer(staging: Path, check: CheckPhoto) -> dict[str, Any]:
    from molmo_edge.selfcheck import record_check

    folder = staging / "check"
    folder.mkdir()
    image = folder / f"photo{check.image.suffix.lower()}"
    shutil.copyfile(check.image, image)
    file = f"{folder.name}/{image.name}"
    return {
        "image": file,
        "sha256": sha256_of(image),
        "bytes": image.stat().st_size,
        **record_check(staging, file, check.question, check.max_new_tokens),
        "tolerance": check.tolerance,
    }
