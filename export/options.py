"""What an export is asked for, checked before a checkpoint is fetched: engine, precisions, targets, bits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from molmo_edge.checkpoints.manifest import GRAPHS
from molmo_edge.export.decoder_precisions import PART_WORDS, PARTS, by_part
from molmo_edge.export.errors import ExportError
from molmo_edge.export.float16_graph import float16
from molmo_edge.export.graph_builder import FP32, Precision
from molmo_edge.export.int4_graph import Int4, int4_precision
from molmo_edge.export.int8_graph import INT8, Q8
from molmo_edge.quantize import QuantizeError
from molmo_edge.quantize.llama_quantize import FLOATS, GGUF_WORDS, WEIGHED
from molmo_edge.system.extras import pip_command

if TYPE_CHECKING:
    from molmo_edge.quantize.calibration import Prompt

WORDS = ("fp32", "fp16", "int8", "q8", "q4", "mixed", "q4f16")
_FOUR_BITS = ("q4", "mixed", "q4f16")
_FLOATS = ("fp32", "fp16", "f32")
_PLAIN = ("fp32", "fp16", "int8")  # what ONNX's own operators can do
ENGINES = ("onnx", "gguf")  # of the decoder; the rest is ONNX in both


def _by_component(vision_encoder: str, connector: str, embed_tokens: str, decoder: str) -> dict[str, str]:
    return dict(zip(GRAPHS, (vision_encoder, connector, embed_tokens, decoder), strict=True))


# What one word means for a whole bundle. Four bits make the ViT slower than fp32 on a CPU, eight make it faster; the
# connector's input has channels so large that a scale a row costs it ten times what a scale a block does.
_WHOLE = {word: _by_component("int8", "q8", "int8", word) for word in ("int8", "q4", "mixed")}
_WHOLE["q4f16"] = _by_component("fp16", "fp16", "fp16", "q4f16")
# For llama.cpp. Rows of the embedding are looked up on our side, in full precision: they lie on the disk, and only
# those that are asked for come into memory.
_GGUF = {
    word: _by_component(*("fp32", "fp32") if word in FLOATS else ("int8", "q8"), "fp32", word) for word in GGUF_WORDS
}


@dataclass(frozen=True)
class Target:
    """A kind of machine: what a bundle for it is made of where nobody says otherwise."""

    name: str
    device: str  # of molmo_edge.runtimes, where it is there
    precision: Mapping[str, str]
    plain: frozenset[str]  # components in ONNX's own operators, which are all that this engine takes
    why: str  # written into the manifest


TARGETS = {
    target.name: target
    for target in (
        Target(
            "cpu-x86",
            "cpu",
            _WHOLE["mixed"],
            frozenset(),
            "measured at MolmoE's full size on AVX-512 with VNNI: an int8 ViT is about 3 times as fast as PyTorch's in "
            "fp32, a four-bit one slower than fp32; int8 attention has an eighth of q4's error and a faster prompt",
        ),
        Target(
            "cpu-arm64",
            "cpu",
            _WHOLE["mixed"],
            frozenset(),
            "as for x86: on an emulated processor ids differ as rarely as they do on x86 when rounding does; its speed "
            "was not measured",
        ),
        Target(
            "cuda",
            "cuda",
            _WHOLE["q4f16"],
            frozenset(),
            "float16 products, which CUDA's attention and experts ask for, four-bit weights for the decoder, which "
            "reads each of them for every token; not measured on a GPU",
        ),
        Target(
            "tensorrt",
            "tensorrt",
            _WHOLE["q4f16"],
            frozenset(("vision_encoder", "connector")),
            "TensorRT knows ONNX's own operators alone: the vision tower and the connector are made of them, the "
            "decoder runs through CUDA; not measured on a GPU",
        ),
        Target(
            "coreml",
            "coreml",
            _by_component("fp16", "fp16", "int8", "mixed"),
            frozenset(("vision_encoder", "connector")),
            "Core ML has no attention with a cache and no four-bit products: it gets the vision tower and the "
            "connector in ONNX's own operators, the CPU the decoder; not measured on a Mac",
        ),
    )
}


@dataclass(frozen=True)
class Wishes:
    engine: str  # of the decoder, one of ENGINES
    precision: Mapping[str, str]  # of each component, one of WORDS; of a GGUF, one of GGUF_WORDS
    target: Target | None
    plain: frozenset[str]  # components in ONNX's own operators alone
    int4: Int4
    calibrate: Sequence[Prompt] | None  # what four-bit weights are rounded with
    mmproj: bool = False  # vision and connector as a GGUF as well
    parts: Mapping[str, str] = field(default_factory=dict)  # of a decoder in ONNX, what differs from its precision

    @property
    def graphs(self) -> tuple[str, ...]:
        """The components that are ONNX."""
        return GRAPHS if self.engine == "onnx" else tuple(name for name in GRAPHS if name != "decoder")

    def make(self, component: str, how: Int4 | None = None, keep: Collection[str] = ()) -> Precision:
        """The component's precision. `keep`: matrices that float16 has no room for."""
        word, how = self.precision[component], how or self.int4
        if word in _FOUR_BITS:
            made = int4_precision(word, how, keep)
        else:
            made = float16(keep) if word == "fp16" else {"fp32": FP32, "int8": INT8, "q8": Q8}[word]
        return by_part(made, self.parts, how) if component == "decoder" and self.parts else made

    def fours(self) -> bool:
        """Whether the decoder has four-bit weights."""
        return any(word in _FOUR_BITS for word in (self.precision["decoder"], *self.parts.values()))

    def smooth(self) -> frozenset[str]:
        """The decoder's parts whose inputs are rounded a row at a time, where loud channels matter."""
        base = {"int8": ("attention", "experts"), "mixed": ("attention",)}.get(self.precision["decoder"], ())
        words = {**dict.fromkeys(base, "int8"), **self.parts}
        return frozenset(part for part in ("attention", "experts") if words.get(part) == "int8")

    def rounds(self, component: str) -> bool:
        """Whether it has integers for weights. (A CPU does not round to float16 as ONNX says.)"""
        return self.precision[component] not in _FLOATS or (component == "decoder" and bool(self.parts))


