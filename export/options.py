"""The options of an export, and the plan they resolve to. They are checked before a checkpoint is downloaded."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from molmo_edge.checkpoints.manifest import GRAPHS, POINT_HEAD
from molmo_edge.export.errors import ExportError
from molmo_edge.export.graph_builder import Precision
from molmo_edge.export.graph_precisions import graph_precision
from molmo_edge.export.int4_graph import Int4
from molmo_edge.export.precisions import (
    GGUF_CALIBRATED,
    GGUF_PRECISIONS,
    ONNX_PRECISIONS,
    PART_PRECISIONS,
    PARTS,
    PLAIN_PRECISIONS,
    POINT_HEAD_PRECISIONS,
    gguf_bundle,
    onnx_bundle,
)
from molmo_edge.export.targets import TARGETS, Target
from molmo_edge.quantize import QuantizeError
from molmo_edge.quantize.calibration_prompts import Prompt, find_prompts
from molmo_edge.system.extras import pip_command

CACHES = ("int8",)
ENGINES = ("onnx", "gguf")  # of the decoder; the other components are ONNX with either


@dataclass(frozen=True)
class ExportOptions:
    """The options of `molmo_edge.export.export_bundle`, which documents them."""

    precision: str | Mapping[str, str] | None = None
    engine: str = "onnx"
    target: str | None = None
    plain: bool = False
    block: int | None = None
    asymmetric: bool = False
    calibrate: str | Path | None = None
    mmproj: bool = False
    rotate: bool = False
    drafting: bool = False
    train_scales: int = 0
    cache: str | None = None


@dataclass(frozen=True)
class ExportPlan:
    """What an export writes: one precision per component, and how its weights are rounded."""

    engine: str  # of the decoder, one of ENGINES
    precision: Mapping[str, str]  # component -> one of ONNX_PRECISIONS, or of GGUF_PRECISIONS
    target: Target | None
    plain: frozenset[str]  # components in standard ONNX operators
    int4: Int4
    calibration: Sequence[Prompt] | None  # prompts to round the decoder with
    mmproj: bool = False
    parts: Mapping[str, str] = field(default_factory=dict)  # parts of an ONNX decoder that differ from its precision
    point_head: str = "fp32"  # of a MolmoPoint, one of POINT_HEAD_PRECISIONS
    drafting: bool = False  # whether an ONNX decoder can verify drafts
    train_scales: int = 0  # passes over the prompts of the calibration
    cache: str | None = None  # type of an ONNX decoder's keys and values, one of CACHES; None: that of its precision

    @property
    def graphs(self) -> tuple[str, ...]:
        """The components that are ONNX graphs."""
        return GRAPHS if self.engine == "onnx" else tuple(name for name in GRAPHS if name != "decoder")

    def graph_precision(self, component: str, int4: Int4 | None = None, keep_fp32: Collection[str] = ()) -> Precision:
        """The precision of an ONNX component. `int4` replaces the plan's; `keep_fp32`: matrices float16 overflows."""
        parts = self.parts if component == "decoder" else {}
        name = self.point_head if component == POINT_HEAD else self.precision[component]
        return graph_precision(name, parts, int4 or self.int4, keep_fp32)

    @property
    def decoder_formats(self) -> Mapping[str, str]:
        """The storage format of each part of an ONNX decoder."""
        return {**ONNX_PRECISIONS[self.precision["decoder"]].formats, **self.parts}

    @property
    def smoothed_parts(self) -> frozenset[str]:
        """The decoder's parts whose inputs are rounded to int8 row by row, where large channels cost accuracy."""
        return frozenset(part for part in ("attention", "experts") if self.decoder_formats[part] == "int8")

    @property
    def uses_calibration(self) -> bool:
        """Whether a calibration changes the weights of an ONNX decoder: by GPTQ or by smoothing."""
        return "q4" in self.decoder_formats.values() or bool(self.smoothed_parts)

    def is_quantized(self, component: str) -> bool:
        """Whether its weights are integers. (A CPU runs float16 in float32, so its error cannot be measured there.)"""
        floats = ("fp32", "fp16", "f32")
        return self.precision[component] not in floats or (component == "decoder" and bool(self.parts))


