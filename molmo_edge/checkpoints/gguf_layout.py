"""The decoder in llama.cpp's words: which of its graphs, which metadata, which tensor is made of which of the hub's.

Said once, for the exporter that writes a GGUF and for the runtime that refuses one which is another model's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from molmo_edge.checkpoints.tensor_names import head_name
from molmo_edge.config import DecoderConfig
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.tokenizer import Tokenizer

HUB = "model.transformer"


class NoGraphError(MolmoEdgeError):
    """A decoder that llama.cpp has no graph for."""


@dataclass(frozen=True)
class Part:
    """Rows of a hub tensor; all of them where `rows` is None."""

    hub: str
    start: int = 0
    rows: int | None = None


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file, in the order of numpy; of several parts each is an expert."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    exact: bool  # vectors and the router are float32 in every precision

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


def architecture(d: DecoderConfig) -> str:
    """llama.cpp's name of the graph that computes this decoder. Raises NoGraphError where it has none."""
    if d.n_experts and d.qk_norm and not (d.norm_after or d.qkv_bias) and d.n_kv_heads == d.n_heads:
        return "olmoe"
    if not d.n_experts and d.norm_after and d.qk_norm and not d.qkv_bias:
        return "olmo2"
    if not d.n_experts and not d.norm_after and not d.qk_norm:
        return "qwen2"
    kind = (
        f"{d.n_experts or 'no'} experts",
        f"norms {'behind' if d.norm_after else 'in front of'} its branches",
        f"{'with' if d.qk_norm else 'without'} norms of queries and keys",
        f"{'with' if d.qkv_bias else 'without'} biases",
        f"{d.n_kv_heads} of {d.n_heads} heads for keys",
    )
    raise NoGraphError(f"llama.cpp has no graph for a decoder with {', '.join(kind)}: export to ONNX instead")


def shape_metadata(d: DecoderConfig) -> dict[str, int | float]:
    """What the GGUF's metadata says of the decoder's shape, by key."""
    said: dict[str, int | float] = {
        "vocab_size": d.embedding_size,
        "context_length": d.max_position_embeddings,
        "embedding_length": d.d_model,
        "block_count": d.n_layers,
        "feed_forward_length": d.ffn_dim,
        "attention.head_count": d.n_heads,
        "attention.head_count_kv": d.n_kv_heads,
        "attention.layer_norm_rms_epsilon": float(d.norm_eps),
        "rope.freq_base": float(d.rope_theta),
    }
    if d.n_experts:
        said |= {"expert_count": d.n_experts, "expert_used_count": d.top_k}
    return {f"{architecture(d)}.{key}": value for key, value in said.items()}


def token_names(tokenizer: Tokenizer, d: DecoderConfig) -> list[str]:
    """A name for each row of the embedding.

    Rows that no text stands for get names that nobody types. The rows of Molmo's image tokens that lie behind the
    embedding (Molmo-7B-D) have no place in a GGUF, whose head would have to have them too.
    """
    return [tokenizer.token(i) or f"[PAD{i}]" for i in range(d.embedding_size)]


def decoder_tensors(d: DecoderConfig) -> Iterator[GgufTensor]:
    """Every tensor of the GGUF, in the order of the file. Raises NoGraphError as `architecture` does."""

    def matrix(name: str, rows: int, columns: int, *parts: Part) -> GgufTensor:
        shape = (rows, columns) if len(parts) == 1 else (len(parts), rows, columns)
        return GgufTensor(f"{name}.weight", shape, parts, exact=False)

    def vector(name: str, size: int, part: Part) -> GgufTensor:
        return GgufTensor(name, (size,), (part,), exact=True)

    architecture(d)
    w, kv = d.d_model, d.n_kv_heads * d.head_dim
    yield matrix("token_embd", d.embedding_size, w, Part(f"{HUB}.wte.embedding"))
    yield matrix("output", d.embedding_size, w, Part(head_name(d)))
    yield vector("output_norm.weight", w, Part(f"{HUB}.ln_f.weight"))
    for n in range(d.n_layers):
        block, ours = f"{HUB}.blocks.{n}", f"blk.{n}"
        # The remote code of MolmoE nests what the dense checkpoints keep flat.
        attention, ffn = (f"{block}.attn", f"{block}.mlp") if d.n_experts else (block, block)
        for which, start, rows in (("q", 0, w), ("k", w, kv), ("v", w + kv, kv)):
            yield matrix(f"{ours}.attn_{which}", rows, w, Part(f"{attention}.att_proj.weight", start, rows))
            if d.qkv_bias:
                yield vector(f"{ours}.attn_{which}.bias", rows, Part(f"{attention}.att_proj.bias", start, rows))
        yield matrix(f"{ours}.attn_output", w, w, Part(f"{attention}.attn_out.weight"))
        if d.qk_norm:
            yield vector(f"{ours}.attn_q_norm.weight", w, Part(f"{attention}.q_norm.weight"))
            yield vector(f"{ours}.attn_k_norm.weight", kv, Part(f"{attention}.k_norm.weight"))
        norms = ("post_attention_norm", "post_ffw_norm") if d.norm_after else ("attn_norm", "ffn_norm")
        yield vector(f"{ours}.{norms[0]}.weight", w, Part(f"{attention}.attn_norm.weight"))
        yield vector(f"{ours}.{norms[1]}.weight", w, Part(f"{ffn}.ff_norm.weight"))
        if d.n_experts:
            router = (Part(f"{ffn}.gate.weight"),)
            yield GgufTensor(f"{ours}.ffn_gate_inp.weight", (d.n_experts, w), router, exact=True)
            for which, rows, columns in (("gate", d.ffn_dim, w), ("up", d.ffn_dim, w), ("down", w, d.ffn_dim)):
                experts = (Part(f"{ffn}.experts.{e}.{which}_proj.weight") for e in range(d.n_experts))
                yield matrix(f"{ours}.ffn_{which}_exps", rows, columns, *experts)
        else:  # the fused matrix is [up; gate]
            yield matrix(f"{ours}.ffn_up", d.ffn_dim, w, Part(f"{ffn}.ff_proj.weight", 0, d.ffn_dim))
            yield matrix(f"{ours}.ffn_gate", d.ffn_dim, w, Part(f"{ffn}.ff_proj.weight", d.ffn_dim, d.ffn_dim))
            yield matrix(f"{ours}.ffn_down", w, d.ffn_dim, Part(f"{ffn}.ff_out.weight"))
