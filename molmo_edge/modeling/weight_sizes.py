"""How large a model's weights are on PyTorch, without PyTorch: what molmo_edge.modeling.precision stores, in bytes."""

from __future__ import annotations

import math
import re

from molmo_edge.checkpoints.tensor_names import hub_layout, hub_shapes
from molmo_edge.config import MolmoConfig

_QUANTIZED = re.compile(
    r"decoder\.blocks\.\d+\.(attn\.(att_proj|attn_out)\.weight|ffn\.(ff_proj|ff_out)\.weight|ffn\.(gate|up|down))"
)
_FLOAT32 = re.compile(r"connector\.|conv_tower\.|.*\.(patch_embedding|class_embedding|positional_embedding|router)\b")
# With their scales: one float32 per 64 weights, one per row.
QUANTIZED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.01}
_POSITIONS = 2048  # of an image with many crops and a conversation
ACTIVATIONS = 1_000_000_000  # bytes, including the tensor that is being loaded


def is_quantized(parameter: str, precision: str) -> bool:
    """Whether bitsandbytes quantises a parameter of `modeling.Molmo`."""
    return precision in QUANTIZED_BYTES and _QUANTIZED.fullmatch(parameter) is not None


def is_float32(parameter: str, ndim: int, precision: str, device: str) -> bool:
    """Whether a parameter that is not quantised is float32; else it is bfloat16."""
    on_cpu = device == "cpu" and parameter.startswith(("vision.", "extra_vision."))
    return precision == "fp32" or ndim == 1 or bool(_FLOAT32.match(parameter)) or on_cpu


def component_bytes(config: MolmoConfig, precision: str, device: str) -> dict[str, int]:
    """The bytes of "vision", "connector", "embeddings" and "decoder" in memory."""
    shapes, total = hub_shapes(config), dict.fromkeys(("vision", "connector", "embeddings", "decoder"), 0.0)
    for parameter, slot in hub_layout(config).items():
        count = len(slot) * math.prod(shapes[slot[0]])
        if is_quantized(parameter, precision):
            width = QUANTIZED_BYTES[precision]
        else:
            width = 4 if is_float32(parameter, len(shapes[slot[0]]), precision, device) else 2
        total[component_of(parameter)] += count * width
    return {name: int(count) for name, count in total.items()}


def component_of(parameter: str) -> str:
    """The component of `component_bytes` that a parameter of `modeling.Molmo` belongs to."""
    if parameter.startswith(("vision.", "extra_vision.", "conv_tower.")):
        return "vision"
    if parameter.startswith("connector."):
        return "connector"
    return "embeddings" if parameter in ("decoder.embedding", "decoder.new_embedding") else "decoder"


def weight_bytes(config: MolmoConfig, precision: str, device: str) -> int:
    """The size of a model's weights in memory, in bytes."""
    return sum(component_bytes(config, precision, device).values())


def room(config: MolmoConfig, precision: str) -> int:
    """The bytes that answering needs besides the weights: two caches, of a scene and of a question, and activations."""
    d = config.decoder
    positions = min(_POSITIONS, d.max_position_embeddings)
    cache = 2 * d.n_layers * d.n_kv_heads * d.head_dim * positions * (4 if precision == "fp32" else 2)
    return 2 * cache + ACTIVATIONS
