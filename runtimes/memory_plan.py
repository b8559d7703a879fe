"""Predict the peak memory of a question about an image, by part, before the model is opened or downloaded.

The weights are those of the files; the other parts are formulas whose factors were fitted to measured peaks
(benchmarks/RESULTS.md). The prediction is for the CPU, and for a process that asks one question.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from molmo_edge.checkpoints.bundle import Bundle
from molmo_edge.checkpoints.manifest import GRAPHS, POINT_HEAD
from molmo_edge.checkpoints.tensor_names import hub_layout, hub_shapes
from molmo_edge.config import MolmoConfig
from molmo_edge.frontend.crops import image_token_count, kept_cells
from molmo_edge.modeling.weight_sizes import ACTIVATIONS, component_bytes, component_of
from molmo_edge.runtimes.kernels import mapped_bytes

# Bytes for each number of a cache; those of llama.cpp with the scales of its blocks of 32.
CACHE_WIDTHS = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "int8": 1.0, "q8_0": 34 / 32,
                "q5_1": 24 / 32, "q5_0": 22 / 32, "q4_1": 20 / 32,
                "iq4_nl": 18 / 32, "q4_0": 18 / 32}  # fmt: skip

QUESTION = 40  # positions of a question and its chat template
ANSWER = 384  # positions of an answer; the default of max_new_tokens

# The interpreter, numpy and ONNX Runtime; llama.cpp and PyTorch add their libraries.
_PROCESS = {"onnxruntime": 95_000_000, "llama.cpp": 92_000_000, "pytorch": 350_000_000}
# ONNX Runtime keeps packed matrices and some of the originals; it holds a graph without external weights twice.
_PACKED, _INLINE = 1.12, 2.0
CHUNK = 512  # positions of a causal prompt per decoder run; bounds the memory of activations
# Where weights are read from the disk again for each run, fewer runs are worth more than the activations' memory.
SCARCE_CHUNK = 1024

# Bytes for each weight of a bundle's components, with scales; "moe": of experts, whose blocks are larger.
_KINDS = ("vision", "connector", "embeddings", "attention", "ffn", "moe", "head")
_WIDTHS = {
    precision: dict(zip(_KINDS, widths, strict=True))
    for precision, widths in {
        "fp32": (4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0),
        "q8": (1.01, 1.13, 1.0, 1.13, 1.13, 1.13, 1.13),
        "q4": (1.01, 1.13, 1.0, 0.63, 0.63, 0.63, 0.63),
        "mixed": (1.01, 1.13, 1.0, 1.0, 0.63, 0.52, 1.13),
        "q4_k_m": (1.01, 1.13, 1.0, 0.66, 0.66, 0.60, 0.82),
        "q8_0": (1.01, 1.13, 1.0, 1.07, 1.07, 1.07, 1.07),
    }.items()
}
# Those of four bits on ONNX Runtime, which the compiled kernels read from the mapped file.
_FOUR_BIT = {"mixed": ("ffn", "moe"), "q4": ("attention", "ffn", "moe", "head")}
BUNDLE_PRECISIONS = tuple(_WIDTHS)
GGUF_PRECISIONS = ("q4_k_m", "q8_0")


@dataclass(frozen=True)
class Weights:
    """The weights of an opened model, in bytes."""

    engine: str  # "onnxruntime", "llama.cpp" or "pytorch"
    precision: str
    parts: Mapping[str, int]  # resident, by component
    # Pages of a file, which the system may drop and read again: a GGUF, and what the compiled kernels compute.
    mapped: Mapping[str, int]
    stored: int  # size of the files
    largest: int  # of the matrix that is held twice while it is loaded
    cache: str = "f32"  # type of keys and values on ONNX Runtime

    @property
    def resident(self) -> int:
        """All that has to be in memory, without the mapped pages."""
        return sum(self.parts.values())

    @property
    def loaded(self) -> int:
        """What is in memory before the first question. llama.cpp reads its file then, the kernels on demand."""
        return self.resident + (sum(self.mapped.values()) if self.engine == "llama.cpp" else 0)


@dataclass(frozen=True)
class Plan:
    """The predicted peak of one question."""

    weights: Weights
    max_crops: int
    cache: str  # type of keys and values
    positions: int  # of the image, the question and the answer
    parts: Mapping[str, int]  # bytes, by part; they add up to `answering`
    loading: int  # peak while the model is opened
    encoding: int  # peak while the image is encoded
    answering: int  # peak while the question is answered
    image_tokens: float | None = None  # the share of the image's tokens that the decoder sees; None: all

    @property
    def peak(self) -> int:
        """The largest of the three phases."""
        return max(self.loading, self.encoding, self.answering)

    @property
    def needed(self) -> int:
        """The peak without the mapped pages. With little more memory than this, they are read from the disk again."""
        return self.peak - sum(self.weights.mapped.values())


def bundle_weights(bundle: Bundle, *, kernels: bool = False) -> Weights:
    """The weights of a bundle, from its manifest.

    `kernels`: the compiled kernels are used (molmo_edge.runtimes.kernels). What they read from the mapped file is
    taken from the decoder's graph, or estimated from the configuration if only the manifest is here.
    """
    components = bundle.components
    parts, mapped, stored = {}, {}, sum(component.bytes for component in components.values())
    gguf = components["decoder"].engine == "gguf"
    names = [name for name in (*GRAPHS, POINT_HEAD) if name in components]
    for name in names:
        graph, data = components[name].bytes, components.get(f"{name}_data")
        if components[name].engine == "gguf":
            parts[name], mapped[name] = 0, graph
        elif data is None:
            parts[name] = int(_INLINE * graph)
        elif name == "embed_tokens":  # rows are read from the file on demand; the factors of ONNX count an int8 table
            parts[name] = graph + (0 if gguf or components[name].precision != "int8" else data.bytes)
        else:
            read = _read_by_kernels(bundle) if kernels and name == "decoder" else 0
            if read:
                mapped[name] = read
            parts[name] = graph + int(_PACKED * (data.bytes - read))
    engine = "llama.cpp" if gguf else "onnxruntime"
    large = f"{'vision_encoder' if gguf else 'decoder'}_data" in components
    share = _head(bundle.config) * _WIDTHS["mixed"]["head"] if large and not gguf else 0
    decoder = components["decoder"]
    return Weights(engine, decoder.precision, parts, mapped, stored, int(share), decoder.cache or "f32")


def _read_by_kernels(bundle: Bundle) -> int:
    """The bytes of the decoder that the kernels read from the mapped file."""
    decoder, data = bundle.components["decoder"], bundle.components["decoder_data"]
    path = bundle.directory / decoder.file
    if path.is_file():
        return mapped_bytes(path)
    return min(data.bytes, int(_four_bit_bytes(bundle.config, decoder.precision)))


def _four_bit_bytes(config: MolmoConfig, precision: str) -> float:
    """The bytes of the decoder's four-bit weights on ONNX Runtime."""
    if precision not in _FOUR_BIT:
        return 0.0
    return sum(
        count
        for (part, kind), count in _kinds(config, precision).items()
        if part == "decoder" and kind in _FOUR_BIT[precision]
    )


