"""Vision tower, connector and the image tokens' rows as a GGUF of the kind that llama.cpp calls mmproj.

No program runs it as it is: llama.cpp has no graph for Molmo's crops, pooling and additive features. It is for those
who build one on ggml, so that they need neither PyTorch nor a pickle. docs/gguf.md documents every name. Where
llama.cpp's own names fit (its CLIP towers), they are taken.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, LlamaFileType

from molmo_edge.checkpoints.tensor_names import hub_shapes
from molmo_edge.checkpoints.tensor_sources import TensorSource
from molmo_edge.config import MolmoConfig
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.system.version import __version__

_BACKBONE, _WTE = "model.vision_backbone", "model.transformer.wte"
_VIT = f"{_BACKBONE}.image_vit"
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


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]
    dtype: type  # float16 for matrices, float32 for the rest


def write_mmproj(path: Path, config: MolmoConfig, tensors: TensorSource, tokenizer: Tokenizer, name: str) -> None:
    """One tensor after the other. The blocks behind the last that is used are left out."""
    listed = list(_tensors(config, tensors, tokenizer))
    writer = GGUFWriter(path, "clip")
    try:
        _metadata(writer, config, tokenizer, name)
        for t in listed:
            writer.add_tensor_info(t.name, t.shape, np.dtype(t.dtype), np.dtype(t.dtype).itemsize * math.prod(t.shape))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for t in listed:
            writer.write_tensor_data(np.ascontiguousarray(t.make().reshape(t.shape), t.dtype))
    finally:
        writer.close()


def image_token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Molmo's own tokens in the order of the rows of mm.token_embd.weight."""
    return {name: i for name, i in dataclasses.asdict(tokenizer.special).items() if name not in ("bos", "eos")}


def _tensors(config: MolmoConfig, tensors: TensorSource, tokenizer: Tokenizer) -> Iterator[_Tensor]:
    v, shapes = config.vision, hub_shapes(config)
    dino = v.image_model_type == "dino"

    def same(name: str, hub: str, *, exact: bool = False) -> _Tensor:
        shape = shapes[hub]
        return _Tensor(name, shape, lambda: tensors.get(hub), np.float32 if exact or len(shape) == 1 else np.float16)

    def both(name: str, hub: str) -> Iterator[_Tensor]:
        yield from (same(f"{name}.{leaf}", f"{hub}.{leaf}") for leaf in ("weight", "bias"))

    def patches() -> np.ndarray:  # [d, (row, column, channel)], as a convolution has it
        weight = tensors.get(f"{_VIT}.patch_embedding.weight")
        return weight.reshape(-1, v.patch_size, v.patch_size, 3).transpose(0, 3, 1, 2)

    def rows() -> np.ndarray:  # of concat(embedding, new_embedding), as ever
        ids, size = np.array(list(image_token_ids(tokenizer).values())), config.decoder.embedding_size
        found = np.empty((len(ids), config.decoder.d_model), np.float32)
        for table, inside, first in (("embedding", ids < size, 0), ("new_embedding", ids >= size, size)):
            if inside.any():
                found[inside] = tensors.get(f"{_WTE}.{table}")[ids[inside] - first]
        return found

    yield _Tensor("v.patch_embd.weight", (v.d_model, 3, v.patch_size, v.patch_size), patches, np.float16)
    yield same("v.class_embd", f"{_VIT}.class_embedding")
    yield same("v.position_embd.weight", f"{_VIT}.positional_embedding", exact=True)
    if dino:
        yield same("v.patch_embd.bias", f"{_VIT}.patch_embedding.bias")
    else:
        yield from both("v.pre_ln", f"{_VIT}.pre_ln")
    for n in range(v.last_layer + 1):
        block = f"{_VIT}.transformer.resblocks.{n}"
        for theirs, ours in _BLOCK.items():
            yield from both(f"v.blk.{n}.{ours}", f"{block}.{theirs}")
        for k in (1, 2) if dino else ():
            yield same(f"v.blk.{n}.ls{k}.weight", f"{block}.lambda{k}")
    yield same("mm.pad_embd.weight", f"{_BACKBONE}.pad_embed", exact=True)
    for theirs, ours in _POOL.items():
        yield from both(f"mm.pool.{ours}", f"{_BACKBONE}.image_pooling_2d.{theirs}")
    for theirs, ours in _PROJECTOR.items():
        yield same(f"{ours}.weight", f"{_BACKBONE}.image_projector.{theirs}.weight")
    tokens = len(image_token_ids(tokenizer))
    yield _Tensor("mm.token_embd.weight", (tokens, config.decoder.d_model), rows, np.float32)


def _metadata(writer: GGUFWriter, config: MolmoConfig, tokenizer: Tokenizer, name: str) -> None:
    v, i = config.vision, config.image
    writer.add_type("mmproj")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    writer.add_string("molmo_edge.created_by", f"molmo-edge {__version__}")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "molmo")
    writer.add_bool("clip.use_gelu", v.activation == "gelu")  # else quick_gelu
    for key, number in {
        "image_size": i.crop_size,
        "patch_size": v.patch_size,
        "embedding_length": v.d_model,
        "feed_forward_length": v.mlp_dim,
        "block_count": v.last_layer + 1,
        "attention.head_count": v.n_heads,
        "projection_dim": config.decoder.d_model,
    }.items():
        writer.add_uint32(f"clip.vision.{key}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", v.norm_eps)
    writer.add_array("clip.vision.image_mean", list(map(float, i.mean)))
    writer.add_array("clip.vision.image_std", list(map(float, i.std)))
    # Blocks whose outputs are concatenated in this order, counted from 0; llama.cpp's key counts the input as 0.
    blocks = [layer % v.n_layers for layer in v.layers]
    writer.add_array("molmo.vision.blocks", blocks)
    writer.add_array("clip.vision.feature_layer", [block + 1 for block in blocks])
    writer.add_uint32("molmo.pool", i.pool)
    writer.add_array("molmo.overlap_margins", list(i.overlap_margins))
    writer.add_uint32("molmo.max_crops", i.max_crops)
    writer.add_string("molmo.resize", i.resize)
    for token, token_id in image_token_ids(tokenizer).items():
        writer.add_uint32(f"molmo.token.{token}", token_id)
