"""The decoder as llama.cpp represents it: its graph, its metadata, and how its tensors are built from hub tensors.

The exporter uses this to write a GGUF, and the runtime to reject a GGUF of another model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from molmo_edge.checkpoints.tensor_names import TRANSFORMER, block_names, head_name
from molmo_edge.config import DecoderConfig, MolmoConfig
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.tokenizer import Tokenizer

_PERIOD = 4  # every fourth layer of llama.cpp's olmo2 has no sliding window


class NoGraphError(MolmoEdgeError):
    """llama.cpp does not support the decoder."""


@dataclass(frozen=True)
class Part:
    """`rows` rows of a hub tensor from `start`; all of them if `rows` is None."""

    hub: str
    start: int = 0
    rows: int | None = None


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file; `shape` in numpy's order.

    Several parts are the rows of a matrix, one after the other, or experts, stacked to three dimensions. Without parts
    all values are 0.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    exact: bool  # vectors and the router are float32 at every precision

    @property
    def weights(self) -> int:
        """The number of values in the tensor."""
        return math.prod(self.shape)


def architecture(d: DecoderConfig) -> str:
    """llama.cpp's name of the graph that computes this decoder. Raises NoGraphError if there is none."""
    qk_norm = d.qk_norm and ("per head" if d.qk_norm_per_head else "full width")
    own_head_dim = d.q_dim != d.d_model
    match bool(d.n_experts), d.norm_after, qk_norm, d.qkv_bias, own_head_dim, _yarn_kind(d):
        case True, False, "full width", False, False, "none" if d.n_kv_heads == d.n_heads:
            return "olmoe"
        case False, True, "full width", False, False, "none" | "every fourth layer":
            return "olmo2"
        case False, False, "per head", False, _, "none":
            return "qwen3"
        case False, False, False, _, False, "none":
            return "qwen2"
    traits = (
        f"{d.n_experts or 'no'} experts",
        f"norms {'after' if d.norm_after else 'before'} the branches",
        f"{qk_norm or 'no'} norms of queries and keys",
        f"{'' if d.qkv_bias else 'no '}biases",
        f"{d.n_heads} heads of {d.head_dim} for a width of {d.d_model}",
        f"{d.n_kv_heads} heads for keys",
        f"YaRN in {_yarn_kind(d)}",
    )
    raise NoGraphError(f"llama.cpp has no graph for a decoder with {', '.join(traits)}: export to ONNX instead")


def _yarn_kind(d: DecoderConfig) -> str:
    """The layers that YaRN stretches, in the words of `architecture`."""
    if d.yarn is None:
        return "none"
    usual = math.isclose(d.yarn.attention_factor, 0.1 * math.log(d.yarn.factor) + 1, rel_tol=1e-6)
    fourth = d.yarn.layers == tuple(range(_PERIOD - 1, d.n_layers, _PERIOD))
    return "every fourth layer" if fourth and usual else f"layers {', '.join(map(str, d.yarn.layers))}"


def state_layer(config: MolmoConfig) -> int | None:
    """The layer whose output is the state before the final norm, for a model that points by grounding tokens.

    llama.cpp computes the last layer only for positions whose logits are requested, but a grounding head needs the
    states of all image tokens. The GGUF therefore has one more layer, of zeros, which adds nothing to its input.
    """
    return None if config.point_head is None else config.decoder.n_layers - 1


def _n_layers(config: MolmoConfig) -> int:
    """Layers of the GGUF."""
    return config.decoder.n_layers + (state_layer(config) is not None)


def shape_metadata(config: MolmoConfig) -> dict[str, int | float | str]:
    """The GGUF's metadata on the decoder's shape, by key."""
    d = config.decoder
    values: dict[str, int | float | str] = {
        "vocab_size": d.n_logits,
        "context_length": d.max_position_embeddings,
        "embedding_length": d.d_model,
        "block_count": _n_layers(config),
        "feed_forward_length": d.ffn_dim,
        "attention.head_count": d.n_heads,
        "attention.head_count_kv": d.n_kv_heads,
        "attention.layer_norm_rms_epsilon": float(d.norm_eps),
        "rope.freq_base": float(d.rope_theta),
    }
    if d.n_experts:
        values |= {"expert_count": d.n_experts, "expert_used_count": d.top_k}
    if d.head_dim_override:
        values |= {"attention.key_length": d.head_dim, "attention.value_length": d.head_dim}
    if d.yarn is not None:
        # llama.cpp does not stretch layers with a sliding window: one as wide as the context has no other effect.
        values |= {
            "attention.sliding_window": d.max_position_embeddings,
            "attention.sliding_window_pattern": _PERIOD,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(d.yarn.factor),
            "rope.scaling.original_context_length": d.yarn.original_positions,
            "rope.scaling.yarn_beta_fast": float(d.yarn.beta_fast),
            "rope.scaling.yarn_beta_slow": float(d.yarn.beta_slow),
        }
    return {f"{architecture(d)}.{key}": value for key, value in values.items()}


