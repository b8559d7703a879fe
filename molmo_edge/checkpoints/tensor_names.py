"""The tensor names and shapes of the public checkpoints, and the parameters of `modeling.Molmo` that they fill.

MolmoE's remote code names the blocks differently and stores each expert separately; a parameter of `modeling.Molmo`
stacks the experts along a new first dimension. The names of a second ViT and of a
convolutional tower, which no public checkpoint has, are defined here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from molmo_edge.config import ConvTowerConfig, MolmoConfig, VisionConfig

TRANSFORMER, BACKBONE = "model.transformer", "model.vision_backbone"

Slot = tuple[str, ...]  # the hub tensor of a parameter, or the several that it stacks along a new first dimension
Shape = tuple[int, ...]
_Line = tuple[str, Slot, Shape]  # parameter, hub names, shape of each


def hub_layout(config: MolmoConfig) -> dict[str, Slot]:
    """Parameter name of `modeling.Molmo` -> its hub tensor names: one, or one per expert."""
    return {name: slot for name, slot, _ in _lines(config)}


def hub_shapes(config: MolmoConfig) -> dict[str, Shape]:
    """Hub tensor name -> shape, for every tensor of a checkpoint."""
    return {hub: shape for _, slot, shape in _lines(config) for hub in slot}


def vit_names(config: MolmoConfig) -> list[tuple[VisionConfig, str, str]]:
    """For each ViT its configuration, its module in `modeling.Molmo` and the prefix of its hub tensors."""
    first = "model.vit" if config.image.layout == "molmo_point" else f"{BACKBONE}.image_vit"
    extra = [(vit, f"extra_vision.{n}", f"{BACKBONE}.image_vit.extra.{n}") for n, vit in enumerate(config.extra_vision)]
    return [(config.vision, "vision", first), *extra]


def connector_name(config: MolmoConfig) -> str:
    """The prefix of the connector's hub tensors."""
    return "model.connector" if config.image.layout == "molmo_point" else BACKBONE


class BlockNames(NamedTuple):
    """The prefixes of a decoder block's hub tensors."""

    attention: str
    attention_norm: str
    ffn: str
    ffn_norm: str


def block_names(config: MolmoConfig, layer: int) -> BlockNames:
    """Dense Molmo v1 has a block's parts flat, MolmoE's remote code nests them, Molmo2 nests all but the norms."""
    block = f"{TRANSFORMER}.blocks.{layer}"
    if config.image.layout != "molmo":
        return BlockNames(f"{block}.self_attn", f"{block}.attn_norm", f"{block}.mlp", f"{block}.ff_norm")
    attention, ffn = (f"{block}.attn", f"{block}.mlp") if config.decoder.n_experts else (block, block)
    return BlockNames(attention, f"{attention}.attn_norm", ffn, f"{ffn}.ff_norm")


def matrices_after_norms(config: MolmoConfig, layer: int) -> dict[str, Slot]:
    """Hub name of the gain of each norm of a block -> those of all matrices whose input is this norm's output.

    Empty for a decoder with norms after its branches.
    """
    if config.decoder.norm_after:
        return {}
    names, ffn = block_names(config, layer), block_names(config, layer).ffn
    matrices: Slot = (f"{ffn}.ff_proj.weight",)
    if config.decoder.n_experts:
        experts = (
            f"{ffn}.experts.{e}.{part}_proj.weight" for e in range(config.decoder.n_experts) for part in ("gate", "up")
        )
        matrices = (f"{ffn}.gate.weight", *experts)
    attention = (f"{names.attention}.att_proj.weight",)
    return {f"{names.attention_norm}.weight": attention, f"{names.ffn_norm}.weight": matrices}


def head_name(config: MolmoConfig) -> str:
    """The hub name of the output head; Molmo v1's dense models have it in the transformer."""
    if config.decoder.weight_tying:
        return f"{TRANSFORMER}.wte.embedding"
    if config.image.layout == "molmo_point":
        return "lm_head.output_embeddings"
    nested = config.decoder.n_experts or config.image.layout == "molmo2"
    return "lm_head.weight" if nested else f"{TRANSFORMER}.ff_out.weight"


