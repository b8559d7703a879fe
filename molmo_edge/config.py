"""The configuration of a Molmo: image geometry, vision towers, connector and decoder, and presets by name.

The sections are frozen dataclasses that validate themselves. A model family is a preset here, a reader of its
config.json (checkpoints/hub_config.py) and its tensor names (checkpoints/tensor_names.py). The differences between
families are fields of these sections.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from molmo_edge.errors import MolmoEdgeError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

OVERVIEW_UNIT = 32  # pixels; the sides of an overview are padded to multiples of it

# Devices that a model can run on; "auto" picks one of them.
DEVICES = ("auto", "cpu", "cuda", "mps", "tensorrt", "coreml", "vulkan")

# Precisions of the weights on PyTorch, see modeling/precision.py.
PRECISIONS = ("auto", "fp32", "bf16", "int8", "nf4")


class ConfigError(MolmoEdgeError):
    """A configuration that cannot be read, or that contradicts itself."""


_MAY_BE_ZERO = (
    "max_crops",
    "overview",
    "n_experts",
    "top_k",
    "additional_vocab_size",
    "head_dim_override",
    "pooling_heads",
)
_TYPES: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "bool": bool, "str": str}


_OMIT_DEFAULT = {"omit_default": True}


def _added(default: Any) -> Any:
    """A field added in a later version: its key is written to JSON only if the value differs from the default."""
    return field(default=default, metadata=_OMIT_DEFAULT)


def _check(config: Any) -> None:
    """Raise ConfigError for a field of the wrong type, and for a size that is not positive.

    Manifests and config.json are untrusted input: an error here names the field; a later division by zero would not.
    """
    for f in dataclasses.fields(config):
        name, value = f"{type(config).__name__}.{f.name}", getattr(config, f.name)
        kind, *more = str(f.type).removeprefix("tuple[").removesuffix("]").split(", ")  # ["int", "int"], ["int", "..."]
        if kind not in _TYPES:
            continue  # a section, which validates itself
        if more:
            fits = isinstance(value, tuple) and (more == ["..."] or len(value) == 1 + len(more))
            fits = fits and all(_has_type(v, kind) for v in value)
        else:
            fits = _has_type(value, kind)
        if not fits:
            raise ConfigError(f"{name} must be {f.type}, it is {value!r}")
        if kind in ("int", "float") and not more and not (value > 0 or (value == 0 and f.name in _MAY_BE_ZERO)):
            allowed = "positive or 0" if f.name in _MAY_BE_ZERO else "positive"
            raise ConfigError(f"{name} must be {allowed}, it is {value}")


def _has_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or not isinstance(value, _TYPES[kind]):
        return kind == "bool" and isinstance(value, bool)
    return not isinstance(value, float) or math.isfinite(value)


def _check_word(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ConfigError(f'{name} "{value}" is not supported (supported: {", ".join(known)})')


@dataclass(frozen=True)
class ImageConfig:
    """Geometry of the overlapping crops (reference: MultiModalPreprocessor, "overlap-and-resize-c2").

    The patches of the crops, without those that a neighbour repeats, form one grid. Its cells of pool x pool patches
    are what the decoder sees. In Molmo v1 each cell lies in one crop; with other sizes a cell may take patches of
    neighbouring crops, and the last row or column may be incomplete (Molmo2: 27 x 27 patches): `pools_across_crops`.
    """

    crop_size: int = 336  # side of a crop and of the global view, pixels
    patch_size: int = 14  # side of a ViT patch, pixels
    pool: int = 2  # patches per pooled cell, along each side
    overlap_margins: tuple[int, int] = (4, 4)  # patches dropped at the left/top and right/bottom inner sides
    max_crops: int = 12  # maximum number of crops besides the global view; 0: the global view only
    # "default": bilinear, aspect kept, padded; "dino": bicubic, "siglip": bilinear without antialiasing, both stretched
    resize: str = "default"
    overview: int = 0  # longest side, pixels, of the whole image as a convolutional tower sees it; 0: no such tower
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    layout: str = _added("molmo")  # of the tokens of an image; or "molmo2", "molmo_point", see frontend/crops.py

    def __post_init__(self) -> None:
        _check(self)
        left, right = self.overlap_margins
        if self.crop_size % self.patch_size:
            raise ConfigError(f"crop_size {self.crop_size} is not a multiple of patch_size {self.patch_size}")
        if min(left, right) < 0:
            raise ConfigError(f"overlap_margins {self.overlap_margins} must not be negative")
        if self.pool > self.patches:
            raise ConfigError(f"pool {self.pool} is larger than a crop of {self.patches} x {self.patches} patches")
        if left + right >= self.patches:
            raise ConfigError(
                f"overlap_margins {self.overlap_margins} must sum to less than the {self.patches} patches of a crop"
            )
        if self.overview % OVERVIEW_UNIT:
            raise ConfigError(
                f"overview {self.overview} is not a multiple of {OVERVIEW_UNIT}, the tower's largest stride"
            )
        if not min(self.std) > 0:
            raise ConfigError(f"std must be positive, it is {self.std}")
        _check_word("resize", self.resize, ("default", "dino", "siglip"))
        _check_word("layout", self.layout, ("molmo", "molmo2", "molmo_point"))

    @property
    def patches(self) -> int:
        """Patches along a side of a crop (24)."""
        return self.crop_size // self.patch_size

    @property
    def cells(self) -> int:
        """Pooled cells along a side of the global view (12)."""
        return -(-self.patches // self.pool)

    @property
    def window(self) -> int:
        """Patches along a side of a crop that no neighbour repeats (16): the stride of the tiling."""
        return self.patches - sum(self.overlap_margins)

    @property
    def pools_across_crops(self) -> bool:
        """Whether cells are gathered from the stitched grid by index, rather than pooled within each crop."""
        return any(side % self.pool for side in (self.patches, *self.overlap_margins))

    def grids(self, tiling: tuple[int, int]) -> list[tuple[int, int]]:
        """Rows and columns of patches of the global view and, where there are crops, of the stitched grid."""
        rows, cols = (n * self.window + sum(self.overlap_margins) for n in tiling)
        return [(self.patches, self.patches), *([(rows, cols)] if tiling[0] else [])]

    def cell_grids(self, tiling: tuple[int, int]) -> list[tuple[int, int]]:
        """As `grids`, in pooled cells."""
        return [(-(-rows // self.pool), -(-cols // self.pool)) for rows, cols in self.grids(tiling)]


class _VitParts(NamedTuple):
    """What the pretrained ViTs have besides the blocks that all of them share."""

    class_token: bool  # it occupies position 0 and is dropped from the features
    pre_ln: bool  # a LayerNorm before the first block
    patch_bias: bool  # of the patch embedding
    layer_scale: bool  # each branch of a block is multiplied by a vector


_VITS = {
    "openai": _VitParts(class_token=True, pre_ln=True, patch_bias=False, layer_scale=False),  # CLIP
    "dino": _VitParts(class_token=True, pre_ln=False, patch_bias=True, layer_scale=True),  # DINOv2
    "siglip": _VitParts(class_token=False, pre_ln=False, patch_bias=True, layer_scale=False),  # SigLIP, SigLIP2
}


@dataclass(frozen=True)
class VisionConfig:
    """A ViT over one crop. `image_model_type`, the reference's name of a pretrained ViT, selects its parts."""

    image_model_type: str = "openai"
    d_model: int = 1024
    n_layers: int = 23  # CLIP's last layer was dropped when Molmo was trained
    n_heads: int = 16
    mlp_dim: int = 4096
    n_pos: int = 577  # class token, where there is one, and patches
    patch_size: int = 14  # pixels
    norm_eps: float = 1e-5
    activation: str = "quick_gelu"  # or "gelu", "gelu_pytorch_tanh"
    layers: tuple[int, ...] = (-2, -9)  # block outputs that are concatenated, in this order

    def __post_init__(self) -> None:
        _check(self)
        if not self.layers or not all(-self.n_layers <= layer < self.n_layers for layer in self.layers):
            raise ConfigError(f"vision layers {self.layers} must be indices of the ViT's {self.n_layers} layers")
        if self.d_model % self.n_heads:
            raise ConfigError(f"vision d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        _check_word("vision type", self.image_model_type, _VITS)
        _check_word("vision activation", self.activation, ("quick_gelu", "gelu", "gelu_pytorch_tanh"))

    @property
    def parts(self) -> _VitParts:
        """Which optional parts this kind of ViT has."""
        return _VITS[self.image_model_type]

    @property
    def n_patches(self) -> int:
        """Patches of a crop: the positions without the class token."""
        return self.n_pos - self.parts.class_token

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.d_model // self.n_heads

    @property
    def feature_dim(self) -> int:
        """Width of a patch feature as the connector sees it (2048)."""
        return self.d_model * len(self.layers)

    @property
    def last_layer(self) -> int:
        """Index of the last block whose output is used; later blocks are not run."""
        return max(layer % self.n_layers for layer in self.layers)


@dataclass(frozen=True)
class ConvTowerConfig:
    """A convolutional tower over the whole image: a CSP backbone and a feature pyramid at strides 8, 16 and 32.

    The shape is that of NanoDet-g (github.com/RangiLyu/nanodet, CustomCspNet and PAN).
    """

    stem_dim: int = 32  # channels after the first convolution
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
class YarnConfig:
    """Rotary embeddings stretched for a longer context in some layers (YaRN, arXiv 2309.00071)."""

    factor: float = 8.0  # ratio of the extended context to the original one
    original_positions: int = 8192  # the context of pre-training
    attention_factor: float = 1.0  # multiplies cos and sin
    beta_fast: float = 32.0  # dimensions with at least this many turns in the original context are unchanged
    beta_slow: float = 1.0  # dimensions with fewer turns are stretched by the full factor
    layers: tuple[int, ...] = ()  # the layers that are stretched

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder: dense (Qwen2, Qwen3, OLMo2) or with sparse experts (OLMoE)."""

    d_model: int = 2048
    n_layers: int = 16
    n_heads: int = 16
    n_kv_heads: int = 16
    ffn_dim: int = 1024  # inner width of the SwiGLU (of one expert)
    n_experts: int = 0  # 0: dense
    top_k: int = 0  # experts per token
    vocab_size: int = 50280  # ids that the tokenizer can produce; Molmo's special ids start here
    embedding_size: int = 50304  # rows of the embedding and of the head
    additional_vocab_size: int = 128  # rows of new_embedding; their ids follow those of the embedding
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of q and of k
    norm_after: bool = False  # True: x + norm(f(x)), False: x + f(norm(x))
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    weight_tying: bool = False
    max_position_embeddings: int = 4096
    head_dim_override: int = _added(0)  # 0: a head is d_model / n_heads wide; read `head_dim`
    qk_norm_per_head: bool = _added(False)  # False: over all heads together (OLMo), True: over each head (Qwen3)
    additional_head: bool = _added(False)  # whether the head has rows for the ids of new_embedding, too (MolmoPoint)
    yarn: YarnConfig | None = field(default=None, metadata=_OMIT_DEFAULT)
    image_attention: str = _added("causal")  # or "bidirectional": in prefill, image tokens attend to each other

    def __post_init__(self) -> None:
        _check(self)
        if not self.head_dim_override and self.d_model % self.n_heads:
            raise ConfigError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        if self.head_dim_override * self.n_heads == self.d_model:
            object.__setattr__(self, "head_dim_override", 0)
        if self.head_dim_override % 2:
            raise ConfigError(f"head_dim {self.head_dim_override} must be even")
        if self.qk_norm_per_head and not self.qk_norm:
            raise ConfigError("qk_norm_per_head needs qk_norm")
        _check_word("image_attention", self.image_attention, ("causal", "bidirectional"))
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if bool(self.n_experts) != bool(self.top_k) or self.top_k > self.n_experts:
            raise ConfigError(f"top_k {self.top_k} must be 1 to n_experts {self.n_experts}, or both 0")

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.head_dim_override or self.d_model // self.n_heads

    @property
    def q_dim(self) -> int:
        """Width of all query heads together; d_model unless `head_dim_override` says otherwise."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.n_kv_heads * self.head_dim

    @property
    def n_logits(self) -> int:
        """Number of ids for which the head returns a logit."""
        return self.embedding_size + (self.additional_vocab_size if self.additional_head else 0)

    @property
    def bidirectional_images(self) -> bool:
        """Whether image tokens attend to each other in both directions in prefill."""
        return self.image_attention == "bidirectional"


@dataclass(frozen=True)
class PointHeadConfig:
    """MolmoPoint's grounding head, and the tokens whose embeddings its grounding tokens use."""

    patch_token: int
    subpatch_token: int
    location_token: int
    dim: int = 512  # of queries and keys
    rope_theta: float = 50000.0
    n_locations: int = 9  # in a subpatch
    no_more_class: bool = True  # whether "no more points" can be chosen instead of a patch

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class MolmoConfig:
    """A whole model.

    The features of a patch are those of `vision`, of each ViT of `extra_vision` and of `conv_tower`, concatenated in
    this order. The ViTs see the same crops; the connector's pooling has the width and the heads of `vision`.
    """

    image: ImageConfig = field(default_factory=ImageConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    projector_dim: int = 1024  # inner width of the connector's SwiGLU
    conv_tower: ConvTowerConfig | None = None
    pooling_heads: int = _added(0)  # of the connector's attention; 0: as many as `vision` has
    pooling_output: bool = _added(True)  # whether that attention has an output projection (not in MolmoPoint)
    pad_embed: bool = _added(True)  # learned vectors are added to patches that are padding (Molmo v1)
    extra_vision: tuple[VisionConfig, ...] = _added(())
    point_head: PointHeadConfig | None = field(default=None, metadata=_OMIT_DEFAULT)

    def __post_init__(self) -> None:
        _check(self)
        if bool(self.conv_tower) != bool(self.image.overview):
            raise ConfigError("conv_tower and image.overview must be set together: the tower takes the overview")
        for vit in self.vits:
            patches, class_token = self.image.patches**2, " and a class token" if vit.parts.class_token else ""
            if vit.n_patches != patches:
                raise ConfigError(f"the ViT has {vit.n_pos} positions, but a crop has {patches} patches{class_token}")
            if vit.patch_size != self.image.patch_size:
                raise ConfigError(
                    f"the ViT's patches are {vit.patch_size} px wide, those of the crops {self.image.patch_size} px"
                )

    @property
    def vits(self) -> tuple[VisionConfig, ...]:
        """All ViTs, in the order in which their features are concatenated."""
        return (self.vision, *self.extra_vision)

    @property
    def feature_dim(self) -> int:
        """Width of a patch feature as the connector sees it: of all towers together."""
        vits = sum(vit.feature_dim for vit in self.vits)
        return vits + (self.conv_tower.feature_dim if self.conv_tower else 0)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a bundle's manifest stores it; `from_dict` reads it back."""
        return cast("dict[str, Any]", to_json(self))

    @classmethod
    def from_dict(cls, data: Any) -> MolmoConfig:
        """The inverse of `to_dict`. Raises ConfigError for invalid data."""
        if not isinstance(data, dict):
            raise ConfigError(f"the configuration is {type(data).__name__}, not an object with sections")
        extra = data.get("extra_vision", ())
        if not isinstance(extra, list | tuple):
            raise ConfigError(f"extra_vision must be a list of sections, it is {extra!r}")
        return cls(
            image=from_json(ImageConfig, data.get("image")),
            vision=from_json(VisionConfig, data.get("vision")),
            decoder=from_json(DecoderConfig, data.get("decoder")),
            projector_dim=data.get("projector_dim", 1024),
            conv_tower=from_json(ConvTowerConfig, data["conv_tower"]) if data.get("conv_tower") else None,
            pooling_heads=data.get("pooling_heads", 0),
            pooling_output=data.get("pooling_output", True),
            pad_embed=data.get("pad_embed", True),
            extra_vision=tuple(from_json(VisionConfig, vit) for vit in extra),
            point_head=from_json(PointHeadConfig, data["point_head"]) if data.get("point_head") else None,
        )


def to_json(config: Any) -> Any:
    """A section, with its sections, as a dict; fields of `_added` with their default are left out."""
    if isinstance(config, tuple):
        return tuple(to_json(item) for item in config)
    if not dataclasses.is_dataclass(config):
        return config
    values = ((f, getattr(config, f.name)) for f in dataclasses.fields(config))
    return {f.name: to_json(v) for f, v in values if not (f.metadata.get("omit_default") and v == f.default)}


def from_json(kind: type, data: Any) -> Any:
    """The inverse of `to_json` for a section without sections. Raises ConfigError."""
    if not isinstance(data, dict):
        raise ConfigError(f"the configuration has no section for {kind.__name__}")
    unknown = sorted(set(data) - {f.name for f in dataclasses.fields(kind)})
    if unknown:
        raise ConfigError(f"{kind.__name__} has no field {', '.join(unknown)}: was this made by a newer molmo-edge?")
    sections = {"yarn": YarnConfig}
    return kind(
        **{k: from_json(sections[k], v) if k in sections and v is not None else as_tuple(v) for k, v in data.items()}
    )


def as_tuple(value: Any) -> Any:
    """Convert a list of parsed JSON to a tuple; other values are returned unchanged and checked by the section."""
    return tuple(value) if isinstance(value, list) else value


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