def token_names(tokenizer: Tokenizer, d: DecoderConfig) -> list[str]:
    """A name for each row of the head and of the embedding.

    Rows without a token get names that no text contains. The rows of new_embedding, which hold the image tokens of
    Molmo-7B-D, are in the GGUF only if the head has such rows, too (MolmoPoint).
    """
    return [tokenizer.token(i) or f"[PAD{i}]" for i in range(d.n_logits)]


def decoder_tensors(config: MolmoConfig) -> Iterator[GgufTensor]:
    """Every tensor of the GGUF, in file order. Raises the errors of `architecture`."""
    d = config.decoder
    architecture(d)
    w = d.d_model
    embedding, head = [Part(f"{TRANSFORMER}.wte.embedding")], [Part(head_name(config))]
    if d.additional_head:
        embedding.append(Part(f"{TRANSFORMER}.wte.new_embedding"))
        head.append(Part("lm_head.new_output_embeddings"))
    yield _matrix("token_embd", d.n_logits, w, *embedding)
    yield _matrix("output", d.n_logits, w, *head)
    yield _vector("output_norm.weight", w, Part(f"{TRANSFORMER}.ln_f.weight"))
    for n in range(d.n_layers):
        yield from _layer_tensors(config, n)
    for n in range(d.n_layers, _n_layers(config)):
        for tensor in _layer_tensors(config, n - 1):
            yield replace(tensor, name=tensor.name.replace(f"blk.{n - 1}.", f"blk.{n}."), parts=())


def _matrix(name: str, rows: int, columns: int, *parts: Part) -> GgufTensor:
    return GgufTensor(f"{name}.weight", (rows, columns), parts, exact=False)


def _vector(name: str, size: int, part: Part) -> GgufTensor:
    return GgufTensor(name, (size,), (part,), exact=True)


def _layer_tensors(config: MolmoConfig, n: int) -> Iterator[GgufTensor]:
    d = config.decoder
    w, q, kv = d.d_model, d.q_dim, d.kv_dim
    ours, names = f"blk.{n}", block_names(config, n)
    attention, ffn = names.attention, names.ffn
    for which, start, rows in (("q", 0, q), ("k", q, kv), ("v", q + kv, kv)):
        yield _matrix(f"{ours}.attn_{which}", rows, w, Part(f"{attention}.att_proj.weight", start, rows))
        if d.qkv_bias:
            yield _vector(f"{ours}.attn_{which}.bias", rows, Part(f"{attention}.att_proj.bias", start, rows))
    yield _matrix(f"{ours}.attn_output", w, q, Part(f"{attention}.attn_out.weight"))
    if d.qk_norm:
        for which, width in (("q", q), ("k", kv)):
            width = d.head_dim if d.qk_norm_per_head else width
            yield _vector(f"{ours}.attn_{which}_norm.weight", width, Part(f"{attention}.{which}_norm.weight"))
    norms = ("post_attention_norm", "post_ffw_norm") if d.norm_after else ("attn_norm", "ffn_norm")
    yield _vector(f"{ours}.{norms[0]}.weight", w, Part(f"{names.attention_norm}.weight"))
    yield _vector(f"{ours}.{norms[1]}.weight", w, Part(f"{names.ffn_norm}.weight"))
    if d.n_experts:
        router = (Part(f"{ffn}.gate.weight"),)
        yield GgufTensor(f"{ours}.ffn_gate_inp.weight", (d.n_experts, w), router, exact=True)
        for which, rows, columns in (("gate", d.ffn_dim, w), ("up", d.ffn_dim, w), ("down", w, d.ffn_dim)):
            experts = tuple(Part(f"{ffn}.experts.{e}.{which}_proj.weight") for e in range(d.n_experts))
            shape = (d.n_experts, rows, columns)
            yield GgufTensor(f"{ours}.ffn_{which}_exps.weight", shape, experts, exact=False)
    else:  # the fused matrix is [up; gate]
        yield _matrix(f"{ours}.ffn_up", d.ffn_dim, w, Part(f"{ffn}.ff_proj.weight", 0, d.ffn_dim))
        yield _matrix(f"{ours}.ffn_gate", d.ffn_dim, w, Part(f"{ffn}.ff_proj.weight", d.ffn_dim, d.ffn_dim))
        yield _matrix(f"{ours}.ffn_down", w, d.ffn_dim, Part(f"{ffn}.ff_out.weight"))