def check_options(options: ExportOptions) -> ExportPlan:
    """Resolve `options` to a plan. Raises ExportError for unknown names and for contradictions."""
    _check_name("engine", options.engine, ENGINES)
    if options.target is not None:
        _check_name("target", options.target, TARGETS)
    target = None if options.target is None else TARGETS[options.target]
    precision, parts, point_head = _resolve_precision(options.precision, target, options.engine)
    if options.engine == "gguf":
        return _gguf_plan(options, precision, target, point_head)
    if options.mmproj:
        raise ExportError("mmproj writes a GGUF: choose the engine gguf, or leave mmproj out")
    plain = frozenset(GRAPHS) if options.plain else target.plain if target else frozenset()
    if isinstance(options.precision, str) and options.precision.lower() == "int8" and "connector" in plain:
        precision["connector"] = "int8"  # its default, q8, needs blocks, which standard ONNX does not have
    _check_plain(plain, precision)
    if options.drafting and "decoder" in plain:
        raise ExportError("drafting needs ONNX Runtime's operators in the decoder: leave drafting or plain out")
    if parts and ("decoder" in plain or ONNX_PRECISIONS[precision["decoder"]].half):
        raise ExportError(
            "the parts of a decoder have one common precision in standard ONNX operators and in float16: leave "
            f"{', '.join(parts)} out"
        )
    if options.cache is not None:
        _check_cache(options, plain, precision["decoder"])
    formats = [format_ for name in precision.values() for format_ in ONNX_PRECISIONS[name].formats.values()]
    if (options.block or options.asymmetric) and "q4" not in (*formats, *parts.values()):
        raise ExportError("block and asymmetric apply to 4-bit weights: choose q4, mixed or q4f16, or leave them out")
    if options.calibrate is not None and options.cache is None:
        decoder = precision["decoder"]
        formats = [*ONNX_PRECISIONS[decoder].formats.values(), *parts.values()]
        if not {"q4", "int8"} & set(formats):
            raise ExportError(
                f"calibrate applies to a decoder in q4, mixed, q4f16 or int8, not in {decoder}: leave calibrate out"
            )
    _check_training(options, [*ONNX_PRECISIONS[precision["decoder"]].formats.values(), *parts.values()])
    int4 = Int4(options.block, options.asymmetric)
    prompts = _prompts(options)
    if options.train_scales and prompts is not None and len(prompts) < 2:
        raise ExportError(
            f"train_scales takes at least two prompts, one of which is held out, but {options.calibrate} has "
            f"{len(prompts)}: add photos"
        )
    return ExportPlan(
        "onnx",
        precision,
        target,
        plain,
        int4,
        prompts,
        parts=parts,
        point_head=point_head,
        drafting=options.drafting,
        train_scales=options.train_scales,
        cache=options.cache,
    )


def _check_training(options: ExportOptions, formats: Collection[str]) -> None:
    if options.train_scales < 0:
        raise ExportError(f"train_scales is a number of passes, not {options.train_scales}")
    if not options.train_scales:
        return
    if options.calibrate is None:
        raise ExportError("train_scales learns from calibration photos: name their folder with calibrate")
    if "q4" not in formats:
        raise ExportError("train_scales applies to a decoder in q4, mixed or q4f16: leave train_scales out")


def _check_cache(options: ExportOptions, plain: Collection[str], decoder: str) -> None:
    assert options.cache is not None
    _check_name("cache", options.cache, CACHES)
    if "decoder" in plain or ONNX_PRECISIONS[decoder].half:
        raise ExportError(
            "a cache of eight bits needs ONNX Runtime's operators and a decoder that computes in float32: leave cache "
            "out, or choose another precision"
        )
    if options.calibrate is None:
        raise ExportError(
            "a cache of eight bits needs photos to measure the range of keys and values: add calibrate, a folder of "
            "photos"
        )


