"""The `config.json` of a checkpoint as a MolmoConfig, and back.

Molmo v1 has two sets of keys: dense models use `hidden_size`, ..., MolmoE uses `d_model`, .... The reference's own
folders hold a `config.yaml` instead, whose `model` section has the keys of MolmoE. Keys that no public checkpoint has
are written only for models that need them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from molmo_edge.checkpoints.molmo2_config import (
    read_molmo2,
    read_video,
    special_id_keys,
    to_molmo2_config,
    video_keys,
)
from molmo_edge.config import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ConfigError,
    ConvTowerConfig,
    DecoderConfig,
    ImageConfig,
    MolmoConfig,
    PointHeadConfig,
    VisionConfig,
)
from molmo_edge.frontend.tokenizer import SpecialIds
from molmo_edge.system.config_fields import as_tuple, from_json, to_json

CONFIG, PREPROCESSOR, REFERENCE_CONFIG = "config.json", "preprocessor_config.json", "config.yaml"
VIDEO = "video_preprocessor_config.json"  # of a Molmo2

# The values that this package implements. A checkpoint with others would load but give wrong answers.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_type": ("swiglu",),
    "clip_qkv": (None,),
    "image_padding_embed": ("pad_and_partial_pad", None),
    "image_pooling_2d": ("attention-meanq",),
    "image_projector": ("mlp",),
    "layer_norm_type": ("rms",),
    "rope_impl": (None, "llama"),
}


def is_checkpoint(directory: Path) -> bool:
    """Whether `directory` holds the configuration file of a checkpoint, in hub layout or the reference's own."""
    return any((directory / name).is_file() for name in (CONFIG, REFERENCE_CONFIG))


def read_config(directory: str | Path) -> MolmoConfig:
    """Read the configuration of a checkpoint directory, in hub layout or the reference's own. Raises ConfigError."""
    directory = Path(directory)
    if not (directory / CONFIG).exists() and (directory / REFERENCE_CONFIG).exists():
        return read_reference_config(directory / REFERENCE_CONFIG)
    image, video = ({} if not (directory / n).exists() else _read_json(directory / n) for n in (PREPROCESSOR, VIDEO))
    config = from_hub_config(_read_json(directory / CONFIG), image)
    return replace(config, video=read_video(video)) if config.several_images else config


def read_reference_config(path: Path) -> MolmoConfig:
    """The `model` section of the reference's config.yaml. Raises ConfigError."""
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    model = raw.get("model") if isinstance(raw, dict) else None
    if not isinstance(model, dict):
        raise ConfigError(f"{path} has no section `model`: this is not the configuration of a Molmo")
    vision = model.get("vision_backbone")
    if not isinstance(vision, dict):
        raise ConfigError(f"{path} has no model.vision_backbone: this is the configuration of a text model")
    # OmegaConf writes the name of an enum, the hub its value.
    model = model | {"model_type": "molmo", "image_pooling_2d": str(model.get("image_pooling_2d")).replace("_", "-")}
    # The choice of the reference's build_mm_preprocessor.
    dino = vision.get("resize_mode") == "dino"
    return from_hub_config(model, {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD} if dino else {})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: is this a checkpoint directory?") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return data


def from_hub_config(raw: dict[str, Any], preprocessor: dict[str, Any]) -> MolmoConfig:
    """Build a MolmoConfig from the parsed config.json and preprocessor_config.json of a hub checkpoint.

    Raises ConfigError for a missing key, a value of the wrong type, and an architecture that is not supported.
    """
    read = _READERS.get(str(raw.get("model_type")))
    if read is None:
        raise ConfigError(f"model_type is {raw.get('model_type')!r}, which is not supported ({', '.join(_READERS)} is)")
    try:
        return read(raw, preprocessor)
    except KeyError as error:
        raise ConfigError(f"config.json has no {error.args[0]!r}") from None


def _read_molmo(raw: dict[str, Any], preprocessor: dict[str, Any]) -> MolmoConfig:
    """Molmo v1, with both sets of keys."""
    for key, supported in _SUPPORTED.items():
        if raw.get(key, supported[0]) not in supported:
            raise ConfigError(f"config.json has {key} {raw[key]!r}, but only {supported[0]!r} is supported")
    pool = raw.get("image_pooling_h", 2)
    if raw.get("image_pooling_w", pool) != pool:
        raise ConfigError(f"config.json has image_pooling_w {raw['image_pooling_w']!r}, but image_pooling_h {pool!r}")
    decoder = _decoder(raw)
    vision, crop, resize = _vision(raw)
    backbone = raw.get("vision_backbone") or {}
    tower = dict(backbone.get("conv_tower") or {})
    image = ImageConfig(
        crop_size=crop,
        patch_size=vision.patch_size,
        pool=pool,
        overlap_margins=as_tuple(preprocessor.get("overlap_margins", raw.get("overlap_margins", (4, 4)))),
        max_crops=preprocessor.get("max_crops", raw.get("max_crops", 12)),
        resize=resize,
        mean=as_tuple(preprocessor.get("image_mean", CLIP_MEAN)),
        std=as_tuple(preprocessor.get("image_std", CLIP_STD)),
        overview=tower.pop("overview", 0),
    )
    if image.pools_across_crops and not raw.get("pooling_attention_mask"):
        # The reference fills incomplete cells of such crops with zeros, which it does not mask.
        raise ConfigError(
            f"config.json has crops of {image.patches} x {image.patches} patches with margins of "
            f"{image.overlap_margins}, which cells of {pool} x {pool} do not tile, and no pooling_attention_mask"
        )
    return MolmoConfig(
        image,
        vision,
        decoder,
        # In the reference the projector has the width of the decoder's FFN.
        projector_dim=raw.get("image_projector_dim") or decoder.ffn_dim,
        conv_tower=from_json(ConvTowerConfig, tower) if tower else None,
        pad_embed=raw.get("image_padding_embed", "pad_and_partial_pad") is not None,
        extra_vision=tuple(from_json(VisionConfig, vit) for vit in backbone.get("extra_vision", ())),
        point_head=from_json(PointHeadConfig, raw["point_head"]) if raw.get("point_head") else None,
    )