def _lines(config: MolmoConfig) -> Iterator[_Line]:
    for vit, module, hub in vit_names(config):
        yield from _vision(vit, module, hub)
    yield from _conv_tower(config)
    yield from _connector(config)
    yield from _decoder(config)
    yield from _point_head(config)


def _vision(v: VisionConfig, module: str, hub: str) -> Iterator[_Line]:
    d, parts = v.d_model, v.parts
    top: dict[str, Shape] = {"class_embedding": (d,)} if parts.class_token else {}
    top |= {"positional_embedding": (v.n_pos, d), "patch_embedding.weight": (d, 3 * v.patch_size**2)}
    top |= {"patch_embedding.bias": (d,)} if parts.patch_bias else {}
    top |= {"pre_ln.weight": (d,), "pre_ln.bias": (d,)} if parts.pre_ln else {}
    for name, shape in top.items():
        yield f"{module}.{name}", (f"{hub}.{name}",), shape
    leaves: dict[str, Shape] = {}
    for part, rows, columns in (
        *((f"attention.{w}", d, d) for w in ("wq", "wk", "wv", "wo")),
        ("feed_forward.w1", v.mlp_dim, d),
        ("feed_forward.w2", d, v.mlp_dim),
    ):
        leaves |= {f"{part}.weight": (rows, columns), f"{part}.bias": (rows,)}
    for norm in ("attention_norm", "ffn_norm"):
        leaves |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
    leaves |= {"lambda1": (d,), "lambda2": (d,)} if parts.layer_scale else {}
    for n in range(v.n_layers):
        for leaf, shape in leaves.items():
            yield f"{module}.blocks.{n}.{leaf}", (f"{hub}.transformer.resblocks.{n}.{leaf}",), shape


def _conv_tower(config: MolmoConfig) -> Iterator[_Line]:
    if config.conv_tower is not None:
        for name, shape in tower_shapes(config.conv_tower).items():
            yield f"conv_tower.{name}", (f"{BACKBONE}.conv_tower.{name}",), shape


def tower_shapes(config: ConvTowerConfig) -> dict[str, Shape]:
    """Shapes by parameter name of `modeling.conv_tower.ConvTower`."""
    convs: dict[str, Shape] = {"stem": (config.stem_dim, 3, 3, 3)}
    width = config.stem_dim
    for n, steps in enumerate(config.steps):
        half = width // 2
        convs[f"stages.{n}.first"] = (width, width, 3, 3)
        for step in range(steps):
            convs[f"stages.{n}.steps.{step}.0"] = (half, width, 3, 3)
            convs[f"stages.{n}.steps.{step}.1"] = (half, half, 3, 3)
        convs[f"stages.{n}.last"] = (width, width, 3, 3)
        width *= 2
    for level in range(3):
        convs[f"lateral.{level}"] = (config.pyramid_dim, width >> (2 - level), 1, 1)
        convs[f"output.{level}"] = (config.pyramid_dim, config.pyramid_dim, 3, 3)
    shapes: dict[str, Shape] = {}
    for name, shape in convs.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def _connector(config: MolmoConfig) -> Iterator[_Line]:
    hub, d, width = connector_name(config), config.vision.d_model, config.feature_dim
    if config.pad_embed:
        yield "connector.pad_embed", (f"{hub}.pad_embed",), (2, width)
    output = [("wo", d)] if config.pooling_output else []
    for w, columns in (("wq", width), ("wk", width), ("wv", width), *output):
        for leaf, shape in (("weight", (d, columns)), ("bias", (d,))):
            yield f"connector.pooling.{w}.{leaf}", (f"{hub}.image_pooling_2d.{w}.{leaf}",), shape
    inner, out = config.projector_dim, config.decoder.d_model
    for w, shape in (("w1", (inner, d)), ("w2", (out, inner)), ("w3", (inner, d))):
        yield f"connector.projector.{w}.weight", (f"{hub}.image_projector.{w}.weight",), shape


