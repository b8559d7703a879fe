"""The configuration of a Molmo: image geometry, vision towers, connector and decoder.

The sections are frozen dataclasses that validate themselves. A model family is a preset (presets.py), a reader of its
config.json (checkpoints/hub_config.py) and its tensor names (checkpoints/tensor_names.py). The differences between
families are fields of these sections.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from molmo_edge.system.config_fields import ConfigError as ConfigError
from molmo_edge.system.config_fields import added, check_fields, check_word, from_json, to_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

OVERVIEW_UNIT = 32  # pixels; the sides of an overview are padded to multiples of it

# Devices that a model can run on; "auto" picks one of them.
DEVICES = ("auto", "cpu", "cuda", "mps", "tensorrt", "coreml", "vulkan")

# What becomes of the transparency of images, see frontend/image_files.py.
ALPHA = ("drop", "white")

# How frames of a video are selected, see frontend/video.py.
SAMPLINGS = ("reference", "transformers")

# Precisions of the weights on PyTorch, see modeling/precision.py.
PRECISIONS = ("auto", "fp32", "bf16", "int8", "nf4")


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
    layout: str = added("molmo")  # of the tokens of an image; or "molmo2", "molmo_point", see frontend/crops.py

    def __post_init__(self) -> None:
        check_fields(self)
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
        check_word("resize", self.resize, ("default", "dino", "siglip"))
        check_word("layout", self.layout, ("molmo", "molmo2", "molmo_point"))

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


@dataclass(frozen=True)
class VideoConfig:
    """How many frames of a video the model takes (Molmo2). Each is one crop, see frontend/video.py."""

    max_frames: int = 384
    max_fps: float = 2.0  # frames per second

    def __post_init__(self) -> None:
        check_fields(self)


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
        check_fields(self)
        if not self.layers or not all(-self.n_layers <= layer < self.n_layers for layer in self.layers):
            raise ConfigError(f"vision layers {self.layers} must be indices of the ViT's {self.n_layers} layers")
        if self.d_model % self.n_heads:
            raise ConfigError(f"vision d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        check_word("vision type", self.image_model_type, _VITS)
        check_word("vision activation", self.activation, ("quick_gelu", "gelu", "gelu_pytorch_tanh"))

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
        check_fields(self)
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
        check_fields(self)


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
    head_dim_override: int = added(0)  # 0: a head is d_model / n_heads wide; read `head_dim`
    qk_norm_per_head: bool = added(False)  # False: over all heads together (OLMo), True: over each head (Qwen3)
    additional_head: bool = added(False)  # whether the head has rows for the ids of new_embedding, too (MolmoPoint)
    yarn: YarnConfig | None = added(None, YarnConfig)  # noqa: RUF009 (a dataclass field)
    image_attention: str = added("causal")  # or "bidirectional": in prefill, image tokens attend to each other

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.head_dim_override and self.d_model % self.n_heads:
            raise ConfigError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        if self.head_dim_override * self.n_heads == self.d_model:
            object.__setattr__(self, "head_dim_override", 0)
        if self.head_dim_override % 2:
            raise ConfigError(f"head_dim {self.head_dim_override} must be even")
        if self.qk_norm_per_head and not self.qk_norm:
            raise ConfigError("qk_norm_per_head needs qk_norm")
        check_word("image_attention", self.image_attention, ("causal", "bidirectional"))
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
    """A grounding head, and the tokens whose embeddings its grounding tokens use.

    MolmoPoint has one; so may a model with the images and prompts of Molmo v1 (layout "molmo").
    """

    patch_token: int
    subpatch_token: int
    location_token: int
    dim: int = 512  # of queries and keys
    rope_theta: float = 50000.0
    n_locations: int = 9  # in a subpatch
    no_more_class: bool = True  # whether "no more points" can be chosen instead of a patch
    numbered: bool = added(True)  # whether the number of its object follows each point: 4 tokens a point instead of 3
    # Above 0, all points of a list are chosen at once (`runtimes.peaks`). A subpatch has so many votes, dot products of
    # the decoder's state and the subpatch's features, and the score of its patch.
    votes: int = added(0)
    vote_dim: int = added(96)
    peak_distance: float = added(2.0)  # between two points of a list along either axis, in patches of the vision tower
    peak_drop: float = added(0.0)  # how far below that of the best point the score of another one may be; 0: any

    def __post_init__(self) -> None:
        check_fields(self)
        if self.votes and not self.no_more_class:
            raise ConfigError("votes need no_more_class: its score is the threshold of a patch's own score")


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
    pooling_heads: int = added(0)  # of the connector's attention; 0: as many as `vision` has
    pooling_output: bool = added(True)  # whether that attention has an output projection (not in MolmoPoint)
    pad_embed: bool = added(True)  # learned vectors are added to patches that are padding (Molmo v1)
    extra_vision: tuple[VisionConfig, ...] = added(())
    point_head: PointHeadConfig | None = added(None, PointHeadConfig)  # noqa: RUF009 (a dataclass field)
    video: VideoConfig = added(VideoConfig(), VideoConfig)  # noqa: RUF009 (frozen); of models that take videos

    def __post_init__(self) -> None:
        check_fields(self)
        if bool(self.conv_tower) != bool(self.image.overview):
            raise ConfigError("conv_tower and image.overview must be set together: the tower takes the overview")
        if self.point_head is not None:
            head = self.point_head
            for token in (head.patch_token, head.subpatch_token, head.location_token):
                if token >= self.decoder.n_logits:
                    raise ConfigError(f"grounding token {token} has no logit: there are {self.decoder.n_logits}")
        for vit in self.vits:
            patches, class_token = self.image.patches**2, " and a class token" if vit.parts.class_token else ""
            if vit.n_patches != patches:
                raise ConfigError(f"the ViT has {vit.n_pos} positions, but a crop has {patches} patches{class_token}")
            if vit.patch_size != self.image.patch_size:
                raise ConfigError(
                    f"the ViT's patches are {vit.patch_size} px wide, those of the crops {self.image.patch_size} px"
                )

    @property
    def several_images(self) -> bool:
        """Whether a prompt may have several images, or a video (Molmo2 and MolmoPoint)."""
        return self.image.layout != "molmo"

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
            video=from_json(VideoConfig, data.get("video", {})),
        )
