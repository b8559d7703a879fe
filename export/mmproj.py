"""The vision tower, the connector and the image tokens' embeddings as a GGUF, of the kind llama.cpp calls mmproj.

No program runs it yet: llama.cpp has no graph for Molmo's crops, pooling and additive features. It is for developers
who implement Molmo with ggml, without PyTorch and without pickles. docs/gguf.md documents every name; llama.cpp's own
names (of its CLIP towers) are used where they fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

from molmo_edge.checkpoints.tensor_names import BACKBONE, TRANSFORMER, hub_shapes
from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.export.gguf_writer import TensorEntry, open_writer, write_tensors
from molmo_edge.frontend.tokenizer import Tokenizer

_VIT = f"{BACKBONE}.image_vit"
_BLOCK = {
    "attention_norm": "ln1",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_out",
    "ffn_norm": "ln2",
    "feed_forward.w1": "ffn_up",
    "feed_forward.w2": "ffn_down",
}
_POOL = {"wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_out"}
_PROJECTOR = {"w1": "mm.gate", "w3": "mm.up", "w2": "mm.down"}


def write_mmproj(path: Path, config: MolmoConfig, tensors: TensorSource, tokenizer: Tokenizer, name: str) -> None:
    """Write tensor by tensor. Blocks of the ViT after the last one in use are left out."""
    file_type = LlamaFileType.MOSTLY_F16
    with open_writer(path, architecture="clip", content="mmproj", name=name, file_type=file_type) as writer:
        _add_metadata(writer, config, tokenizer)
        write_tensors(writer, list(_entries(config, tensors, tokenizer)))


def image_token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of Molmo's image tokens, in the order of the rows of mm.token_embd.weight."""
    return {name: i for name, i in tokenizer.special.to_dict().items() if name not in ("bos", "eos")}


def _entries(config: MolmoConfig, tensors: TensorSource, tokenizer: Tokenizer) -> Iterator[TensorEntry]:
    """Matrices in float16, everything else in float32."""
    v, shapes = config.vision, hub_shapes(config)
    dino = v.image_model_type == "dino"

    def entry(
        name: str, shape: tuple[int, ...], load: Callable[[], np.ndarray], *, float32: bool = False
    ) -> TensorEntry:
        if float32 or len(shape) == 1:
            return TensorEntry(name, shape, GGMLQuantizationType.F32, lambda: np.asarray(load(), np.float32))
        return TensorEntry(name, shape, GGMLQuantizationType.F16, lambda: np.asarray(load(), np.float16))

    def copy(name: str, hub: str, *, float32: bool = False) -> TensorEntry:
        return entry(name, shapes[hub], lambda: tensors.get(hub), float32=float32)

    def copy_layer(name: str, hub: str) -> Iterator[TensorEntry]:
        yield from (copy(f"{name}.{leaf}", f"{hub}.{leaf}") for leaf in ("weight", "bias"))

    def patch_kernel() -> np.ndarray:  # [d, (row, column, channel)] -> a convolution's [d, channel, row, column]
        weight = tensors.get(f"{_VIT}.patch_embedding.weight")
        return weight.reshape(-1, v.patch_size, v.patch_size, 3).transpose(0, 3, 1, 2)

    def token_rows() -> np.ndarray:  # of concat(embedding, new_embedding)
        ids, size = np.array(list(image_token_ids(tokenizer).values())), config.decoder.embedding_size
        rows = np.empty((len(ids), config.decoder.d_model), np.float32)
        for table, inside, first in (("embedding", ids < size, 0), ("new_embedding", ids >= size, size)):
            if inside.any():
                rows[inside] = tensors.get(f"{TRANSFORMER}.wte.{table}")[ids[inside] - first]
        return rows

    yield entry("v.patch_embd.weight", (v.d_model, 3, v.patch_size, v.patch_size), patch_kernel)
    yield copy("v.class_embd", f"{_VIT}.class_embedding")
    yield copy("v.position_embd.weight", f"{_VIT}.positional_embedding", float32=True)
    if dino:
        yield copy("v.patch_embd.bias", f"{_VIT}.patch_embedding.bias")
    else:
        yield from copy_layer("v.pre_ln", f"{_VIT}.pre_ln")
    for n in range(v.last_layer + 1):
        block = f"{_VIT}.transformer.resblocks.{n}"
        for hub, name in _BLOCK.items():
            yield from copy_layer(f"v.blk.{n}.{name}", f"{block}.{hub}")
        for k in (1, 2) if dino else ():
            yield copy(f"v.blk.{n}.ls{k}.weight", f"{block}.lambda{k}")
    yield copy("mm.pad_embd.weight", f"{BACKBONE}.pad_embed", float32=True)
    for hub, name in _POOL.items():
        yield from copy_layer(f"mm.pool.{name}", f"{BACKBONE}.image_pooling_2d.{hub}")
    for hub, name in _PROJECTOR.items():
        yield copy(f"{name}.weight", f"{BACKBONE}.image_projector.{hub}.weight")
    rows = len(image_token_ids(tokenizer))
    yield entry("mm.token_embd.weight", (rows, config.decoder.d_model), token_rows, float32=True)


def _add_metadata(writer: GGUFWriter, config: MolmoConfig, tokenizer: Tokenizer) -> None:
    v, i = config.vision, config.image
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("molmo")
    writer.add_vision_use_gelu(v.activation == "gelu")  # else quick_gelu
    writer.add_vision_image_size(i.crop_size)
    writer.add_vision_patch_size(v.patch_size)
    writer.add_vision_embedding_length(v.d_model)
    writer.add_vision_feed_forward_length(v.mlp_dim)
    writer.add_vision_block_count(v.last_layer + 1)
    writer.add_vision_head_count(v.n_heads)
    writer.add_vision_projection_dim(config.decoder.d_model)
    writer.add_vision_attention_layernorm_eps(v.norm_eps)
    writer.add_vision_image_mean(list(map(float, i.mean)))
    writer.add_vision_image_std(list(map(float, i.std)))
    # The blocks whose outputs are concatenated, counted from 0. llama.cpp's key counts the ViT's input as 0.
    blocks = [layer % v.n_layers for layer in v.layers]
    writer.add_array("molmo.vision.blocks", blocks)
    writer.add_array("clip.vision.feature_layer", [block + 1 for block in blocks])
    writer.add_uint32("molmo.pool", i.pool)
    writer.add_array("molmo.overlap_margins", list(i.overlap_margins))
    writer.add_uint32("molmo.max_crops", i.max_crops)
    writer.add_string("molmo.resize", i.resize)
    for token, token_id in image_token_ids(tokenizer).items():
        writer.add_uint32(f"molmo.token.{token}", token_id)
