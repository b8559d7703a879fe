"""Which hub tensor is which parameter: the public checkpoint layout, both ways, with every shape.

Names as in the public checkpoints (prefix "model."). MolmoE's remote code renames the blocks and
splits the experts; its expert matrices are stacked here, one leading dimension for the expert.
"""

from __future__ import annotations

from collections.abc import Iterator

from molmo_edge.config import ConvTowerConfig, DecoderConfig, MolmoConfig

# A parameter of ours is one hub tensor, or several of them stacked along a new first dimension.
Slot = tuple[str, ...]
Shape = tuple[int, ...]
_Line = tuple[str, Slot, Shape]  # parameter, hub names, shape of each


def hub_layout(config: MolmoConfig) -> dict[str, Slot]:
    """Parameter name of `modeling.Molmo` -> hub tensor names (one, or one an expert)."""
    return {name: slot for name, slot, _ in _lines(config)}


def hub_shapes(config: MolmoConfig) -> dict[str, Shape]:
    """Hub tensor name -> shape: a checkpoint's whole list of contents."""
    return {hub: shape for _, slot, shape in _lines(config) for hub in slot}


def head_name(d: DecoderConfig) -> str:
    """The hub's name of the matrix that makes logits; the remote code of MolmoE moved it to the top level."""
    if d.weight_tying:
        return "model.transformer.wte.embedding"
    return "lm_head.weight" if d.n_experts else "model.transformer.ff_out.weight"


def _lines(config: MolmoConfig) -> Iterator[_Line]:
    yield from _vision(config)
    yield from _conv_tower(config)
    yield from _connector(config)
    yield from _decoder(config)


def _vision(config: MolmoConfig) -> Iterator[_Line]:
    hub, v = "model.vision_backbone.image_vit", config.vision
    d, dino = v.d_model, v.image_model_type == "dino"
    top: dict[str, Shape] = {
        "class_embedding": (d,),
        "positional_embedding": (v.n_pos, d),
        "patch_embedding.weight": (d, 3 * v.patch_size**2),
    }
    top |= {"patch_embedding.bias": (d,)} if dino else {"pre_ln.weight": (d,), "pre_ln.bias": (d,)}
    for name, shape in top.items():
        yield f"vision.{name}", (f"{hub}.{name}",), shape
    leaves: dict[str, Shape] = {}
    for part, rows, columns in (
        *((f"attention.{w}", d, d) for w in ("wq", "wk", "wv", "wo")),
        ("feed_forward.w1", v.mlp_dim, d),
        ("feed_forward.w2", d, v.mlp_dim),
    ):
        leaves |= {f"{part}.weight": (rows, columns), f"{part}.bias": (rows,)}
    for norm in ("attention_norm", "ffn_norm"):
        leaves |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
    leaves |= {"lambda1": (d,), "lambda2": (d,)} if dino else {}
    for n in range(v.n_layers):
        for leaf, shape in leaves.items():
            yield f"vision.blocks.{n}.{leaf}", (f"{hub}.transformer.resblocks.{n}.{leaf}",), shape


def _conv_tower(config: MolmoConfig) -> Iterator[_Line]:
    if config.conv_tower is not None:  # an extension of this project: no public checkpoint has one
        for name, shape in tower_shapes(config.conv_tower).items():
            yield f"conv_tower.{name}", (f"model.vision_backbone.conv_tower.{name}",), shape


def tower_shapes(config: ConvTowerConfig) -> dict[str, Shape]:
    """Parameter of `modeling.conv_tower.ConvTower` -> shape."""
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
    hub, d, width = "model.vision_backbone", config.vision.d_model, config.feature_dim
    yield "connector.pad_embed", (f"{hub}.pad_embed",), (2, width)
    for w, columns in (("wq", width), ("wk", width), ("wv", width), ("wo", d)):
        for leaf, shape in (("weight", (d, columns)), ("bias", (d,))):
            yield f"connector.pooling.{w}.{leaf}", (f"{hub}.image_pooling_2d.{w}.{leaf}",), shape
    inner, out = config.projector_dim, config.decoder.d_model
    for w, shape in (("w1", (inner, d)), ("w2", (out, inner)), ("w3", (inner, d))):
        yield f"connector.projector.{w}.weight", (f"{hub}.image_projector.{w}.weight",), shape


def _decoder(config: MolmoConfig) -> Iterator[_Line]:
    d, hub = config.decoder, "model.transformer"
    width, kv = d.d_model, d.n_kv_heads * d.head_dim
    yield "decoder.embedding", (f"{hub}.wte.embedding",), (d.embedding_size, width)
    if d.additional_vocab_size:
        yield "decoder.new_embedding", (f"{hub}.wte.new_embedding",), (d.additional_vocab_size, width)
    yield "decoder.ln_f.weight", (f"{hub}.ln_f.weight",), (width,)
    if not d.weight_tying:
        yield "decoder.head.weight", (head_name(d),), (d.embedding_size, width)
    attention: dict[str, Shape] = {"att_proj.weight": (width + 2 * kv, width), "attn_out.weight": (width, width)}
    attention |= {"att_proj.bias": (width + 2 * kv,)} if d.qkv_bias else {}
    attention |= {"q_norm.weight": (width,), "k_norm.weight": (kv,)} if d.qk_norm else {}
    for n in range(d.n_layers):
        ours, block = f"decoder.blocks.{n}", f"{hub}.blocks.{n}"
        inner, mlp = (f"{block}.attn", f"{block}.mlp") if d.n_experts else (block, block)
        for leaf, shape in attention.items():
            yield f"{ours}.attn.{leaf}", (f"{inner}.{leaf}",), shape
        yield f"{ours}.attn_norm.weight", (f"{inner}.attn_norm.weight",), (width,)
        yield f"{ours}.ff_norm.weight", (f"{mlp}.ff_norm.weight",), (width,)
        if d.n_experts:
            yield f"{ours}.ffn.router.weight", (f"{mlp}.gate.weight",), (d.n_experts, width)
            for part, shape in (("gate", (d.ffn_dim, width)), ("up", (d.ffn_dim, width)), ("down", (width, d.ffn_dim))):
                experts = tuple(f"{mlp}.experts.{e}.{part}_proj.weight" for e in range(d.n_experts))
                yield f"{ours}.ffn.{part}", experts, shape
        else:
            yield f"{ours}.ffn.ff_proj.weight", (f"{block}.ff_proj.weight",), (2 * d.ffn_dim, width)
            yield f"{ours}.ffn.ff_out.weight", (f"{block}.ff_out.weight",), (width, d.ffn_dim)