def _gguf_plan(options: ExportOptions, precision: dict[str, str], target: Target | None, point_head: str) -> ExportPlan:
    plain = frozenset(GRAPHS) - {"decoder"} if options.plain else target.plain if target else frozenset()
    _check_plain(plain, precision)
    if options.cache is not None:
        raise ExportError(
            "llama.cpp chooses the type of keys and values when the model is opened (--llama cache=q8_0): leave "
            "cache out"
        )
    if options.drafting:
        raise ExportError("drafting is an option of ONNX decoders; those of llama.cpp need none: leave drafting out")
    if options.train_scales:
        raise ExportError("train_scales applies to ONNX: leave it out (llama.cpp rounds the weights of a GGUF)")
    if options.block or options.asymmetric:
        raise ExportError("block and asymmetric apply to ONNX: leave them out (llama.cpp's types define their own)")
    if options.calibrate is not None and precision["decoder"] not in GGUF_CALIBRATED:
        raise ExportError(
            f"llama.cpp uses no calibration for {precision['decoder']}: leave calibrate out, or choose one of "
            f"{', '.join(GGUF_CALIBRATED)}"
        )
    from molmo_edge.runtimes.llama_library import install_command, load_library

    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ExportError(f"writing a GGUF needs the gguf package: {install_command()}") from None
    load_library()
    prompts = _prompts(options)
    return ExportPlan("gguf", precision, target, plain, Int4(), prompts, options.mmproj, point_head=point_head)


def _check_name(kind: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ExportError(f"{name!r} is not a supported {kind} (supported: {', '.join(known)})")


def _check_plain(components: Collection[str], precision: Mapping[str, str]) -> None:
    for component in GRAPHS:
        if component in components and precision[component] not in PLAIN_PRECISIONS:
            raise ExportError(
                f"{component} cannot be {precision[component]} in standard ONNX operators, only "
                f"{', '.join(PLAIN_PRECISIONS)}: choose one with --precision {component}=..."
            )


def _resolve_precision(
    given: str | Mapping[str, str] | None, target: Target | None, engine: str
) -> tuple[dict[str, str], dict[str, str], str]:
    """-> the precision of each component, of the parts of the decoder that are named, and of the point head."""
    gguf = engine == "gguf"
    defaults = dict(target.precision) if target else dict.fromkeys(GRAPHS, "fp32")
    if gguf:
        defaults["decoder"] = "q4_k_m" if target else "f16"
    if given is None:
        return defaults, {}, "fp32"
    if isinstance(given, str):
        name = given.lower()
        _check_name(f"precision for {engine}", name, GGUF_PRECISIONS if gguf else ONNX_PRECISIONS)
        if gguf:  # a target sets the precision of the other components; the name is the decoder's
            return (defaults | {"decoder": name} if target else gguf_bundle(name)), {}, "fp32"
        return onnx_bundle(name), {}, "fp32"
    named = {component: name.lower() for component, name in given.items()}
    parts = {part: named.pop(part) for part in PARTS if part in named}
    if parts and gguf:
        raise ExportError(f"the precision of {next(iter(parts))} cannot be chosen in a GGUF: leave it out")
    point_head = named.pop(POINT_HEAD, "fp32")
    _check_name(f"precision for {POINT_HEAD}", point_head, POINT_HEAD_PRECISIONS)
    for component in named:
        _check_name("component", component, (*GRAPHS, *PARTS, POINT_HEAD))
    for component, name in named.items():
        known = GGUF_PRECISIONS if gguf and component == "decoder" else tuple(ONNX_PRECISIONS)
        _check_name(f"precision for {component}", name, known)
    for part, name in parts.items():
        _check_name(f"precision for {part}", name, PART_PRECISIONS)
    return defaults | named, parts, point_head


def _prompts(options: ExportOptions) -> list[Prompt] | None:
    if options.calibrate is None:
        return None
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ExportError(f"calibrate needs PyTorch: {pip_command('torch')}") from None
    try:
        return find_prompts(options.calibrate)
    except QuantizeError as error:
        raise ExportError(str(error)) from None