def _kinds(config: MolmoConfig, precision: str) -> dict[tuple[str, str], float]:
    """Bytes by component and kind of weight."""
    widths, shapes = _WIDTHS[precision], hub_shapes(config)
    total: dict[tuple[str, str], float] = defaultdict(float)
    for parameter, slot in hub_layout(config).items():
        kind = component = component_of(parameter)
        if component == "decoder":
            if ".ffn." in parameter:
                kind = "moe" if config.decoder.n_experts else "ffn"
            else:
                kind = "head" if "head" in parameter else "attention"
        total[component, kind] += len(slot) * math.prod(shapes[slot[0]]) * widths[kind]
    return total


def bundle_weights_of(config: MolmoConfig, precision: str, *, kernels: bool = False) -> Weights:
    """The weights of a bundle that was not exported yet, in one of BUNDLE_PRECISIONS. `kernels`: see bundle_weights."""
    widths = _WIDTHS[precision]
    total = dict.fromkeys(("vision", "connector", "embeddings", "decoder"), 0.0)
    for (component, _), count in _kinds(config, precision).items():
        total[component] += count
    stored = sum(total.values())
    gguf = precision in GGUF_PRECISIONS
    if gguf:  # llama.cpp's file has a table of embeddings, too
        table = config.decoder.embedding_size * config.decoder.d_model * widths["attention"]
        mapped, stored = {"decoder": int(total.pop("decoder") + table)}, stored + table
    elif kernels and (read := int(_four_bit_bytes(config, precision))):
        mapped = {"decoder": read}
        total["decoder"] -= read
    else:
        mapped = {}
    if gguf or widths["embeddings"] == 4:
        total["embeddings"] = 0
    parts = {name: int(count * (1 if name == "embeddings" else _PACKED)) for name, count in total.items()}
    engine = "llama.cpp" if gguf else "onnxruntime"
    largest = 0 if gguf else int(_head(config) * widths["head"])
    return Weights(engine, precision, parts, mapped, int(stored), largest)


def torch_weights(config: MolmoConfig, precision: str, device: str = "cpu") -> Weights:
    """The weights of a checkpoint on PyTorch, in one of molmo_edge.config.PRECISIONS but "auto"."""
    parts = component_bytes(config, precision, device)
    stored = sum(math.prod(shape) for shape in hub_shapes(config).values()) * (4 if precision == "fp32" else 2)
    return Weights("pytorch", precision, parts, {}, stored, 0)


def predict(
    config: MolmoConfig,
    weights: Weights,
    *,
    max_crops: int | None = None,
    cache: str | None = None,
    answer: int = ANSWER,
    image_tokens: float | None = None,
    chunk: int = CHUNK,
) -> Plan:
    """The peak of a question about an image that needs `max_crops` crops, None: the model's own limit.

    `cache`: type of llama.cpp's keys and values; other engines have their own. `answer`: max_new_tokens.
    `image_tokens`: the share of the image's tokens that the decoder sees. `chunk`: positions of a causal prompt per
    decoder run; SCARCE_CHUNK where the mapped weights do not stay in memory.
    """
    crops = config.image.max_crops if max_crops is None else max_crops
    whole = image_positions(config, crops)
    image = whole if image_tokens is None else _kept_positions(config, crops, image_tokens)
    # Positions that were left out count against the context, but take no memory.
    positions = min(image + QUESTION + answer, config.decoder.max_position_embeddings - (whole - image))
    if weights.engine == "pytorch":
        kind = "f32" if weights.precision == "fp32" else "bf16"
    else:
        kind = (cache or "f16") if weights.engine == "llama.cpp" else weights.cache
    d = config.decoder
    keys = int(2 * d.n_layers * d.kv_dim * positions * CACHE_WIDTHS[kind])
    process = _PROCESS[weights.engine]
    loaded = process + weights.loaded
    encoding, kept = _vision(config, crops + 1, whole)
    if weights.engine == "pytorch":
        working = encoding = ACTIVATIONS
    else:
        working = _decoder_work(config, image, positions, weights.engine, chunk)
    parts = {
        "process": process,
        **{f"weights: {name}": count for name, count in weights.parts.items() if count},
        **{f"mapped file: {name}": count for name, count in weights.mapped.items()},
        "image features": kept,
        f"keys and values ({kind})": keys,
        "working memory": working,
    }
    return Plan(
        weights,
        crops,
        kind,
        positions,
        parts,
        loading=loaded + weights.largest,
        encoding=loaded + encoding,
        answering=sum(parts.values()),
        image_tokens=image_tokens,
    )


