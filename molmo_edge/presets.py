"""The configurations of the published models, by name."""

from __future__ import annotations

import math
from typing import Any

from molmo_edge.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ConvTowerConfig,
    DecoderConfig,
    ImageConfig,
    MolmoConfig,
    PointHeadConfig,
    VisionConfig,
    YarnConfig,
)

_QWEN3: dict[str, Any] = {
    "vocab_size": 151936,
    "embedding_size": 151936,
    "qk_norm": True,
    "qk_norm_per_head": True,
    "norm_eps": 1e-6,
    "max_position_embeddings": 36864,
    "image_attention": "bidirectional",
}


def _molmo2(decoder: DecoderConfig) -> MolmoConfig:
    """A Molmo2 with its SigLIP2 tower, which has 27 layers; the last two are not used."""
    half = (0.5, 0.5, 0.5)
    return MolmoConfig(
        image=ImageConfig(crop_size=378, max_crops=8, resize="siglip", mean=half, std=half, layout="molmo2"),
        vision=VisionConfig(
            image_model_type="siglip",
            d_model=1152,
            n_layers=25,
            n_heads=16,
            mlp_dim=4304,
            n_pos=729,
            norm_eps=1e-6,
            activation="gelu_pytorch_tanh",
            layers=(24, 18),
        ),
        decoder=decoder,
        projector_dim=decoder.ffn_dim,
        pad_embed=False,
    )


PRESETS: dict[str, MolmoConfig] = {
    "molmoe-1b": MolmoConfig(
        decoder=DecoderConfig(n_experts=64, top_k=8, qk_norm=True, max_position_embeddings=32768),
        projector_dim=1024,
    ),
    "molmo-7b-d": MolmoConfig(
        decoder=DecoderConfig(
            d_model=3584,
            n_layers=28,
            n_heads=28,
            n_kv_heads=4,
            ffn_dim=18944,
            vocab_size=152064,
            embedding_size=152064,
            qkv_bias=True,
            norm_eps=1e-6,
            rope_theta=1e6,
        ),
        projector_dim=18944,
    ),
    "molmo-7b-o": MolmoConfig(
        decoder=DecoderConfig(
            d_model=4096,
            n_layers=32,
            n_heads=32,
            n_kv_heads=32,
            ffn_dim=11008,
            vocab_size=100278,
            embedding_size=100352,
            qk_norm=True,
            norm_after=True,
            norm_eps=1e-6,
            rope_theta=5e5,
        ),
        projector_dim=11008,
    ),
    "molmo-72b": MolmoConfig(
        decoder=DecoderConfig(
            d_model=8192,
            n_layers=80,
            n_heads=64,
            n_kv_heads=8,
            ffn_dim=29568,
            vocab_size=152064,
            embedding_size=152064,
            qkv_bias=True,
            norm_eps=1e-5,
            rope_theta=1e6,
        ),
        projector_dim=29568,
    ),
    "molmo2-4b": _molmo2(
        DecoderConfig(
            d_model=2560,
            n_layers=36,
            n_heads=32,
            n_kv_heads=8,
            head_dim_override=128,
            ffn_dim=9728,
            rope_theta=5e6,
            **_QWEN3,
        )
    ),
    "molmo2-8b": _molmo2(
        DecoderConfig(d_model=4096, n_layers=36, n_heads=32, n_kv_heads=8, ffn_dim=12288, rope_theta=1e6, **_QWEN3)
    ),
    "molmo2-o-7b": _molmo2(
        DecoderConfig(
            d_model=4096,
            n_layers=32,
            n_heads=32,
            n_kv_heads=32,
            ffn_dim=11008,
            vocab_size=100278,
            embedding_size=100278,
            qk_norm=True,
            norm_after=True,
            norm_eps=1e-6,
            rope_theta=5e5,
            max_position_embeddings=65536,
            yarn=YarnConfig(attention_factor=0.1 * math.log(8) + 1, layers=tuple(range(3, 32, 4))),
            image_attention="bidirectional",
        )
    ),
    # DINOv2 ViT-S/14, NanoDet-g's backbone and pyramid, and six layers of SmolLM2-135M, its FFN split into experts (see
    # MODEL_CARD.md).
    "nano": MolmoConfig(
        image=ImageConfig(
            crop_size=224,
            overlap_margins=(2, 2),
            max_crops=4,
            resize="dino",
            overview=416,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        ),
        vision=VisionConfig(
            image_model_type="dino",
            d_model=384,
            n_layers=12,
            n_heads=6,
            mlp_dim=1536,
            n_pos=257,
            norm_eps=1e-6,
            activation="gelu",
            layers=(-3, -6),
        ),
        decoder=DecoderConfig(
            d_model=576,
            n_layers=6,
            n_heads=9,
            n_kv_heads=9,
            ffn_dim=192,
            n_experts=8,
            top_k=8,
            vocab_size=8192,
            embedding_size=8192,
            additional_vocab_size=128,
            qk_norm=True,
            rope_theta=1e5,
            max_position_embeddings=2048,
            additional_head=True,
        ),
        projector_dim=1536,
        conv_tower=ConvTowerConfig(),
        point_head=PointHeadConfig(
            8197, 8198, 8199, dim=256, numbered=False, votes=3, vote_dim=96, peak_distance=3.0, peak_drop=0.75
        ),
    ),
}
