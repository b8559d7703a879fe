"""One ONNX graph per component of a bundle."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from molmo_edge.checkpoints.manifest import POINT_HEAD
from molmo_edge.checkpoints.tensor_names import head_name
from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.export.connector_graph import connector
from molmo_edge.export.decoder_graph import decoder, embed_tokens
from molmo_edge.export.graph_builder import Graph, Precision
from molmo_edge.export.point_head_graph import point_head
from molmo_edge.export.vision_graph import vision_encoder

Builder = Callable[[Graph, MolmoConfig, TensorSource, Precision], None]
BUILDERS: dict[str, Builder] = {
    "vision_encoder": vision_encoder,
    "connector": connector,
    "embed_tokens": embed_tokens,
    "decoder": decoder,
    POINT_HEAD: point_head,
}
# Bytes. An .onnx file cannot exceed 2 GB, and weights inside it are held twice, as read and as packed.
SIDECAR_ABOVE = 100_000_000
# Bytes in float32. A larger decoder is not run in float32 to measure its ranges and errors.
MEASURED_BELOW = 4_000_000_000

_HUB_PREFIXES = {
    "vision_encoder": ("model.vision_backbone.image_vit.", "model.vision_backbone.conv_tower.", "model.vit."),
    "connector": ("model.vision_backbone.image_p", "model.vision_backbone.pad_embed", "model.connector."),
    "embed_tokens": ("model.transformer.wte.",),
    "decoder": ("model.transformer.blocks.",),
    POINT_HEAD: ("model.point_predictor.", "model.build_vit_embedding."),
}


def build_component(
    component: str,
    path: Path,
    config: MolmoConfig,
    tensors: TensorSource,
    precision: Precision,
    *,
    plain: bool = False,
    drafts: bool = False,
) -> Graph:
    """Write one graph to `path`, its large weights to `Graph.sidecar` if they need one.

    `plain`: use standard ONNX operators only. `drafts`: of a decoder, see molmo_edge.export.decoder_graph.
    """
    large = count_weights(component, config, tensors) * precision.bytes_per_weight > SIDECAR_ABOVE
    graph = Graph(component, path.with_name(f"{path.name}.data") if large else None, plain=plain, drafts=drafts)
    BUILDERS[component](graph, config, tensors, precision)
    graph.save(path)
    return graph


def count_weights(component: str, config: MolmoConfig, tensors: TensorSource) -> int:
    """Return the number of weights of a component; for the decoder the head counts, even if it is tied."""
    prefixes = _HUB_PREFIXES[component]
    if component == "decoder":
        prefixes += (head_name(config),)  # with tied weights the head is a second copy of the embedding
    return sum(math.prod(tensors.shape(name)) for name in tensors.names() if name.startswith(prefixes))


def fits_float32(component: str, config: MolmoConfig, tensors: TensorSource) -> bool:
    """Whether an export runs the component in float32, to measure its ranges and errors: all but large decoders."""
    return component != "decoder" or 4 * count_weights(component, config, tensors) <= MEASURED_BELOW