_READERS = {"molmo": _read_molmo, "molmo2": read_molmo2, "molmo_point": read_molmo2}
MODEL_TYPES = tuple(_READERS)  # values of `model_type`


def _vision(raw: dict[str, Any]) -> tuple[VisionConfig, int, str]:
    """The ViT, the side of a crop in pixels, and the resize mode."""
    layers = as_tuple(raw.get("vit_layers", (-2, -9)))
    if "vision_backbone" not in raw and "d_model" not in raw:  # the remote code of Molmo-7B hard-codes CLIP's sizes
        return VisionConfig(layers=layers), 336, "default"
    v = raw["vision_backbone"]
    if not isinstance(v, dict):
        raise ConfigError(f"vision_backbone in config.json must be an object, it is {v!r}")
    crop = v["image_default_input_size"]
    if not isinstance(crop, list) or len(crop) != 2 or crop[0] != crop[1]:
        raise ConfigError(f"crops must be square, this checkpoint has image_default_input_size {crop!r}")
    vision = VisionConfig(
        image_model_type=v["image_model_type"],
        d_model=v["image_emb_dim"],
        n_layers=v["image_num_layers"],
        n_heads=v["image_num_heads"],
        mlp_dim=v["image_mlp_dim"],
        n_pos=v["image_num_pos"],
        patch_size=v["image_patch_size"],
        norm_eps=v["image_norm_eps"],
        activation=v["image_mlp_activations"],
        layers=layers,
    )
    return vision, crop[0], v.get("resize_mode", "default")


def _half(value: Any, key: str) -> int:
    # OLMo's configuration counts gate and up together.
    if not isinstance(value, int):
        raise ConfigError(f"{key} in config.json must be a whole number, it is {value!r}")
    return value // 2


def _decoder(raw: dict[str, Any]) -> DecoderConfig:
    sizes = _moe_sizes(raw) if "d_model" in raw else _dense_sizes(raw)
    qk_norm, norm_type = raw.get("attention_layer_norm") or False, raw.get("qk_norm_type")
    if norm_type not in (None, "olmo", "qwen3"):
        raise ConfigError(f"config.json has qk_norm_type {norm_type!r}, but only 'olmo' and 'qwen3' are supported")
    return DecoderConfig(
        **sizes,
        vocab_size=raw["vocab_size"],
        embedding_size=raw.get("embedding_size") or raw["vocab_size"],
        qkv_bias=raw.get("qkv_bias") or False,
        qk_norm=qk_norm,
        norm_after=raw.get("norm_after") or False,
        norm_eps=raw["layer_norm_eps"],
        rope_theta=raw["rope_theta"],
        weight_tying=raw.get("weight_tying") or raw.get("tie_word_embeddings") or False,
        head_dim_override=raw.get("head_dim") or 0,
        qk_norm_per_head=norm_type == "qwen3" and qk_norm,
        image_attention=raw.get("image_attention", "causal"),
        additional_head=raw.get("additional_head", False),
    )


def _moe_sizes(raw: dict[str, Any]) -> dict[str, Any]:
    d_model, ratio = raw["d_model"], raw.get("mlp_ratio")
    fused = raw.get("mlp_hidden_size")
    if not fused and isinstance(d_model, int) and isinstance(ratio, int | float):
        fused = int(ratio * d_model)
    moe = raw.get("block_type") == "moe"
    return {
        "d_model": d_model,
        "n_layers": raw["n_layers"],
        "n_heads": raw["n_heads"],
        "n_kv_heads": raw.get("n_kv_heads") or raw["n_heads"],
        "ffn_dim": _half(fused, "mlp_hidden_size, or mlp_ratio * d_model,"),
        "n_experts": raw["moe_num_experts"] if moe else 0,
        "top_k": raw["moe_top_k"] if moe else 0,
        "additional_vocab_size": raw.get("additional_vocab_size") or 0,
        "max_position_embeddings": raw.get("max_position_embeddings") or raw["max_sequence_length"],
    }


