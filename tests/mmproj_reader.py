"""An mmproj back into PyTorch, by the names that docs/gguf.md gives: what somebody who builds on ggml would do."""

from __future__ import annotations

from pathlib import Path

import torch
from gguf import GGUFReader

from molmo_edge.modeling import Molmo


def vision_from_mmproj(path: Path, model: Molmo) -> Molmo:
    """`model` with its vision tower and connector zeroed, and filled from the file."""
    reader = GGUFReader(path)
    said = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        t.name: torch.from_numpy(t.data.reshape(*map(int, t.shape[::-1])).copy()).float() for t in reader.tensors
    }
    v = model.config.vision
    assert said["general.architecture"] == "clip"
    assert said["clip.projector_type"] == "molmo"
    assert said["clip.vision.block_count"] == v.last_layer + 1
    assert said["molmo.vision.blocks"] == [layer % v.n_layers for layer in v.layers]
    ids = [said[f"molmo.token.{token}"] for token in ("im_start", "im_end", "im_patch", "im_col", "image")]
    assert torch.equal(tensors["mm.token_embd.weight"], model.decoder.embed(torch.tensor(ids)))

    patch = tensors["v.patch_embd.weight"].permute(0, 2, 3, 1).flatten(1)  # [d, (row, column, channel)]
    filled = {
        "vision.patch_embedding.weight": patch,
        "vision.class_embedding": tensors["v.class_embd"],
        "vision.positional_embedding": tensors["v.position_embd.weight"],
        "connector.pad_embed": tensors["mm.pad_embd.weight"],
    }
    pairs = {"vision.pre_ln": "v.pre_ln"}
    for n in range(said["clip.vision.block_count"]):
        ours, theirs = f"vision.blocks.{n}", f"v.blk.{n}"
        pairs |= {f"{ours}.attention_norm": f"{theirs}.ln1", f"{ours}.ffn_norm": f"{theirs}.ln2"}
        pairs |= {f"{ours}.feed_forward.w1": f"{theirs}.ffn_up", f"{ours}.feed_forward.w2": f"{theirs}.ffn_down"}
        for w, name in (("wq", "attn_q"), ("wk", "attn_k"), ("wv", "attn_v"), ("wo", "attn_out")):
            pairs[f"{ours}.attention.{w}"] = f"{theirs}.{name}"
    for w, name in (("wq", "attn_q"), ("wk", "attn_k"), ("wv", "attn_v"), ("wo", "attn_out")):
        pairs[f"connector.pooling.{w}"] = f"mm.pool.{name}"
    for ours, theirs in pairs.items():
        filled |= {f"{ours}.{leaf}": tensors[f"{theirs}.{leaf}"] for leaf in ("weight", "bias")}
    for w, name in (("w1", "mm.gate"), ("w3", "mm.up"), ("w2", "mm.down")):
        filled[f"connector.projector.{w}.weight"] = tensors[f"{name}.weight"]

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("vision.", "connector.")):
                parameter.zero_()
                if name in filled:
                    parameter.copy_(filled.pop(name))
    assert not filled, filled.keys()
    return model
