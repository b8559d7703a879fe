"""The `config.json` of Molmo2 and MolmoPoint as a MolmoConfig, and back.

Source: `hf_model/configuration_molmo2.py` and `configuration_molmo_point.py` of allenai/molmo2.
"""

from __future__ import annotations

from typing import Any

from molmo_edge.config import (
    ConfigError,
    DecoderConfig,
    ImageConfig,
    MolmoConfig,
    PointHeadConfig,
    VideoConfig,
    VisionConfig,
    YarnConfig,
)
from molmo_edge.frontend.tokenizer import SpecialIds
from molmo_edge.system.config_fields import as_tuple

# The values that this package implements. A checkpoint with others would load but give wrong answers.
_SUPPORTED: dict[str, dict[str, Any]] = {
    "text_config": {"hidden_act": "silu", "use_qk_norm": True, "qkv_bias": False},
    "vit_config": {"hidden_act": "gelu_pytorch_tanh"},
    "adapter_config": {"hidden_act": "silu", "pooling_attention_mask": True, "positional_embeddings": None},
}


def read_molmo2(raw: dict[str, Any], preprocessor: dict[str, Any]) -> MolmoConfig:
    """Build a MolmoConfig from the parsed config.json and preprocessor_config.json.

    Raises KeyError for a missing key, ConfigError for a value that is not supported.
    """
    for section, values in _SUPPORTED.items():
        for key, value in values.items():
            if raw[section].get(key, value) != value:
                raise ConfigError(
                    f"config.json has {section}.{key} {raw[section][key]!r}, but only {value!r} is supported"
                )
    text, vit, adapter = raw["text_config"], raw["vit_config"], raw["adapter_config"]
    layers = as_tuple(adapter["vit_layers"])
    # Only the layers up to the last used one are stored, but negative indices count from the declared number.
    used = tuple(layer % vit["num_hidden_layers"] for layer in layers)
    vision = VisionConfig(
        image_model_type="siglip",
        d_model=vit["hidden_size"],
        n_layers=max(used) + 1,
        n_heads=vit["num_attention_heads"],
        mlp_dim=vit["intermediate_size"],
        n_pos=vit["image_num_pos"],
        patch_size=vit["image_patch_size"],
        norm_eps=vit["layer_norm_eps"],
        activation=vit["hidden_act"],
        layers=used,
    )
    crop = vit["image_default_input_size"]
    image = ImageConfig(
        crop_size=crop[0],
        patch_size=vision.patch_size,
        pool=as_tuple(preprocessor.get("pooling_size", (2, 2)))[0],
        overlap_margins=as_tuple(preprocessor.get("overlap_margins", (4, 4))),
        max_crops=preprocessor.get("max_crops", 8),
        resize="siglip",
        mean=as_tuple(preprocessor.get("image_mean", (0.5, 0.5, 0.5))),
        std=as_tuple(preprocessor.get("image_std", (0.5, 0.5, 0.5))),
        layout=raw["model_type"],
    )
    return MolmoConfig(
        image,
        vision,
        _decoder(text, additional_head=raw["model_type"] == "molmo_point"),
        projector_dim=adapter["intermediate_size"],
        pooling_heads=0 if adapter["num_attention_heads"] == vision.n_heads else adapter["num_attention_heads"],
        pooling_output=adapter.get("attention_pooling_out_layer", raw["model_type"] == "molmo2"),
        pad_embed=False,
        point_head=_point_head(raw) if raw["model_type"] == "molmo_point" else None,
    )


_POINT_HEAD = {
    "patch_location": "3x3",
    "patch_embedding_kind": "image_feature0",
    "embed_selected_vit_patch": "linear",
    "embed_location": False,
    "layer_norm_x": True,
    "norm_logits": True,
    "mask_patches": "always",
    "mask_subpatches": "inference",
    "mask_repeats": "inference",
    "token_prediction_rotary": "one_d",
}


def _point_head(raw: dict[str, Any]) -> PointHeadConfig:
    for key, value in _POINT_HEAD.items():
        if raw.get(key, value) != value:
            raise ConfigError(f"config.json has {key} {raw[key]!r}, but only {value!r} is supported")
    return PointHeadConfig(
        patch_token=raw["patch_token_id"],
        subpatch_token=raw["subpatch_token_id"],
        location_token=raw["location_token_id"],
        dim=raw["patch_embed_dim"],
        rope_theta=raw["token_prediction_rotary_theta"],
        no_more_class=raw["no_more_points_class"],
    )


def _decoder(text: dict[str, Any], *, additional_head: bool) -> DecoderConfig:
    if text["qk_norm_type"] not in ("qwen3", "olmo"):
        raise ConfigError(
            f"config.json has text_config.qk_norm_type {text['qk_norm_type']!r}, which is not supported "
            "(supported: 'qwen3', 'olmo')"
        )
    return DecoderConfig(
        d_model=text["hidden_size"],
        n_layers=text["num_hidden_layers"],
        n_heads=text["num_attention_heads"],
        n_kv_heads=text["num_key_value_heads"],
        ffn_dim=text["intermediate_size"],
        vocab_size=text["vocab_size"],
        embedding_size=text["vocab_size"],
        additional_vocab_size=text["additional_vocab_size"],
        qk_norm=True,
        norm_after=text["norm_after"],
        norm_eps=text["layer_norm_eps"],
        rope_theta=text["rope_theta"],
        max_position_embeddings=text["max_position_embeddings"],
        head_dim_override=text["head_dim"],
        weight_tying=text.get("tie_word_embeddings") or False,
        qk_norm_per_head=text["qk_norm_type"] == "qwen3",
        yarn=_yarn(text),
        additional_head=additional_head,
        image_attention="bidirectional",
    )