def check_wishes(
    precision: str | Mapping[str, str] | None = None,
    *,
    engine: str = "onnx",
    target: str | None = None,
    plain: bool = False,
    block: int | None = None,
    asymmetric: bool = False,
    calibrate: str | Path | None = None,
    mmproj: bool = False,
) -> Wishes:
    """Raises ExportError for what cannot be asked for; see molmo_edge.export.export_bundle."""
    if engine not in ENGINES:
        raise ExportError(f"the engine {engine!r} is not known; known are {', '.join(ENGINES)}")
    if target is not None and target not in TARGETS:
        raise ExportError(f"the target {target!r} is not known; known are {', '.join(TARGETS)}")
    aim = None if target is None else TARGETS[target]
    words, parts = _words(precision, aim, engine)
    if engine == "gguf":
        return _gguf_wishes(words, aim, plain, block or asymmetric, calibrate, mmproj)
    if mmproj:
        raise ExportError("an mmproj is a GGUF, for those who build on ggml: it is made with the engine gguf")
    in_plain = frozenset(GRAPHS) if plain else aim.plain if aim else frozenset()
    if isinstance(precision, str) and precision.lower() == "int8" and "connector" in in_plain:
        words["connector"] = "int8"  # blocks are none of ONNX's own operators
    _check_plain(in_plain, words)
    if parts and ("decoder" in in_plain or words["decoder"] in ("fp16", "q4f16")):
        raise ExportError("parts of a decoder cannot be chosen in ONNX's own operators, nor in float16")
    if (block or asymmetric) and not any(word in _FOUR_BITS for word in (*words.values(), *parts.values())):
        raise ExportError("blocks and zero points are for four-bit weights: q4, mixed or q4f16")
    if calibrate is not None and not any(w in (*_FOUR_BITS, "int8") for w in (words["decoder"], *parts.values())):
        raise ExportError(
            f"a calibration is for a decoder in q4, mixed, q4f16 or int8; it was to be {words['decoder']}"
        )
    prompts = None if calibrate is None else _prompts(Path(calibrate))
    return Wishes("onnx", words, aim, in_plain, Int4(block, asymmetric), prompts, parts=parts)


def _gguf_wishes(
    words: dict[str, str],
    target: Target | None,
    plain: bool,
    blocks: object,
    calibrate: str | Path | None,
    mmproj: bool,
) -> Wishes:
    in_plain = frozenset(GRAPHS) - {"decoder"} if plain else target.plain if target else frozenset()
    _check_plain(in_plain, words)
    if blocks:
        raise ExportError("blocks and zero points are for four-bit weights in ONNX: llama.cpp's types have their own")
    if calibrate is not None and words["decoder"] not in WEIGHED:
        raise ExportError(
            f"llama.cpp rounds {words['decoder']} without a calibration: choose one of {', '.join(WEIGHED)}"
        )
    from molmo_edge.runtimes.llama_library import install_command, load_library

    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ExportError(f"writing a GGUF needs the gguf package: {install_command()}") from None
    load_library()
    prompts = None if calibrate is None else _prompts(Path(calibrate))
    return Wishes("gguf", words, target, in_plain, Int4(None, False), prompts, mmproj)


def _check_plain(plain: Collection[str], words: Mapping[str, str]) -> None:
    for component in GRAPHS:
        if component in plain and words[component] not in _PLAIN:
            raise ExportError(
                f"{component} would be {words[component]}, but in ONNX's own operators alone it can only be "
                f"{', '.join(_PLAIN)}: choose with --precision {component}=..."
            )


def _words(
    precision: str | Mapping[str, str] | None, target: Target | None, engine: str
) -> tuple[dict[str, str], dict[str, str]]:
    """By component, and by part of the decoder where a part is named."""
    whole = dict(target.precision) if target else dict.fromkeys(GRAPHS, "fp32")
    if engine == "gguf":
        whole |= {"embed_tokens": "fp32", "decoder": "q4_k_m"} if target else {"decoder": "f16"}
    if precision is None:
        return whole, {}
    known = GGUF_WORDS if engine == "gguf" else WORDS
    if isinstance(precision, str):
        word = precision.lower()
        if word not in known:
            raise ExportError(f"the precision {precision!r} is not known for {engine}; known are {', '.join(known)}")
        names = (_GGUF if engine == "gguf" else _WHOLE).get(word) or dict.fromkeys(GRAPHS, word)
        # A target knows what the rest of its machine likes; the word is about the decoder.
        return (whole | {"decoder": word} if engine == "gguf" and target else dict(names)), {}
    given = {name: word.lower() for name, word in precision.items()}
    parts = {name: given.pop(name) for name in PARTS if name in given}
    if parts and engine == "gguf":
        raise ExportError(f"{next(iter(parts))} cannot be chosen in a GGUF: llama.cpp's types say what each part gets")
    names = whole | given
    if unknown := [component for component in names if component not in GRAPHS]:
        raise ExportError(f"there is no component {unknown[0]!r}; there are {', '.join((*GRAPHS, *PARTS))}")
    for component, word in (*names.items(), *parts.items()):
        known = GGUF_WORDS if engine == "gguf" and component == "decoder" else WORDS
        known = PART_WORDS if component in PARTS else known
        if word not in known:
            raise ExportError(f"the precision {word!r} is not known for {component}; known are {', '.join(known)}")
    return names, parts


def _prompts(folder: Path) -> list[Prompt]:
    try:
        from molmo_edge.quantize.calibration import find_prompts
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ExportError(f"a calibration runs on PyTorch: {pip_command('torch')}") from None
    try:
        return find_prompts(folder)
    except QuantizeError as error:
        raise ExportError(str(error)) from None