def _dense_sizes(raw: dict[str, Any]) -> dict[str, Any]:
    return {
        "d_model": raw["hidden_size"],
        "n_layers": raw["num_hidden_layers"],
        "n_heads": raw["num_attention_heads"],
        "n_kv_heads": raw.get("num_key_value_heads") or raw["num_attention_heads"],
        "ffn_dim": _half(raw["intermediate_size"], "intermediate_size"),
        "additional_vocab_size": raw.get("additional_vocab_size", 128),
        "max_position_embeddings": raw["max_position_embeddings"],
    }


def to_hub_config(config: MolmoConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inverse of `from_hub_config`: config.json and preprocessor_config.json with the keys of such a decoder."""
    d, v, i = config.decoder, config.vision, config.image
    if i.layout != "molmo":
        return to_molmo2_config(config)
    raw = _moe_keys(config) if d.n_experts else _dense_keys(d)
    raw |= {
        "model_type": "molmo",
        "additional_vocab_size": d.additional_vocab_size,
        "attention_layer_norm": d.qk_norm,
        "clip_qkv": None,
        "embedding_size": d.embedding_size,
        "image_pooling_h": i.pool,
        "image_pooling_w": i.pool,
        "image_projector_dim": config.projector_dim,
        "layer_norm_eps": d.norm_eps,
        "layer_norm_type": "rms",
        "max_position_embeddings": d.max_position_embeddings,
        "norm_after": d.norm_after,
        "qkv_bias": d.qkv_bias,
        "rope_theta": d.rope_theta,
        "vit_layers": list(v.layers),
        "vocab_size": d.vocab_size,
        "weight_tying": d.weight_tying,
        "vision_backbone": {
            "image_default_input_size": [i.crop_size, i.crop_size],
            "image_emb_dim": v.d_model,
            "image_head_dim": v.head_dim,
            "image_mlp_activations": v.activation,
            "image_mlp_dim": v.mlp_dim,
            "image_model_type": v.image_model_type,
            "image_norm_eps": v.norm_eps,
            "image_num_heads": v.n_heads,
            "image_num_key_value_heads": v.n_heads,
            "image_num_layers": v.n_layers,
            "image_num_pos": v.n_pos,
            "image_patch_size": v.patch_size,
            "resize_mode": i.resize,
        },
    }
    if config.conv_tower is not None:
        raw["vision_backbone"]["conv_tower"] = {**to_json(config.conv_tower), "overview": i.overview}
    if config.extra_vision:
        raw["vision_backbone"]["extra_vision"] = to_json(config.extra_vision)
    raw |= {"head_dim": d.head_dim} if d.head_dim_override else {}
    raw |= {"qk_norm_type": "qwen3"} if d.qk_norm_per_head else {}
    raw |= {"image_attention": d.image_attention} if d.bidirectional_images else {}
    raw |= {"additional_head": True} if d.additional_head else {}
    raw |= {"point_head": to_json(config.point_head)} if config.point_head else {}
    raw |= {"image_padding_embed": None} if not config.pad_embed else {}
    raw |= {"pooling_attention_mask": True} if i.pools_across_crops else {}
    preprocessor = {
        "base_image_input_size": [i.crop_size, i.crop_size],
        "image_mean": list(i.mean),
        "image_std": list(i.std),
        "image_padding_mask": True,
        "image_patch_size": i.patch_size,
        "image_token_length_h": i.cells,
        "image_token_length_w": i.cells,
        "max_crops": i.max_crops,
        "overlap_margins": list(i.overlap_margins),
    }
    return raw, preprocessor


def write_hub_config(config: MolmoConfig, directory: Path, special: SpecialIds) -> None:
    """Write config.json, preprocessor_config.json and, for a Molmo2, video_preprocessor_config.json.

    `special`: the ids of the checkpoint's tokenizer, which the config.json of a Molmo2 repeats.
    """
    files = dict(zip((CONFIG, PREPROCESSOR), to_hub_config(config), strict=True))
    if config.several_images:
        files[CONFIG] |= special_id_keys(config, special)
        files[VIDEO] = video_keys(config.video)
    for name, data in files.items():
        (directory / name).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _moe_keys(config: MolmoConfig) -> dict[str, Any]:
    d, i = config.decoder, config.image
    return {
        "architectures": ["OLMoForCausalLM"],
        "activation_type": "swiglu",
        "block_type": "moe",
        "d_model": d.d_model,
        "max_crops": i.max_crops,
        "mlp_hidden_size": 2 * d.ffn_dim,
        "moe_num_experts": d.n_experts,
        "moe_top_k": d.top_k,
        "n_heads": d.n_heads,
        "n_kv_heads": d.n_kv_heads,
        "n_layers": d.n_layers,
        "overlap_margins": list(i.overlap_margins),
    }


def _dense_keys(d: DecoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["MolmoForCausalLM"],
        "hidden_size": d.d_model,
        "intermediate_size": 2 * d.ffn_dim,
        "num_attention_heads": d.n_heads,
        "num_hidden_layers": d.n_layers,
        "num_key_value_heads": d.n_kv_heads,
        "tie_word_embeddings": d.weight_tying,
    }
