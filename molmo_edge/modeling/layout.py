"""Which hub tensor is which parameter: the public checkpoint layout, both ways.

Names as in the public checkpoints (prefix "model."). MolmoE's remote code renames the blocks and
splits the experts; its expert matrices are stacked here, one leading dimension for the expert.
"""

from __future__ import annotations

from collections.abc import Iterator

from molmo_edge.config import MolmoConfig

# A parameter of ours is one hub tensor, or several of them stacked along a new first dimension.
Slot = tuple[str, ...]


def hub_layout(config: MolmoConfig) -> dict[str, Slot]:
    """Parameter name of `modeling.Molmo` -> hub tensor names (one, or one an expert)."""
    return dict(_vision(config)) | dict(_connector()) | dict(_decoder(config))


def _vision(config: MolmoConfig) -> Iterator[tuple[str, Slot]]:
    hub = "model.vision_backbone.image_vit"
    dino = config.vision.image_model_type == "dino"
    top = ["class_embedding", "positional_embedding", "patch_embedding.weight"]
    top += ["patch_embedding.bias"] if dino else ["pre_ln.weight", "pre_ln.bias"]
    for name in top:
        yield f"vision.{name}", (f"{hub}.{name}",)
    parts = [f"attention.{w}" for w in ("wq", "wk", "wv", "wo")]
    parts += ["feed_forward.w1", "feed_forward.w2", "attention_norm", "ffn_norm"]
    leaves = [f"{part}.{leaf}" for part in parts for leaf in ("weight", "bias")]
    leaves += ["lambda1", "lambda2"] if dino else []
    for n in range(config.vision.n_layers):
        for leaf in leaves:
            yield f"vision.blocks.{n}.{leaf}", (f"{hub}.transformer.resblocks.{n}.{leaf}",)


def _connector() -> Iterator[tuple[str, Slot]]:
    hub = "model.vision_backbone"
    yield "connector.pad_embed", (f"{hub}.pad_embed",)
    for w in ("wq", "wk", "wv", "wo"):
        for leaf in ("weight", "bias"):
            yield f"connector.pooling.{w}.{leaf}", (f"{hub}.image_pooling_2d.{w}.{leaf}",)
    for w in ("w1", "w2", "w3"):
        yield f"connector.projector.{w}.weight", (f"{hub}.image_projector.{w}.weight",)


def _decoder(config: MolmoConfig) -> Iterator[tuple[str, Slot]]:
    d, hub = config.decoder, "model.transformer"
    yield "decoder.embedding", (f"{hub}.wte.embedding",)
    if d.additional_vocab_size:
        yield "decoder.new_embedding", (f"{hub}.wte.new_embedding",)
    yield "decoder.ln_f.weight", (f"{hub}.ln_f.weight",)
    if not d.weight_tying:
        yield "decoder.head.weight", ("lm_head.weight" if d.n_experts else f"{hub}.ff_out.weight",)
    attention = ["att_proj.weight", "attn_out.weight"]
    attention += ["att_proj.bias"] if d.qkv_bias else []
    attention += ["q_norm.weight", "k_norm.weight"] if d.qk_norm else []
    for n in range(d.n_layers):
        ours, block = f"decoder.blocks.{n}", f"{hub}.blocks.{n}"
        inner, mlp = (f"{block}.attn", f"{block}.mlp") if d.n_experts else (block, block)
        for leaf in attention:
            yield f"{ours}.attn.{leaf}", (f"{inner}.{leaf}",)
        yield f"{ours}.attn_norm.weight", (f"{inner}.attn_norm.weight",)
        yield f"{ours}.ff_norm.weight", (f"{mlp}.ff_norm.weight",)
        if d.n_experts:
            yield f"{ours}.ffn.router.weight", (f"{mlp}.gate.weight",)
            for part in ("gate", "up", "down"):
                experts = tuple(f"{mlp}.experts.{e}.{part}_proj.weight" for e in range(d.n_experts))
                yield f"{ours}.ffn.{part}", experts
        else:
            for leaf in ("ff_proj.weight", "ff_out.weight"):
                yield f"{ours}.ffn.{leaf}", (f"{block}.{leaf}",)
