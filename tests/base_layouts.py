"""Tiny, random base weights with the names of transformers, and what they compute, from those names alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from molmo_edge.checkpoints.hub_config import read_config
from molmo_edge.config import MolmoConfig, VisionConfig

GOLDEN = Path(__file__).parent / "golden"
KINDS = {"olmoe": "molmoe", "qwen2": "qwen", "olmo_1124": "olmo"}  # a base's model_type, and the golden Molmo's name


# ---- bases in the layouts of transformers ----


def decoder_shapes(c, kind: str, rows: int) -> dict[str, tuple[int, ...]]:
    d, kv = c.d_model, c.n_kv_heads * c.head_dim
    shapes = {"model.embed_tokens.weight": (rows, d), "model.norm.weight": (d,), "lm_head.weight": (rows, d)}
    for n in range(c.n_layers):
        layer = f"model.layers.{n}"
        for p, out in (("q", d), ("k", kv), ("v", kv)):
            shapes[f"{layer}.self_attn.{p}_proj.weight"] = (out, d)
            if kind == "qwen2":
                shapes[f"{layer}.self_attn.{p}_proj.bias"] = (out,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (d, d)
        if kind != "qwen2":
            shapes |= {f"{layer}.self_attn.q_norm.weight": (d,), f"{layer}.self_attn.k_norm.weight": (kv,)}
        shapes[f"{layer}.post_attention_layernorm.weight"] = (d,)
        other = "post_feedforward_layernorm" if kind == "olmo_1124" else "input_layernorm"
        shapes[f"{layer}.{other}.weight"] = (d,)
        homes = [f"{layer}.mlp"]
        if c.n_experts:
            shapes[f"{layer}.mlp.gate.weight"] = (c.n_experts, d)
            homes = [f"{layer}.mlp.experts.{e}" for e in range(c.n_experts)]
        for home in homes:
            shapes |= {f"{home}.{p}_proj.weight": (c.ffn_dim, d) for p in ("gate", "up")}
            shapes[f"{home}.down_proj.weight"] = (d, c.ffn_dim)
    return shapes


def clip_shapes(v: VisionConfig, n_layers: int, n_pos: int) -> dict[str, tuple[int, ...]]:
    d, root = v.d_model, "vision_model"
    shapes = {
        f"{root}.embeddings.class_embedding": (d,),
        f"{root}.embeddings.patch_embedding.weight": (d, 3, v.patch_size, v.patch_size),
        f"{root}.embeddings.position_embedding.weight": (n_pos, d),
    }
    linear = {f"self_attn.{p}_proj": (d, d) for p in ("q", "k", "v", "out")}
    linear |= {"mlp.fc1": (v.mlp_dim, d), "mlp.fc2": (d, v.mlp_dim)}
    names = {f"{root}.encoder.layers.{n}.{part}": shape for n in range(n_layers) for part, shape in linear.items()}
    norms = [f"{root}.encoder.layers.{n}.layer_norm{k}" for n in range(n_layers) for k in (1, 2)]
    names |= dict.fromkeys([f"{root}.pre_layrnorm", f"{root}.post_layernorm", *norms], (d,))
    return shapes | {f"{n}.weight": s for n, s in names.items()} | {f"{n}.bias": s[:1] for n, s in names.items()}


def dino_shapes(v: VisionConfig, n_pos: int) -> dict[str, tuple[int, ...]]:
    d = v.d_model
    shapes = {
        "embeddings.cls_token": (1, 1, d),
        "embeddings.mask_token": (1, d),
        "embeddings.position_embeddings": (1, n_pos, d),
        "embeddings.patch_embeddings.projection.weight": (d, 3, v.patch_size, v.patch_size),
        "embeddings.patch_embeddings.projection.bias": (d,),
    }
    linear = {f"attention.attention.{p}": (d, d) for p in ("query", "key", "value")}
    linear |= {"attention.output.dense": (d, d), "mlp.fc1": (v.mlp_dim, d), "mlp.fc2": (d, v.mlp_dim)}
    names = {f"encoder.layer.{n}.{part}": shape for n in range(v.n_layers) for part, shape in linear.items()}
    names |= dict.fromkeys(
        ["layernorm", *(f"encoder.layer.{n}.norm{k}" for n in range(v.n_layers) for k in (1, 2))], (d,)
    )
    shapes |= {f"encoder.layer.{n}.layer_scale{k}.lambda1": (d,) for n in range(v.n_layers) for k in (1, 2)}
    return shapes | {f"{n}.weight": s for n, s in names.items()} | {f"{n}.bias": s[:1] for n, s in names.items()}


def randomly(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Matrices as wide as keeps activations alive; nothing is left at 0 or 1, where a mix-up would not show."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.2) + ("norm" in name)
        for name, shape in shapes.items()
    }


def write_decoder(
    directory: Path, kind: str, rows: int = 512, dtype=torch.float32, **config
) -> dict[str, torch.Tensor]:
    """A directory as on the hub, in two shards; `config` changes config.json."""
    c = read_config(GOLDEN / KINDS[kind]).decoder
    tensors = {name: t.to(dtype) for name, t in randomly(decoder_shapes(c, kind, rows)).items()}
    if config.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    directory.mkdir()
    files = {name: f"model-0000{1 + k % 2}-of-00002.safetensors" for k, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    raw = {
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": c.d_model,
        "intermediate_size": c.ffn_dim,
        "max_position_embeddings": 4096,
        "num_attention_heads": c.n_heads,
        "num_hidden_layers": c.n_layers,
        "num_key_value_heads": c.n_kv_heads,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": False,
        "vocab_size": rows,
    }
    if c.n_experts:
        raw |= {"num_experts": c.n_experts, "num_experts_per_tok": c.top_k, "norm_topk_prob": False, "clip_qkv": None}
    (directory / "config.json").write_text(json.dumps(raw | config))
    (directory / "tokenizer.json").write_text(json.dumps(base_tokenizer()))
    return tensors


def base_tokenizer() -> dict:
    """The tokenizer of a golden Molmo without what Molmo added: 500 ids."""
    definition = json.loads((GOLDEN / "qwen" / "tokenizer.json").read_text(encoding="utf-8"))
    return definition | {"added_tokens": [entry for entry in definition["added_tokens"] if entry["id"] < 500]}


def write_clip(directory: Path, n_layers: int = 11, n_pos: int = 577) -> dict[str, torch.Tensor]:
    """A whole CLIP in a pickle, as OpenAI's on the hub: with a text half, and with integers among the weights."""
    v = read_config(GOLDEN / "qwen").vision
    tensors = randomly(clip_shapes(v, n_layers, n_pos), seed=1)
    more = {
        "logit_scale": torch.tensor(2.0),
        "text_model.encoder.layers.0.mlp.fc1.weight": torch.ones(4, 4),
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "vision_model.embeddings.position_ids": torch.arange(n_pos)[None],
        "visual_projection.weight": torch.ones(4, 32),
    }
    directory.mkdir()
    torch.save(tensors | more, directory / "pytorch_model.bin")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": n_layers}
    vision |= {"patch_size": 14, "image_size": 14 * round((n_pos - 1) ** 0.5)}
    (directory / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    return tensors


DINO = VisionConfig("dino", 32, 10, 4, 64, 577, 14, 1e-6, "gelu", (-3, -9))


def write_dino(directory: Path, side: int) -> dict[str, torch.Tensor]:
    tensors = randomly(dino_shapes(DINO, 1 + side**2), seed=2)
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    raw = {"model_type": "dinov2", "hidden_size": 32, "mlp_ratio": 2, "num_attention_heads": 4, "num_hidden_layers": 10}
    raw |= {"patch_size": 14, "image_size": 14 * side, "layer_norm_eps": 1e-6, "hidden_act": "gelu"}
    (directory / "config.json").write_text(json.dumps(raw))
    return tensors


def rms(x, weight, eps):
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def rotate(x, theta):
    """x [n, heads, head_dim], position by position; pairs are half a head apart."""
    n, _, size = x.shape
    angle = torch.arange(n)[:, None] / theta ** (torch.arange(size // 2) * 2 / size)  # [n, size / 2]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., : size // 2], x[..., size // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend(q, k, v, causal):
    """[n, heads, head_dim] -> [n, heads * head_dim]."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


def decoder_attention(x, t, own, c):
    def project(p):
        return F.linear(x, t[f"{own}.{p}_proj.weight"], t.get(f"{own}.{p}_proj.bias"))

    q, k, v = project("q"), project("k"), project("v")
    if f"{own}.q_norm.weight" in t:
        q, k = rms(q, t[f"{own}.q_norm.weight"], c.norm_eps), rms(k, t[f"{own}.k_norm.weight"], c.norm_eps)
    q, k, v = (y.view(len(x), -1, c.head_dim) for y in (q, k, v))
    q, k = rotate(q, c.rope_theta), rotate(k, c.rope_theta)
    k, v = (y.repeat_interleave(c.n_heads // c.n_kv_heads, 1) for y in (k, v))
    return attend(q, k, v, causal=True) @ t[f"{own}.o_proj.weight"].T


def swiglu(x, t, home):
    gate, up, down = (t[f"{home}.{p}_proj.weight"].T for p in ("gate", "up", "down"))
    return (F.silu(x @ gate) * (x @ up)) @ down


def mlp(x, t, home, c):
    if not c.n_experts:
        return swiglu(x, t, home)
    out = torch.zeros_like(x)
    for i, probabilities in enumerate((x @ t[f"{home}.gate.weight"].T).softmax(-1)):
        for e in probabilities.argsort(descending=True)[: c.top_k].tolist():
            out[i] += probabilities[e] * swiglu(x[i], t, f"{home}.experts.{e}")
    return out


def decoder_logits(ids, t, c, kind):
    x = t["model.embed_tokens.weight"][ids]
    for n in range(c.n_layers):
        layer = f"model.layers.{n}"

        def norm(y, name, layer=layer):
            return rms(y, t[f"{layer}.{name}.weight"], c.norm_eps)

        if kind == "olmo_1124":
            x = x + norm(decoder_attention(x, t, f"{layer}.self_attn", c), "post_attention_layernorm")
            x = x + norm(mlp(x, t, f"{layer}.mlp", c), "post_feedforward_layernorm")
        else:
            x = x + decoder_attention(norm(x, "input_layernorm"), t, f"{layer}.self_attn", c)
            x = x + mlp(norm(x, "post_attention_layernorm"), t, f"{layer}.mlp", c)
    return rms(x, t["model.norm.weight"], c.norm_eps) @ t.get("lm_head.weight", t["model.embed_tokens.weight"]).T


def vit_attention(x, t, names, heads):
    q, k, v = (F.linear(x, t[f"{n}.weight"], t[f"{n}.bias"]).view(len(x), heads, -1) for n in names[:3])
    return F.linear(attend(q, k, v, causal=False), t[f"{names[3]}.weight"], t[f"{names[3]}.bias"])


def layer_norm(x, t, name, eps):
    return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)


def two_layers(x, t, home, act):
    hidden = act(F.linear(x, t[f"{home}.fc1.weight"], t[f"{home}.fc1.bias"]))
    return F.linear(hidden, t[f"{home}.fc2.weight"], t[f"{home}.fc2.bias"])


def clip_states(image, t, n_layers, positions=None):
    """image [3, h, w] -> what comes out of each layer, patches only."""
    root = "vision_model"
    x = F.conv2d(image[None], t[f"{root}.embeddings.patch_embedding.weight"], stride=14)[0].flatten(1).T
    x = torch.cat([t[f"{root}.embeddings.class_embedding"][None], x])
    x = x + (t[f"{root}.embeddings.position_embedding.weight"] if positions is None else positions)
    x = layer_norm(x, t, f"{root}.pre_layrnorm", 1e-5)
    states = []
    for n in range(n_layers):
        layer = f"{root}.encoder.layers.{n}"
        names = [f"{layer}.self_attn.{p}_proj" for p in ("q", "k", "v", "out")]
        x = x + vit_attention(layer_norm(x, t, f"{layer}.layer_norm1", 1e-5), t, names, 4)
        normed = layer_norm(x, t, f"{layer}.layer_norm2", 1e-5)
        x = x + two_layers(normed, t, f"{layer}.mlp", lambda y: y * torch.sigmoid(1.702 * y))
        states.append(x[1:])
    return states


def dino_states(image, t, positions):
    patches = t["embeddings.patch_embeddings.projection.weight"], t["embeddings.patch_embeddings.projection.bias"]
    x = F.conv2d(image[None], *patches, stride=14)[0].flatten(1).T
    x = torch.cat([t["embeddings.cls_token"][0], x]) + positions
    states = []
    for n in range(DINO.n_layers):
        layer = f"encoder.layer.{n}"
        names = [f"{layer}.attention.{p}" for p in ("attention.query", "attention.key", "attention.value")]
        names.append(f"{layer}.attention.output.dense")
        attended = vit_attention(layer_norm(x, t, f"{layer}.norm1", 1e-6), t, names, 4)
        x = x + t[f"{layer}.layer_scale1.lambda1"] * attended
        fed = two_layers(layer_norm(x, t, f"{layer}.norm2", 1e-6), t, f"{layer}.mlp", F.gelu)
        x = x + t[f"{layer}.layer_scale2.lambda1"] * fed
        states.append(x[1:])
    return states


def as_patches(image):
    """[3, h, w] -> [1, patches, 14 * 14 * 3], as Molmo's preprocessing cuts them."""
    _, h, w = image.shape
    return image.view(3, h // 14, 14, w // 14, 14).permute(1, 3, 2, 4, 0).reshape(1, -1, 588)


def resampled(positions, side):
    """[1 + old^2, d] on a grid of side x side, by torch's own bicubic."""
    old = round((len(positions) - 1) ** 0.5)
    grid = positions[1:].T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid[0].flatten(1).T])


def golden(kind: str) -> MolmoConfig:
    return read_config(GOLDEN / KINDS[kind])


def stored(directory: Path) -> dict[str, torch.Tensor]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)


# ---- the same function ----
