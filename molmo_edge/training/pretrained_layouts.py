"""Pretrained decoders and towers in transformers' layouts: configuration, and the place of each tensor in a Molmo.

Decoders: OLMoE, Qwen2 and OLMo-1024 (a preview of OLMo 2 with its tensor names). Towers: CLIP and DINOv2. The mapping
of tensors is that of Ai2's scripts/convert_hf_to_molmo.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from molmo_edge.checkpoints.hub_config import CONFIG
from molmo_edge.checkpoints.pickles import read_pickle
from molmo_edge.checkpoints.safetensors_files import SAFETENSORS, read_header, shards_of
from molmo_edge.checkpoints.tensor_names import Shape, head_name
from molmo_edge.checkpoints.tensor_sources import CheckpointError, FileSource, TensorSource
from molmo_edge.checkpoints.weight_files import PICKLE
from molmo_edge.config import DecoderConfig, MolmoConfig, VisionConfig
from molmo_edge.errors import MolmoEdgeError

# The layers whose features Molmo uses (launch_scripts/train_captioner.py).
CLIP_LAYERS, DINO_LAYERS = (-2, -9), (-3, -9)


class BaseError(MolmoEdgeError):
    """Pretrained weights that do not fit the requested Molmo."""


@dataclass(frozen=True)
class Recipe:
    """How one tensor of a Molmo is made: `parts` of a base, concatenated along the rows, and then random rows."""

    base: TensorSource | None = None  # None: no parts
    parts: tuple[tuple[str, Shape], ...] = ()  # name and shape of each
    change: Callable[[np.ndarray], np.ndarray] | None = None  # applied to each part
    std: float | None = None  # Normal(0, std) for the remaining rows; None: no rows may remain


def open_base(directory: Path) -> TensorSource:
    """The float tensors in a directory of safetensors or pickle files, sharded or not. Raises CheckpointError.

    Integer tensors are skipped: CLIP's files contain `position_ids`, 0, 1, 2, ...
    """
    for single, read in ((SAFETENSORS, read_header), (PICKLE, read_pickle)):
        if (directory / single).is_file():
            return FileSource(read(directory / single, floats_only=True))
        index = directory / f"{single}.index.json"
        if index.is_file():
            shards = sorted(set(shards_of(index).values()))
            return FileSource({n: e for shard in shards for n, e in read(directory / shard, floats_only=True).items()})
    raise CheckpointError(f"{directory} contains no weights: expected {SAFETENSORS}, {PICKLE} or the index of either")


@dataclass(frozen=True)
class _Family:
    """A family of decoders: its fixed settings, and the default of its config.json."""

    always: dict[str, Any]
    norm_eps: float


_FAMILIES = {
    "olmoe": _Family({"qk_norm": True}, 1e-5),
    "qwen2": _Family({"qkv_bias": True}, 1e-6),
    "olmo2": _Family({"qk_norm": True, "norm_after": True}, 1e-5),
}
_FAMILIES["olmo_1124"] = _FAMILIES["olmo2"]  # the older name, as in OLMo-7B-1024-preview's config.json

# A base with other values would be converted, but would give different results.
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "clip_qkv": None,
    "norm_topk_prob": False,
    "rope_scaling": None,
    "use_sliding_window": False,
}


def read_decoder(directory: Path) -> DecoderConfig:
    """The decoder that a base's config.json describes. Raises BaseError and ConfigError.

    As with Qwen2 in the reference, `vocab_size` is the number of rows of its embedding, so that new ids follow them.
    """
    path, raw = _config(directory)
    kind = raw.get("model_type")
    if kind not in _FAMILIES:
        raise BaseError(f'{path}: "{kind}" is not a supported decoder (supported: {", ".join(_FAMILIES)})')
    for key, value in _ONLY.items():
        if raw.get(key, value) != value:
            raise BaseError(f"{path}: {key} is {raw[key]!r}, but a Molmo's decoder supports {value!r} only")
    rope = raw.get("rope_parameters") or {}  # since transformers 5
    if rope.get("rope_type", "default") != "default":
        raise BaseError(f"{path} has rope_type {rope['rope_type']!r}; a Molmo's decoder computes with 'default' only")
    try:
        decoder = DecoderConfig(
            d_model=raw["hidden_size"],
            n_layers=raw["num_hidden_layers"],
            n_heads=raw["num_attention_heads"],
            n_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            ffn_dim=raw["intermediate_size"],
            n_experts=raw["num_experts"] if kind == "olmoe" else 0,
            top_k=raw["num_experts_per_tok"] if kind == "olmoe" else 0,
            vocab_size=raw["vocab_size"],
            embedding_size=raw["vocab_size"],
            norm_eps=raw.get("rms_norm_eps", _FAMILIES[kind].norm_eps),
            rope_theta=raw.get("rope_theta") or rope.get("rope_theta") or 10000.0,
            weight_tying=raw.get("tie_word_embeddings", False),
            max_position_embeddings=raw["max_position_embeddings"],
            **_FAMILIES[kind].always,
        )
    except KeyError as error:
        raise BaseError(f"{path} has no {error.args[0]!r}") from None
    if raw.get("head_dim", decoder.head_dim) != decoder.head_dim:
        raise BaseError(f"{path} has head_dim {raw['head_dim']}; a Molmo's is d_model / n_heads, {decoder.head_dim}")
    return decoder


def read_tower(directory: Path) -> VisionConfig:
    """The ViT that a base's config.json describes, whole, on its own grid. Raises BaseError, ConfigError."""
    path, raw = _config(directory)
    if raw.get("model_type") == "clip":
        raw = raw.get("vision_config") or {}
        kind = "clip_vision_model"
    else:
        kind = str(raw.get("model_type"))
    if kind not in ("clip_vision_model", "dinov2") or raw.get("use_swiglu_ffn"):
        raise BaseError(f'{path}: "{kind}" is not a supported tower (supported: CLIP, and DINOv2 without SwiGLU)')
    clip = kind == "clip_vision_model"
    width, size = raw.get("hidden_size", 768), raw.get("image_size", 224)  # missing keys have transformers' defaults
    patch = raw.get("patch_size", 32 if clip else 14)
    return VisionConfig(
        image_model_type="openai" if clip else "dino",
        d_model=width,
        n_layers=raw.get("num_hidden_layers", 12),
        n_heads=raw.get("num_attention_heads", 12),
        mlp_dim=raw.get("intermediate_size", 3072) if clip else int(raw.get("mlp_ratio", 4) * width),
        n_pos=(size // patch) ** 2 + 1,
        patch_size=patch,
        norm_eps=raw.get("layer_norm_eps", 1e-5 if clip else 1e-6),
        activation=raw.get("hidden_act", "quick_gelu" if clip else "gelu"),
        layers=(-1,),
    )


def _config(directory: Path) -> tuple[Path, dict[str, Any]]:
    path = directory / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BaseError(
            f"{path} cannot be read: {error.strerror}. Is {directory} a directory of base weights?"
        ) from None
    except ValueError as error:
        raise BaseError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise BaseError(f"{path} does not hold a JSON object")
    return path, raw


def base_recipes(config: MolmoConfig, decoder: TensorSource, tower: TensorSource, *, tied: bool) -> dict[str, Recipe]:
    """Hub name -> recipe, for every tensor that comes from a base. `tied`: the decoder's head is its embedding.

    Raises CheckpointError if a base lacks the tensor that identifies its naming scheme.
    """
    vision = _clip(config.vision, tower) if config.vision.image_model_type == "openai" else _dino(config.vision, tower)
    hub = "model.vision_backbone.image_vit"
    return {f"{hub}.{name}": recipe for name, recipe in vision} | dict(_decoder(config, decoder, tied))


_LEFT_OUT = re.compile(
    r".*\.rotary_emb\.inv_freq"  # old files have it, though it is computed
    r"|(text_model|text_projection|visual_projection)\..*|logit_scale|(vision_model\.)?post_layernorm\..*"
    r"|(dinov2\.)?(layernorm\..*|embeddings\.mask_token)|classifier\..*"
)
_TOWER_LAYER = re.compile(r"(?:vision_model\.|dinov2\.)?encoder\.layers?\.(\d+)\..*")


def is_left_out(name: str, vision: VisionConfig, *, tied: bool) -> bool:
    """Whether a tensor of a base is not used in a Molmo: the text half of CLIP, its last layer, its last norm, ..."""
    layer = _TOWER_LAYER.fullmatch(name)
    beyond = layer is not None and int(layer[1]) >= vision.n_layers
    return beyond or bool(_LEFT_OUT.fullmatch(name)) or (tied and name == "lm_head.weight")


_Named = Iterator[tuple[str, Recipe]]


def _root(base: TensorSource, anchor: str) -> str:
    """The common prefix of a base's tensor names: "model.", "vision_model.", or ""."""
    roots = [name.removesuffix(anchor) for name in base.names() if name == anchor or name.endswith(f".{anchor}")]
    if len(roots) != 1:
        where = base.file(base.names()[0]).parent if base.names() else "the base"
        raise CheckpointError(f"{where} has {len(roots)} tensors called {anchor}, expected 1, whose prefix all share")
    return roots[0]


def _decoder(config: MolmoConfig, base: TensorSource, tied: bool) -> _Named:
    d = config.decoder
    root, hub, width = _root(base, "embed_tokens.weight"), "model.transformer", d.d_model

    def table(name: str) -> Recipe:
        rows = base.shape(name)[0] if name in base.names() else d.embedding_size
        if rows > d.embedding_size:
            raise CheckpointError(
                f"{base.file(name)}: {name} has {rows} rows, more than the {d.embedding_size} of the Molmo's embedding"
            )
        return Recipe(base, ((name, (rows, width)),), std=0.02)

    yield f"{hub}.wte.embedding", table(f"{root}embed_tokens.weight")
    if not d.weight_tying:  # a copy where the base ties them: the reference trains the head, not the embedding
        yield head_name(config), table(f"{root}embed_tokens.weight" if tied else "lm_head.weight")
    yield f"{hub}.ln_f.weight", Recipe(base, ((f"{root}norm.weight", (width,)),))
    for n in range(d.n_layers):
        yield from _attention(d, base, f"{root}layers.{n}", f"{hub}.blocks.{n}")
        yield from _ffn(d, base, f"{root}layers.{n}", f"{hub}.blocks.{n}")


def _attention(d: DecoderConfig, base: TensorSource, theirs: str, block: str) -> _Named:
    ours, own = f"{block}.attn" if d.n_experts else block, f"{theirs}.self_attn"
    width, kv = d.d_model, d.n_kv_heads * d.head_dim
    rows = {"q": width, "k": kv, "v": kv}
    tails: dict[str, Shape] = {"weight": (width,), "bias": ()} if d.qkv_bias else {"weight": (width,)}
    for leaf, tail in tails.items():
        parts = tuple((f"{own}.{p}_proj.{leaf}", (n, *tail)) for p, n in rows.items())
        yield f"{ours}.att_proj.{leaf}", Recipe(base, parts)
    yield f"{ours}.attn_out.weight", Recipe(base, ((f"{own}.o_proj.weight", (width, width)),))
    norm = "post_attention_layernorm" if d.norm_after else "input_layernorm"
    yield f"{ours}.attn_norm.weight", Recipe(base, ((f"{theirs}.{norm}.weight", (width,)),))
    for p in ("q", "k") if d.qk_norm else ():
        yield f"{ours}.{p}_norm.weight", Recipe(base, ((f"{own}.{p}_norm.weight", (rows[p],)),))


def _ffn(d: DecoderConfig, base: TensorSource, theirs: str, block: str) -> _Named:
    ours = f"{block}.mlp" if d.n_experts else block
    shapes = {"gate": (d.ffn_dim, d.d_model), "up": (d.ffn_dim, d.d_model), "down": (d.d_model, d.ffn_dim)}

    def of(home: str, *parts: str) -> Recipe:
        return Recipe(base, tuple((f"{home}.{p}_proj.weight", shapes[p]) for p in parts))

    # "Post attention" is the norm after the attention in OLMo 2, and the norm before the FFN in the others.
    norm = "post_feedforward_layernorm" if d.norm_after else "post_attention_layernorm"
    yield f"{ours}.ff_norm.weight", Recipe(base, ((f"{theirs}.{norm}.weight", (d.d_model,)),))
    if not d.n_experts:
        yield f"{ours}.ff_proj.weight", of(f"{theirs}.mlp", "up", "gate")
        yield f"{ours}.ff_out.weight", of(f"{theirs}.mlp", "down")
        return
    yield f"{ours}.gate.weight", Recipe(base, ((f"{theirs}.mlp.gate.weight", (d.n_experts, d.d_model)),))
    for e in range(d.n_experts):
        for part in shapes:
            yield f"{ours}.experts.{e}.{part}_proj.weight", of(f"{theirs}.mlp.experts.{e}", part)


def _flat_kernel(kernel: np.ndarray) -> np.ndarray:
    """[d, channel, row, column] -> [d, row * column * channel], as Molmo's patches are flattened."""
    return kernel.transpose(0, 2, 3, 1).reshape(len(kernel), -1)


def _on_grid(positions: np.ndarray, n_pos: int) -> np.ndarray:
    """[1 + side^2, d] -> [n_pos, d]: the class token's position is kept, and a grid of another size is resampled.

    As transformers does today; Ai2's script adds 0.1 to the new side, which shifts the grid by a fraction of a patch.
    """
    if len(positions) == n_pos:
        return positions
    return np.concatenate([positions[:1], resample_grid(positions[1:], n_pos - 1)])


def _positions(v: VisionConfig, base: TensorSource, name: str, before: Shape) -> Recipe:
    """`before`: the leading dimensions, before the number of positions."""
    count = base.shape(name)[-2] if name in base.names() and len(base.shape(name)) > 1 else v.n_pos
    if round((count - 1) ** 0.5) ** 2 != count - 1:
        raise CheckpointError(
            f"{base.file(name)}: {name} has {count} positions, expected a square number plus a class token"
        )
    shape = (*before, count, v.d_model)
    return Recipe(base, ((name, shape),), lambda values: _on_grid(values.reshape(count, v.d_model), v.n_pos))


def _kernel(v: VisionConfig, base: TensorSource, name: str) -> Recipe:
    return Recipe(base, ((name, (v.d_model, 3, v.patch_size, v.patch_size)),), _flat_kernel)


def _leaves(base: TensorSource, ours: str, theirs: str, rows: int, columns: int | None = None) -> _Named:
    """Weight and bias of a linear layer, or, without columns, of a norm."""
    for leaf, shape in (("weight", (rows,) if columns is None else (rows, columns)), ("bias", (rows,))):
        yield f"{ours}.{leaf}", Recipe(base, ((f"{theirs}.{leaf}", shape),))


def _blocks(v: VisionConfig, base: TensorSource, theirs: str, names: dict[str, str]) -> _Named:
    """names: of the parts of a block in the base, whose layer `n` is `theirs`.n."""
    d = v.d_model
    for n in range(v.n_layers):
        for ours, name in names.items():
            rows, columns = {"w1": (v.mlp_dim, d), "w2": (d, v.mlp_dim)}.get(ours.split(".")[-1], (d, d))
            shape = (rows, None if ours.endswith("norm") else columns)
            yield from _leaves(base, f"transformer.resblocks.{n}.{ours}", f"{theirs}.{n}.{name}", *shape)


def _clip(v: VisionConfig, base: TensorSource) -> _Named:
    root = _root(base, "embeddings.class_embedding")
    yield "class_embedding", Recipe(base, ((f"{root}embeddings.class_embedding", (v.d_model,)),))
    yield "positional_embedding", _positions(v, base, f"{root}embeddings.position_embedding.weight", ())
    yield "patch_embedding.weight", _kernel(v, base, f"{root}embeddings.patch_embedding.weight")
    yield from _leaves(base, "pre_ln", f"{root}pre_layrnorm", v.d_model)  # their spelling
    names = {f"attention.w{p[0]}": f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")}
    names |= {"feed_forward.w1": "mlp.fc1", "feed_forward.w2": "mlp.fc2"}
    names |= {"attention_norm": "layer_norm1", "ffn_norm": "layer_norm2"}
    yield from _blocks(v, base, f"{root}encoder.layers", names)


def _dino(v: VisionConfig, base: TensorSource) -> _Named:
    root = _root(base, "embeddings.cls_token")
    embeddings, layers = f"{root}embeddings", f"{root}encoder.layer"
    yield "class_embedding", Recipe(base, ((f"{embeddings}.cls_token", (1, 1, v.d_model)),), np.ravel)
    yield "positional_embedding", _positions(v, base, f"{embeddings}.position_embeddings", (1,))
    yield "patch_embedding.weight", _kernel(v, base, f"{embeddings}.patch_embeddings.projection.weight")
    bias = f"{embeddings}.patch_embeddings.projection.bias"
    yield "patch_embedding.bias", Recipe(base, ((bias, (v.d_model,)),))
    names = {f"attention.w{p[0]}": f"attention.attention.{p}" for p in ("query", "key", "value")}
    names |= {"attention.wo": "attention.output.dense", "feed_forward.w1": "mlp.fc1", "feed_forward.w2": "mlp.fc2"}
    names |= {"attention_norm": "norm1", "ffn_norm": "norm2"}
    yield from _blocks(v, base, layers, names)
    for n in range(v.n_layers):
        for k in (1, 2):
            scale = (f"{layers}.{n}.layer_scale{k}.lambda1", (v.d_model,))
            yield f"transformer.resblocks.{n}.lambda{k}", Recipe(base, (scale,))


def resample_grid(grid: np.ndarray, positions: int) -> np.ndarray:
    """[side^2, d] -> [positions, d], bicubic without antialiasing."""
    import torch
    import torch.nn.functional as F

    old, new = round(len(grid) ** 0.5), round(positions**0.5)
    square = torch.from_numpy(np.array(grid)).view(1, old, old, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=(new, new), mode="bicubic", align_corners=False)
    return square.permute(0, 2, 3, 1).reshape(positions, -1).numpy()
