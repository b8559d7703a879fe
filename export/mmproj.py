"""Vision tower, connector and the image tokens' rows as a GGUF of the kind that llama.cpp calls mmproj.

No program runs it as it is: llama.cpp has no graph for Molmo's crops, pooling and additive features. It is for those
who build one on ggml, so that they need neither PyTorch nor a pickle. docs/gguf.md documents every name. Where
llama.cpp's own names fit (its CLIP towers), they are taken.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, LlamaFileType

import molmo_edge
from molmo_edge.config import MolmoConfig
from molmo_edge.modeling.checkpoint import TensorSource
from molmo_edge.tokenizer import Tokenizer

_BACKBONE = "model.vision_backbone"
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


def write_mmproj(path: Path, config: MolmoConfig, tensors: TensorSource, tokenizer: Tokenizer, name: str) -> None:
    """Matrices in float16, the rest in float32. The blocks behind the last that is used are left out."""
    writer = GGUFWriter(path, "clip")
    try:
        _metadata(writer, config, tokenizer, name)
        v, get = config.vision, tensors.get
        dino = v.image_model_type == "dino"
        patch = get(f"{_VIT}.patch_embedding.weight")  # [d, (row, column, channel)]
        patch = patch.reshape(-1, v.patch_size, v.patch_size, 3).transpose(0, 3, 1, 2)  # as a convolution has it
        _add(writer, "v.patch_embd.weight", np.ascontiguousarray(patch))
        _add(writer, "v.class_embd", get(f"{_VIT}.class_embedding").reshape(-1))
        _add(writer, "v.position_embd.weight", get(f"{_VIT}.positional_embedding"), exact=True)
        if dino:
            _add(writer, "v.patch_embd.bias", get(f"{_VIT}.patch_embedding.bias"))
        else:
            for leaf in ("weight", "bias"):
                _add(writer, f"v.pre_ln.{leaf}", get(f"{_VIT}.pre_ln.{leaf}"))
        for n in range(v.last_layer + 1):
            block = f"{_VIT}.transformer.resblocks.{n}"
            for theirs, ours in _BLOCK.items():
                for leaf in ("weight", "bias"):
                    _add(writer, f"v.blk.{n}.{ours}.{leaf}", get(f"{block}.{theirs}.{leaf}"))
            for k in (1, 2) if dino else ():
                _add(writer, f"v.blk.{n}.ls{k}.weight", get(f"{block}.lambda{k}"))
        _add(writer, "mm.pad_embd.weight", get(f"{_BACKBONE}.pad_embed"), exact=True)
        for theirs, ours in _POOL.items():
            for leaf in ("weight", "bias"):
                _add(writer, f"mm.pool.{ours}.{leaf}", get(f"{_BACKBONE}.image_pooling_2d.{theirs}.{leaf}"))
        for theirs, ours in _PROJECTOR.items():
            _add(writer, f"{ours}.weight", get(f"{_BACKBONE}.image_projector.{theirs}.weight"))
        _add(writer, "mm.token_embd.weight", _image_rows(config, tensors, tokenizer), exact=True)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def image_token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Molmo's own tokens in the order of the rows of mm.token_embd.weight."""
    return {name: i for name, i in dataclasses.asdict(tokenizer.special).items() if name not in ("bos", "eos")}


def _add(writer: GGUFWriter, name: str, values: np.ndarray, *, exact: bool = False) -> None:
    narrow = values.ndim > 1 and not exact and np.abs(values).max() < np.finfo(np.float16).max
    writer.add_tensor(name, values.astype(np.float16 if narrow else np.float32))


def _image_rows(config: MolmoConfig, tensors: TensorSource, tokenizer: Tokenizer) -> np.ndarray:
    """Float32 [tokens, d_model], looked up in concat(embedding, new_embedding) as ever."""
    d, wte = config.decoder, "model.transformer.wte"
    ids = list(image_token_ids(tokenizer).values())
    table = tensors.get(f"{wte}.embedding")
    if max(ids) >= d.embedding_size:
        table = np.concatenate([table, tensors.get(f"{wte}.new_embedding")])
    return table[ids]


def _metadata(writer: GGUFWriter, config: MolmoConfig, tokenizer: Tokenizer, name: str) -> None:
    v, i = config.vision, config.image
    writer.add_type("mmproj")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    writer.add_string("molmo_edge.created_by", f"molmo-edge {molmo_edge.__version__}")
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