def _yarn(text: dict[str, Any]) -> YarnConfig | None:
    scaling = text.get("rope_scaling")
    if not scaling:
        return None
    if scaling.get("rope_type") != "yarn" or not scaling.get("truncate", True):
        raise ConfigError(f"config.json has text_config.rope_scaling {scaling!r}, but only plain YaRN is supported")
    layers = text.get("rope_scaling_layers")
    return YarnConfig(
        factor=scaling["factor"],
        original_positions=scaling["original_max_position_embeddings"],
        attention_factor=scaling["attention_factor"],
        beta_fast=scaling.get("beta_fast", 32.0),
        beta_slow=scaling.get("beta_slow", 1.0),
        layers=tuple(range(text["num_hidden_layers"])) if layers is None else as_tuple(layers),
    )


def to_molmo2_config(config: MolmoConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inverse of `read_molmo2`: config.json and preprocessor_config.json."""
    d, v, i, yarn = config.decoder, config.vision, config.image, config.decoder.yarn
    raw: dict[str, Any] = {
        "model_type": i.layout,
        "text_config": {
            "hidden_size": d.d_model,
            "num_hidden_layers": d.n_layers,
            "num_attention_heads": d.n_heads,
            "num_key_value_heads": d.n_kv_heads,
            "head_dim": d.head_dim,
            "intermediate_size": d.ffn_dim,
            "vocab_size": d.vocab_size,
            "additional_vocab_size": d.additional_vocab_size,
            "hidden_act": "silu",
            "qkv_bias": d.qkv_bias,
            "use_qk_norm": d.qk_norm,
            "qk_norm_type": "qwen3" if d.qk_norm_per_head else "olmo",
            "norm_after": d.norm_after,
            "layer_norm_eps": d.norm_eps,
            "rope_theta": d.rope_theta,
            "rope_scaling": None if yarn is None else _yarn_keys(yarn),
            "rope_scaling_layers": None if yarn is None else list(yarn.layers),
            "max_position_embeddings": d.max_position_embeddings,
            "tie_word_embeddings": d.weight_tying,
        },
        "vit_config": {
            "hidden_size": v.d_model,
            "num_hidden_layers": v.n_layers,
            "num_attention_heads": v.n_heads,
            "num_key_value_heads": v.n_heads,
            "head_dim": v.head_dim,
            "intermediate_size": v.mlp_dim,
            "hidden_act": v.activation,
            "layer_norm_eps": v.norm_eps,
            "image_default_input_size": [i.crop_size, i.crop_size],
            "image_patch_size": v.patch_size,
            "image_num_pos": v.n_pos,
        },
        "adapter_config": {
            "vit_layers": list(v.layers),
            "hidden_size": v.d_model,
            "num_attention_heads": config.pooling_heads or v.n_heads,
            "num_key_value_heads": config.pooling_heads or v.n_heads,
            "head_dim": v.d_model // (config.pooling_heads or v.n_heads),
            "intermediate_size": config.projector_dim,
            "text_hidden_size": d.d_model,
            "hidden_act": "silu",
            "pooling_attention_mask": True,
            "attention_pooling_out_layer": config.pooling_output,
        },
        "tie_word_embeddings": d.weight_tying,
    }
    if (point := config.point_head) is not None:
        raw |= _POINT_HEAD | {
            "patch_token_id": point.patch_token,
            "subpatch_token_id": point.subpatch_token,
            "location_token_id": point.location_token,
            "patch_embed_dim": point.dim,
            "token_prediction_rotary_theta": point.rope_theta,
            "no_more_points_class": point.no_more_class,
        }
    preprocessor = {
        "image_mean": list(i.mean),
        "image_std": list(i.std),
        "max_crops": i.max_crops,
        "overlap_margins": list(i.overlap_margins),
        "patch_size": i.patch_size,
        "pooling_size": [i.pool, i.pool],
        "size": {"height": i.crop_size, "width": i.crop_size},
    }
    return raw, preprocessor


def special_id_keys(config: MolmoConfig, special: SpecialIds) -> dict[str, Any]:
    """The ids of image tokens as keys of config.json; transformers finds the positions of images by them."""
    low = "image_low_res_id" if config.point_head is None else "image_non_indexable_patch_id"
    return {
        "image_start_token_id": special.im_start,
        "image_end_token_id": special.im_end,
        "image_patch_id": special.im_patch,
        "image_high_res_id": special.im_patch,
        "image_col_id": special.im_col,
        "low_res_image_start_token_id": special.low_res_im_start,
        low: special.im_low,
        "frame_start_token_id": special.frame_start,
        "frame_end_token_id": special.frame_end,
        "use_frame_special_tokens": True,
    }


def read_video(raw: dict[str, Any]) -> VideoConfig:
    """The parsed video_preprocessor_config.json as a VideoConfig. Raises ConfigError."""
    given = {"max_frames": raw.get("num_frames"), "max_fps": raw.get("max_fps")}
    return VideoConfig(**{name: value for name, value in given.items() if value is not None})


def video_keys(video: VideoConfig) -> dict[str, Any]:
    """The inverse of `read_video`."""
    return {
        "frame_sample_mode": "uniform_last_frame",
        "max_fps": video.max_fps,
        "num_frames": video.max_frames,
        "pooling_size": [3, 3],
    }


def _yarn_keys(yarn: YarnConfig) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_positions,
        "attention_factor": yarn.attention_factor,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }
