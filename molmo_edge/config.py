"""What a Molmo is made of: image geometry, vision tower, connector, decoder.

Plain frozen dataclasses that check themselves, and presets by name.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from molmo_edge.errors import MolmoEdgeError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


OVERVIEW_UNIT = 32  # pixels; sides of an overview are padded to multiples of it

DEVICES = ("auto", "cpu", "cuda", "mps", "tensorrt", "coreml", "vulkan")

# Of weights on PyTorch: modeling/precision.py says what they mean.
PRECISIONS = ("auto", "fp32", "bf16", "int8", "nf4")


class ConfigError(MolmoEdgeError):
    """A configuration that cannot be read, or that contradicts itself."""


_MAY_BE_ZERO = ("max_crops", "overview", "n_experts", "top_k", "additional_vocab_size")
_KINDS: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "bool": bool, "str": str}


def _check(config: Any) -> None:
    """Raise ConfigError for a field of another type than it says, or for a size that is none.

    Manifests and config.json come from anybody; what is wrong in them is named here, not by a division further on.
    """
    for f in dataclasses.fields(config):
        name, value = f"{type(config).__name__}.{f.name}", getattr(config, f.name)
        kind, *more = str(f.type).removeprefix("tuple[").removesuffix("]").split(", ")  # ["int", "int"], ["int", "..."]
        if kind not in _KINDS:
            continue  # a section, which has checked itself
        if more:
            fits = isinstance(value, tuple) and (more == ["..."] or len(value) == 1 + len(more))
            fits = fits and all(_is(kind, v) for v in value)
        else:
            fits = _is(kind, value)
        if not fits:
            raise ConfigError(f"{name} must be {f.type}, it is {value!r}")
        if kind in ("int", "float") and not more and not (value > 0 or (value == 0 and f.name in _MAY_BE_ZERO)):
            allowed = "positive or 0" if f.name in _MAY_BE_ZERO else "positive"
            raise ConfigError(f"{name} must be {allowed}, it is {value}")


def _is(kind: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, _KINDS[kind]):
        return kind == "bool" and isinstance(value, bool)
    return not isinstance(value, float) or math.isfinite(value)


@dataclass(frozen=True)
class ImageConfig:
    """Geometry of the overlapping crops (reference: MultiModalPreprocessor, "overlap-and-resize-c2")."""

    crop_size: int = 336  # side of a crop and of the global view, pixels
    patch_size: int = 14  # side of a ViT patch, pixels
    pool: int = 2  # patches per pooled cell, along each side
    overlap_margins: tuple[int, int] = (4, 4)  # patches dropped at the left/top and right/bottom inner sides
    max_crops: int = 12  # most crops of a tiling, the global view not counted; 0: the global view alone
    resize: str = "default"  # "default": bilinear, aspect kept, padded; "dino": bicubic, stretched to the canvas
    overview: int = 0  # longest side, pixels, of the whole picture as a convolutional tower sees it; 0: no such tower
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        _check(self)
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
        if self.overview % OVERVIEW_UNIT:
            raise ConfigError(
                f"overview {self.overview} is not a multiple of {OVERVIEW_UNIT}, the tower's largest stride"
            )
        if not min(self.std) > 0:
            raise ConfigError(f"std must be positive, it is {self.std}")
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
        _check(self)
        if not self.layers or not all(-self.n_layers <= layer < self.n_layers for layer in self.layers):
            raise ConfigError(f"vision layers {self.layers} are not all among the ViT's {self.n_layers}")
        if self.d_model % self.n_heads:
            raise ConfigError(f"vision d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
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
class ConvTowerConfig:
    """A convolutional tower over the whole picture: a CSP backbone and a feature pyramid at strides 8, 16 and 32.

    The shape is that of NanoDet-g (github.com/RangiLyu/nanodet, CustomCspNet and PAN).
    """

    stem_dim: int = 32  # channels behind the first convolution
    steps: tuple[int, ...] = (1, 2, 2, 3)  # residual steps of each stage; a stage doubles the channels
    pyramid_dim: int = 128  # channels of every level of the pyramid

    def __post_init__(self) -> None:
        _check(self)
        if len(self.steps) != 4 or min(self.steps) < 1:
            raise ConfigError(f"conv tower steps {self.steps} must be four positive numbers, one for each stage")
        if self.stem_dim % 2:
            raise ConfigError(f"conv tower stem_dim {self.stem_dim} must be even")

    @property
    def feature_dim(self) -> int:
        """Width of a patch's features: four samples at stride 8, one each at strides 16 and 32."""
        return 6 * self.pyramid_dim


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
        _check(self)
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
    """A whole model. `projector_dim` is the inner width of the connector's SwiGLU.

    With a `conv_tower` each patch has the ViT's features and, concatenated to them, the tower's.
    """

    image: ImageConfig = field(default_factory=ImageConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    projector_dim: int = 1024
    conv_tower: ConvTowerConfig | None = None

    def __post_init__(self) -> None:
        _check(self)
        if bool(self.conv_tower) != bool(self.image.overview):
            raise ConfigError("conv_tower and image.overview go together: the tower sees the overview")
        if self.vision.n_pos != self.image.patches**2 + 1:
            raise ConfigError(
                f"the ViT has {self.vision.n_pos} positions, but a crop has {self.image.patches**2} patches "
                "and a class token"
            )
        if self.vision.patch_size != self.image.patch_size:
            raise ConfigError(
                f"the ViT's patches are {self.vision.patch_size} px, those of the crops {self.image.patch_size} px"
            )

    @property
    def feature_dim(self) -> int:
        """Width of a patch feature as the connector sees it: of all towers together."""
        return self.vision.feature_dim + (self.conv_tower.feature_dim if self.conv_tower else 0)

    def to_dict(self) -> dict[str, Any]:
        """As written into a bundle's manifest; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> MolmoConfig:
        """The inverse of `to_dict`. Raises ConfigError for anything else."""
        if not isinstance(data, dict):
            raise ConfigError(f"the configuration is {type(data).__name__}, not an object with sections")
        return cls(
            image=from_json(ImageConfig, data.get("image")),
            vision=from_json(VisionConfig, data.get("vision")),
            decoder=from_json(DecoderConfig, data.get("decoder")),
            projector_dim=data.get("projector_dim", 1024),
            conv_tower=from_json(ConvTowerConfig, data["conv_tower"]) if data.get("conv_tower") else None,
        )


def from_json(kind: type, data: Any) -> Any:
    """A section of a configuration from parsed JSON. Raises ConfigError."""
    if not isinstance(data, dict):
        raise ConfigError(f"the configuration has no section for {kind.__name__}")
    unknown = sorted(set(data) - {f.name for f in dataclasses.fields(kind)})
    if unknown:
        raise ConfigError(f"{kind.__name__} does not know {', '.join(unknown)}: was this made by a newer molmo-edge?")
    return kind(**{k: as_tuple(v) for k, v in data.items()})


def as_tuple(value: Any) -> Any:
    """JSON knows lists only; what is no list is for the section to judge."""
    return tuple(value) if isinstance(value, list) else value


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
            max_position_embeddings=2048,
        ),
        projector_dim=1536,
    ),
}