def choose(
    config: MolmoConfig,
    weights: Weights,
    budget: int,
    *,
    most: int | None = None,
    answer: int = ANSWER,
    image_tokens: float | None = None,
) -> Plan | None:
    """The plan with the most crops, at most `most`, that fits into `budget` bytes.

    Of several caches of llama.cpp ("f16", "q8_0", "q4_0") it takes the most precise one that fits. None: nothing fits.
    """
    caches = ("f16", "q8_0", "q4_0") if weights.engine == "llama.cpp" else (None,)
    for crops in range(config.image.max_crops if most is None else most, -1, -1):
        for cache in caches:
            plan = predict(config, weights, max_crops=crops, cache=cache, answer=answer, image_tokens=image_tokens)
            if plan.peak <= budget:
                return plan
    return None


def longest_context(config: MolmoConfig, plan: Plan, budget: int) -> int:
    """The most positions of image, questions and answers for which keys and values still fit into `budget` bytes."""
    d = config.decoder
    each = 2 * d.n_layers * d.kv_dim * CACHE_WIDTHS[plan.cache]
    return max(0, min(d.max_position_embeddings, plan.positions + int((budget - plan.answering) / each)))


def largest_tiling(config: MolmoConfig, max_crops: int) -> tuple[int, int]:
    """Rows and columns of at most `max_crops` crops that take most positions, for sides of at most 2 : 1."""
    if not max_crops:
        return (0, 0)
    tilings = [(rows, max_crops // rows) for rows in range(1, max_crops + 1)]
    usual = [(rows, cols) for rows, cols in tilings if max(rows, cols) <= 2 * min(rows, cols)]
    return max(usual or tilings, key=lambda tiling: image_token_count(config.image, tiling))


def image_positions(config: MolmoConfig, max_crops: int) -> int:
    """The positions of an image with `largest_tiling`, with BOS."""
    return 1 + image_token_count(config.image, largest_tiling(config, max_crops))


def _kept_positions(config: MolmoConfig, max_crops: int, share: float) -> int:
    """As `image_positions`, without what `share` leaves out of each view (molmo_edge.sdk.image_tokens)."""
    cells = [rows * cols for rows, cols in config.image.cell_grids(largest_tiling(config, max_crops))]
    return image_positions(config, max_crops) - sum(count - kept_cells(count, share) for count in cells)


def _head(config: MolmoConfig) -> int:
    return config.decoder.n_logits * config.decoder.d_model


def _vision(config: MolmoConfig, crops: int, image: int) -> tuple[int, int]:
    """Working memory of the tower, and what stays of it: features and embeddings."""
    at_once = crops if config.vision.d_model < 512 else 1  # small towers run several crops at once
    scores = max(vit.n_heads * vit.n_pos**2 for vit in config.vits)
    hidden = max(vit.n_pos * vit.mlp_dim for vit in config.vits)
    features = crops * config.image.patches**2 * sum(vit.feature_dim for vit in config.vits)
    pixels = crops * config.image.crop_size**2 * 3
    embeddings = image * config.decoder.d_model
    work = 4 * (at_once * 3 * (scores + hidden) + 2 * features + 2 * pixels + embeddings) + 40_000_000
    return work, 4 * (2 * features + embeddings)


def _decoder_work(config: MolmoConfig, image: int, positions: int, engine: str, chunk: int) -> int:
    d = config.decoder
    if d.bidirectional_images:  # all positions of the image run at once, with a mask
        rows, copies = image, 4.6
    else:
        rows, copies = min(image, chunk), 1.0
    if engine == "llama.cpp":
        copies = min(copies, 1.5)
    inner = d.top_k * d.ffn_dim if d.n_experts else d.ffn_dim
    scores = copies * d.n_heads * rows * positions
    return int(4 * (scores + rows * (2 * inner + 4 * d.d_model) + d.n_logits))