def _point_head(config: MolmoConfig) -> Iterator[_Line]:
    point = config.point_head
    if point is None:
        return
    hub, d, features, dim = "model.point_predictor", config.decoder.d_model, config.feature_dim, point.dim
    yield "point_head.x_norm.weight", (f"{hub}.x_norm.weight",), (d,)
    votes = point.votes * point.vote_dim
    voting = (("vote_q", f"{hub}.vote_q", votes + 1, d), ("vote_k", f"{hub}.vote_k", votes, features)) if votes else ()
    for ours, theirs, rows, columns in (
        ("patch_q", f"{hub}.patch_q", dim, d),
        ("patch_k", f"{hub}.patch_k", dim, d),
        ("subpatch_q", f"{hub}.subpatch_q", dim, d),
        ("subpatch_k", f"{hub}.subpatch_k", dim, features),
        ("location", f"{hub}.subpatch_loc_k", point.n_locations, d),
        ("patch_embedding", "model.build_vit_embedding", d, features),
        *voting,
    ):
        yield f"point_head.{ours}.weight", (f"{theirs}.weight",), (rows, columns)
        yield f"point_head.{ours}.bias", (f"{theirs}.bias",), (rows,)
    yield "point_head.no_more", (f"{hub}.add_no_point_class_embed.vector",), (dim,)


def _decoder(config: MolmoConfig) -> Iterator[_Line]:
    d, hub, width = config.decoder, TRANSFORMER, config.decoder.d_model
    qkv = d.q_dim + 2 * d.kv_dim
    yield "decoder.embedding", (f"{hub}.wte.embedding",), (d.embedding_size, width)
    if d.additional_vocab_size:
        yield "decoder.new_embedding", (f"{hub}.wte.new_embedding",), (d.additional_vocab_size, width)
    yield "decoder.ln_f.weight", (f"{hub}.ln_f.weight",), (width,)
    if not d.weight_tying:
        yield "decoder.head.weight", (head_name(config),), (d.embedding_size, width)
    if d.additional_head:
        yield "decoder.new_head.weight", ("lm_head.new_output_embeddings",), (d.additional_vocab_size, width)
    attention: dict[str, Shape] = {"att_proj.weight": (qkv, width), "attn_out.weight": (width, d.q_dim)}
    attention |= {"att_proj.bias": (qkv,)} if d.qkv_bias else {}
    if d.qk_norm:
        q_norm, k_norm = (d.head_dim, d.head_dim) if d.qk_norm_per_head else (d.q_dim, d.kv_dim)
        attention |= {"q_norm.weight": (q_norm,), "k_norm.weight": (k_norm,)}
    for n in range(d.n_layers):
        ours, names = f"decoder.blocks.{n}", block_names(config, n)
        inner, mlp = names.attention, names.ffn
        for leaf, shape in attention.items():
            yield f"{ours}.attn.{leaf}", (f"{inner}.{leaf}",), shape
        yield f"{ours}.attn_norm.weight", (f"{names.attention_norm}.weight",), (width,)
        yield f"{ours}.ff_norm.weight", (f"{names.ffn_norm}.weight",), (width,)
        if d.n_experts:
            yield f"{ours}.ffn.router.weight", (f"{mlp}.gate.weight",), (d.n_experts, width)
            for part, shape in (("gate", (d.ffn_dim, width)), ("up", (d.ffn_dim, width)), ("down", (width, d.ffn_dim))):
                experts = tuple(f"{mlp}.experts.{e}.{part}_proj.weight" for e in range(d.n_experts))
                yield f"{ours}.ffn.{part}", experts, shape
        else:
            yield f"{ours}.ffn.ff_proj.weight", (f"{mlp}.ff_proj.weight",), (2 * d.ffn_dim, width)
            yield f"{ours}.ffn.ff_out.weight", (f"{mlp}.ff_out.weight",), (width, d.ffn_dim)
