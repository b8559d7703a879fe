"""What a Molmo is made of: image geometry, vision tower, connector, decoder.

Plain frozen dataclasses, presets by name, and readers for the two dialects of `config.json` that
the public checkpoints use (`hidden_size`, ... for the dense models, `d_model`, ... for MolmoE).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molmo_edge.errors import MolmoEdgeError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ConfigError(MolmoEdgeError):
    """A configuration that cannot be read, or that contradicts itself."""


@dataclass(frozen=True)
class ImageConfig:
    """Geometry of the overlapping crops (reference: MultiModalPreprocessor, "overlap-and-resize-c2")."""

    crop_size: int = 336  # side of a crop and of the global view, pixels
    patch_size: int = 14  # side of a ViT patch, pixels
    pool: int = 2  # patches per pooled cell, along each side
    overlap_margins: tuple[int, int] = (4, 4)  # patches dropped at the left/top and right/bottom inner sides
    max_crops: int = 12  # most crops of a tiling, the global view not counted; 0: the global view alone
    resize: str = "default"  # "default": bilinear, aspect kept, padded; "dino": bicubic, stretched to the canvas
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        left, right = self.overlap_margins
        if self.crop_size % (self.patch_size * self.pool):
            raise ConfigError(
                f"crop_size {self.crop_size} is not a multiple of patch_size * pool = {self.patch_size * self.pool}"
            )
        if left % self.pool or right % self.pool or min(left, right) < 0:
            raise ConfigError(f"overlap_margins {self.overlap_margins} must be non-negative multiples of {self.pool}")
        if left + right >= self.patches:
            raise ConfigError(
                f"overlap_margins {self.overlap_margins} leave nothing of a crop of {self.patches} patches"
            )
        if self.max_crops < 0:
            raise ConfigError(f"max_crops must not be negative, it is {self.max_crops}")
        if self.resize not in ("default", "dino"):
            raise ConfigError(f'resize is "{self.resize}"; known are "default" and "dino"')

    @property
    def patches(self) -> int:
        """Patches along a side of a crop (24)."""
        return self.crop_size // self.patch_size

    @property
    def cells(self) -> int:
        """Pooled cells along a side of a crop (12)."""
        return self.patches // self.pool

    @property
    def window(self) -> int:
        """Patches along a side of a crop that no neighbour repeats (16): the stride of the tiling."""
        return self.patches - sum(self.overlap_margins)


@dataclass(frozen=True)
class VisionConfig:
    """A ViT: CLIP ("openai": pre_ln, quick_gelu) or DINOv2 ("dino": LayerScale, gelu, biased patch embedding)."""

    image_model_type: str = "openai"
    d_model: int = 1024
    n_layers: int = 23  # CLIP's last layer was dropped when Molmo was trained
    n_heads: int = 16
    mlp_dim: int = 4096
    n_pos: int = 577  # class token + patches
    patch_size: int = 14  # pixels
    norm_eps: float = 1e-5
    activation: str = "quick_gelu"
    layers: tuple[int, ...] = (-2, -9)  # block outputs that are concatenated, in this order

    def __post_init__(self) -> None:
        if self.image_model_type not in ("openai", "dino"):
            raise ConfigError(f'vision type "{self.image_model_type}" is not known; known are "openai" and "dino"')
        if self.activation not in ("quick_gelu", "gelu"):
            raise ConfigError(f'vision activation "{self.activation}" is not known; known are "quick_gelu" and "gelu"')

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def feature_dim(self) -> int:
        """Width of a patch feature as the connector sees it (2048)."""
        return self.d_model * len(self.layers)

    @property
    def last_layer(self) -> int:
        """Index of the last block whose output is used; later blocks never run."""
        return max(layer % self.n_layers for layer in self.layers)


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder of the OLMo family: dense (Qwen2 style, OLMo post-norm style) or OLMoE."""

    d_model: int = 2048
    n_layers: int = 16
    n_heads: int = 16
    n_kv_heads: int = 16
    ffn_dim: int = 1024  # inner width of the SwiGLU, of one expert where there are experts
    n_experts: int = 0  # 0: dense
    top_k: int = 0  # experts a token uses
    vocab_size: int = 50280  # ids the tokenizer can produce; Molmo's special ids start here
    embedding_size: int = 50304  # rows of the embedding and of the head
    additional_vocab_size: int = 128  # rows of new_embedding, looked up behind the embedding's
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm over the full width of q and of k, before the split into heads
    norm_after: bool = False  # True: x + norm(f(x)), False: x + f(norm(x))
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    weight_tying: bool = False
    max_position_embeddings: int = 4096

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads:
            raise ConfigError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if bool(self.n_experts) != bool(self.top_k) or self.top_k > self.n_experts:
            raise ConfigError(f"top_k {self.top_k} does not fit n_experts {self.n_experts}")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


@dataclass(frozen=True)
class MolmoConfig:
    """A whole model. `projector_dim` is the inner width of the connector's SwiGLU."""

    image: ImageConfig = field(default_factory=ImageConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    projector_dim: int = 1024

    def __post_init__(self) -> None:
        if self.vision.n_pos != self.image.patches**2 + 1:
            raise ConfigError(
                f"the ViT has {self.vision.n_pos} positions, but a crop has {self.image.patches**2} patches "
                "and a class token"
            )
        if self.vision.patch_size != self.image.patch_size:
            raise ConfigError(
                f"the ViT's patches are {self.vision.patch_size} px, those of the crops {self.image.patch_size} px"
            )

    def to_dict(self) -> dict[str, Any]:
        """As written into a bundle's manifest; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MolmoConfig:
        return cls(
            image=_dataclass(ImageConfig, data.get("image")),
            vision=_dataclass(VisionConfig, data.get("vision")),
            decoder=_dataclass(DecoderConfig, data.get("decoder")),
            projector_dim=int(data.get("projector_dim", 1024)),
        )

    @classmethod
    def from_hub(cls, directory: str | Path) -> MolmoConfig:
        """Read `config.json` and `preprocessor_config.json` of a checkpoint directory in hub layout."""
        directory = Path(directory)
        raw = _read_json(directory / "config.json")
        image = directory / "preprocessor_config.json"
        return from_hub_config(raw, _read_json(image) if image.exists() else {})


def _dataclass(kind: type, data: Any) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"the configuration has no section for {kind.__name__}")
    unknown = sorted(set(data) - {f.name for f in dataclasses.fields(kind)})
    if unknown:
        raise ConfigError(f"{kind.__name__} does not know {', '.join(unknown)}: was this made by a newer molmo-edge?")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: is this a checkpoint directory?") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return data


def from_hub_config(raw: dict[str, Any], preprocessor: dict[str, Any]) -> MolmoConfig:
    """Build a MolmoConfig from the parsed JSON of a hub checkpoint, either dialect.

    Raises ConfigError where a key is missing or names an architecture that is not Molmo v1.
    """
    if raw.get("model_type") != "molmo":
        raise ConfigError(f'model_type is {raw.get("model_type")!r}, but only "molmo" (version 1) is known')
    try:
        decoder = _moe_dialect(raw) if "d_model" in raw else _dense_dialect(raw)
        vision, resize = _vision(raw)
        crop = raw["vision_backbone"]["image_default_input_size"]
    except KeyError as error:
        raise ConfigError(f"config.json has no {error.args[0]!r}") from None
    if crop[0] != crop[1]:
        raise ConfigError(f"crops must be square, this checkpoint has {crop[0]} x {crop[1]}")
    image = ImageConfig(
        crop_size=int(crop[0]),
        patch_size=vision.patch_size,
        pool=int(raw.get("image_pooling_h", 2)),
        overlap_margins=tuple(preprocessor.get("overlap_margins", raw.get("overlap_margins", (4, 4)))),
        max_crops=int(preprocessor.get("max_crops", raw.get("max_crops", 12))),
        resize=resize,
        mean=tuple(preprocessor.get("image_mean", CLIP_MEAN)),
        std=tuple(preprocessor.get("image_std", CLIP_STD)),
    )
    # The reference gives the projector the decoder's FFN width; nano says its own.
    projector = int(raw.get("image_projector_dim") or decoder.ffn_dim)
    return MolmoConfig(image=image, vision=vision, decoder=decoder, projector_dim=projector)


def _vision(raw: dict[str, Any]) -> tuple[VisionConfig, str]:
    v = raw["vision_backbone"]
    kind = v["image_model_type"]
    vision = VisionConfig(
        image_model_type=kind,
        d_model=v["image_emb_dim"],
        n_layers=v["image_num_layers"],
        n_heads=v["image_num_heads"],
        mlp_dim=v["image_mlp_dim"],
        n_pos=v["image_num_pos"],
        patch_size=v["image_patch_size"],
        norm_eps=v["image_norm_eps"],
        activation=v["image_mlp_activations"],
        layers=tuple(raw.get("vit_layers", (-2, -9))),
    )
    return vision, v.get("resize_mode", "default")


def _moe_dialect(raw: dict[str, Any]) -> DecoderConfig:
    # mlp_hidden_size counts gate and up together, as OLMo's swiglu does: half of it is the inner width.
    fused = raw.get("mlp_hidden_size") or raw["mlp_ratio"] * raw["d_model"]
    moe = raw.get("block_type") == "moe"
    return DecoderConfig(
        d_model=raw["d_model"],
        n_layers=raw["n_layers"],
        n_heads=raw["n_heads"],
        n_kv_heads=raw.get("n_kv_heads") or raw["n_heads"],
        ffn_dim=int(fused) // 2,
        n_experts=raw["moe_num_experts"] if moe else 0,
        top_k=raw["moe_top_k"] if moe else 0,
        vocab_size=raw["vocab_size"],
        embedding_size=raw.get("embedding_size") or raw["vocab_size"],
        additional_vocab_size=raw.get("additional_vocab_size") or 0,
        qkv_bias=bool(raw.get("qkv_bias")),
        qk_norm=bool(raw.get("attention_layer_norm")),
        norm_after=bool(raw.get("norm_after")),
        norm_eps=raw["layer_norm_eps"],
        rope_theta=float(raw["rope_theta"]),
        weight_tying=bool(raw.get("weight_tying")),
        max_position_embeddings=raw.get("max_position_embeddings") or raw["max_sequence_length"],
    )


def _dense_dialect(raw: dict[str, Any]) -> DecoderConfig:
    return DecoderConfig(
        d_model=raw["hidden_size"],
        n_layers=raw["num_hidden_layers"],
        n_heads=raw["num_attention_heads"],
        n_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        ffn_dim=raw["intermediate_size"] // 2,
        vocab_size=raw["vocab_size"],
        embedding_size=raw.get("embedding_size") or raw["vocab_size"],
        additional_vocab_size=raw.get("additional_vocab_size", 128),
        qkv_bias=bool(raw.get("qkv_bias")),
        qk_norm=bool(raw.get("attention_layer_norm")),
        norm_after=bool(raw.get("norm_after")),
        norm_eps=raw["layer_norm_eps"],
        rope_theta=float(raw["rope_theta"]),
        weight_tying=bool(raw.get("weight_tying") or raw.get("tie_word_embeddings")),
        max_position_embeddings=raw["max_position_embeddings"],
    )


def to_hub_config(config: MolmoConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inverse of `from_hub_config`, in MolmoE's dialect: (config.json, preprocessor_config.json)."""
    d, v, i = config.decoder, config.vision, config.image
    raw = {
        "architectures": ["OLMoForCausalLM"],
        "model_type": "molmo",
        "activation_type": "swiglu",
        "additional_vocab_size": d.additional_vocab_size,
        "attention_layer_norm": d.qk_norm,
        "block_type": "moe" if d.n_experts else "sequential",
        "d_model": d.d_model,
        "embedding_size": d.embedding_size,
        "image_pooling_h": i.pool,
        "image_pooling_w": i.pool,
        "image_projector_dim": config.projector_dim,
        "layer_norm_eps": d.norm_eps,
        "layer_norm_type": "rms",
        "max_crops": i.max_crops,
        "max_position_embeddings": d.max_position_embeddings,
        "mlp_hidden_size": 2 * d.ffn_dim,
        "moe_num_experts": d.n_experts,
        "moe_top_k": d.top_k,
        "n_heads": d.n_heads,
        "n_kv_heads": d.n_kv_heads,
        "n_layers": d.n_layers,
        "norm_after": d.norm_after,
        "overlap_margins": list(i.overlap_margins),
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
    # DINOv2 ViT-S/14 and six layers of SmolLM2-135M, its FFN split into experts (see MODEL_CARD.md).
    "nano": MolmoConfig(
        image=ImageConfig(
            crop_size=224,
            overlap_margins=(2, 2),
            max_crops=4,
            resize="dino",
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
            layers=(-1, -4),
        ),
        decoder=DecoderConfig(
            d_model=576,
            n_layers=6,
            n_heads=9,
            n_kv_heads=9,
            ffn_dim=192,
            n_experts=8,
            top_k=4,
            vocab_size=8192,
            embedding_size=8192,
            additional_vocab_size=128,
            qk_norm=True,
            rope_theta=1e5,
            max_position_embeddings=4096,
        ),
        projector_dim=1536,
    ),
}
